"""Work on a sequence a tile of tokens at a time, so that no tensor of all tokens by a wide layer ever exists.

Two things are done so: the loss, whose logits are tokens by vocabulary, and what lies between two attentions, whose MLP
is tokens by several times the model's width. Both are exact, and both add up the weights' gradients in float32 (float64
for float64), whatever the matrix products are computed in: sums of rounded sums would lose a digit with every tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lss.config.errors import refuse

# What a tile's widest tensor may take at most. Larger tiles add up weight gradients less often, which is their whole cost.
LOGITS_BYTES = 1 << 30
HIDDEN_BYTES = 1 << 29
# What stands before attention is computed once more in tiles than whole, so it is cut later.
PROJECTED_BYTES = 1 << 31
# And at most this part of a GPU's memory; on a CPU this much, beside which its caches are small anyhow.
PART_OF_GPU = 64
CPU_BYTES = 1 << 26
# Tiles are whole multiples of this where they are larger: matrix products like round sizes.
ROUND = 128

# (logits (t, V), labels (t,), label not counted) -> sum of the losses, their gradient by the logits
SoftmaxTile = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def check_tiles(tiles: int | str) -> int | str:
    """`tiles` if it may be one: "auto" or a number of tokens."""
    if tiles == "auto" or (type(tiles) is int and tiles >= 1):
        return tiles
    raise refuse("memory.tiles", tiles, 'give a number of tokens, 1 or more, or "auto"')


def tile_size(tiles: int | str, tokens: int, bytes_per_token: int, budget: int) -> int:
    """Tokens of a tile: the number given, or for "auto" nearly even tiles whose widest tensor fits the budget."""
    if tiles != "auto":
        return int(tiles)
    most = max(1, budget // max(bytes_per_token, 1))
    if tokens <= most:
        return max(tokens, 1)
    step = ROUND if most >= ROUND else 1
    most = most // step * step
    even = -(-tokens // -(-tokens // most))
    return -(-even // step) * step


def tile_budget(device: torch.device, most: int) -> int:
    """Bytes that a tile's widest tensor may take on this device, `most` where it has memory enough."""
    if device.type == "cuda":
        return min(most, torch.cuda.get_device_properties(device).total_memory // PART_OF_GPU)
    return min(most, CPU_BYTES)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What a matrix product of `x` is computed in here: autocast's type, which leaves float64 alone, or its own."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def ambient_autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """Makes contexts that compute like this place does, for use in backward, where autocast is off.

    Casts of weights are not kept: one made without gradients would be found again where gradients are needed.
    """
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


# -- the loss ------------------------------------------------------------------------------------------------------------


def linear_cross_entropy_sum(
    x_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    tiles: int | str = "auto",
    ignore_index: int = -100,
    softmax: SoftmaxTile | None = None,
) -> torch.Tensor:
    """Sum over counted labels of the cross-entropy of the logits x W^T, in nats, without the logits of all tokens.

    Args:
        x_TD: (T, D). Products are computed in autocast's dtype where it is on, else in x's; losses in float32 at least.
        weight_VD: (V, D).
        labels_T: (T,) int64; `ignore_index` is not counted.
        tiles: tokens whose logits exist at a time; "auto" keeps them to 1 GiB, as `tile_budget` says.
        softmax: computes a tile's losses and their gradient; `softmax_tile` by default, or the same compiled.

    Returns:
        A scalar in float32 (float64 for float64), differentiable by x and W. Both gradients are computed with the losses,
        while a tile's logits are there, so that nothing is computed twice and backward only scales them.
    Memory: until backward the gradients of x, in the product's dtype, and of W, in float32.
    """
    softmax = softmax or softmax_tile
    size = tile_size(tiles, len(x_TD), weight_VD.shape[0] * compute_dtype(x_TD).itemsize,
                     tile_budget(x_TD.device, LOGITS_BYTES))  # fmt: skip
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, size, ignore_index, softmax, torch.is_grad_enabled())


def softmax_tile(logits_tV: torch.Tensor, labels_t: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of a tile's losses, and softmax - one-hot, 0 where not counted, in the logits' dtype."""
    z_tV = logits_tV.to(torch.promote_types(logits_tV.dtype, torch.float32))
    counted = labels_t != ignore_index
    target = labels_t.where(counted, 0)
    lse_t = z_tV.logsumexp(-1)
    losses = (lse_t - z_tV.gather(-1, target[:, None])[:, 0]).where(counted, 0.0)
    hit_tV = torch.arange(z_tV.shape[-1], device=z_tV.device) == target[:, None]
    p_tV = (z_tV - lse_t[:, None]).exp_()
    d_tV = (p_tV - hit_tV.to(p_tV.dtype)).where(counted[:, None], 0.0)
    return losses.sum(dtype=torch.float64), d_tV.to(logits_tV.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, size: int, ignore_index: int, softmax: SoftmaxTile, gradients: bool):
        dtype = compute_dtype(x)
        by_x, by_weight = (gradients and need for need in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        dx = torch.empty_like(x, dtype=dtype) if by_x else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=wide) if by_weight else None
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            for at in range(0, len(x), size):
                x_tile, tokens = x[at : at + size].to(dtype), slice(at, at + size)
                loss, dlogits = softmax(x_tile @ w.T, labels[tokens], ignore_index)
                total += loss
                if dx is not None:
                    torch.mm(dlogits, w, out=dx[tokens])
                if dweight is not None:
                    _add_product_(dweight, dlogits.T, x_tile)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.save_for_backward(dx, dweight)
        return total.to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scaled = [None if g is None else (g * grad).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *scaled, None, None, None, None, None


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, where the product is not rounded to a's dtype on its way."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the CPU's products have the dtype of their factors
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


# -- between attentions ----------------------------------------------------------------------------------------------------

# (a tile of each tensor, which tokens they are) -> (B, t, ...), or several of these
Piece = Callable[..., Any]


def recomputed(
    piece: Piece, tensors: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], size: int | None
) -> Any:
    """piece(*tensors, slice(None)), computed again in backward, and both times `size` tokens at a time.

    Args:
        piece: (tiles of the tensors, the slice of tokens that they are) -> (B, t, ...), or a tuple of these; each token's
            results depend on that token only.
        tensors: (B, T, ...) each; kept for backward, and all that is kept.
        parameters: those that the piece uses. Their gradients are added up over tiles in float32 at least.
        size: tokens of a tile; None takes all at once, for pieces that mix tokens or change their number.
    """
    if not torch.is_grad_enabled():
        return _in_tiles(piece, tensors, size)
    return _Recomputed.apply(piece, size, len(tensors), *tensors, *parameters)


def _tiles(length: int, size: int | None) -> Iterator[slice]:
    if size is None or size >= length:
        yield slice(None)
        return
    for at in range(0, length, size):
        yield slice(at, min(at + size, length))


def _in_tiles(piece: Piece, tensors: Sequence[torch.Tensor], size: int | None) -> Any:
    length = tensors[0].shape[1]
    first, *others = _tiles(length, size)
    found = piece(*(x[:, first] for x in tensors), first)
    if not others:
        return found
    parts = _several(found)
    outs = tuple(part.new_empty(part.shape[0], length, *part.shape[2:]) for part in parts)
    for tokens in (first, *others):
        if tokens is not first:
            parts = _several(piece(*(x[:, tokens] for x in tensors), tokens))
        for out, part in zip(outs, parts, strict=True):
            out[:, tokens] = part
    return outs if isinstance(found, tuple) else outs[0]


def _several(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, piece: Piece, size: int | None, n_tensors: int, *inputs: torch.Tensor):
        tensors = inputs[:n_tensors]
        ctx.piece, ctx.size = piece, size
        # as they are and not as saved tensors, which hooks may replace: gradients are asked for by these very objects
        ctx.parameters = inputs[n_tensors:]
        ctx.autocast = ambient_autocast(tensors[0].device.type)
        ctx.save_for_backward(*tensors)
        with ctx.autocast():
            return _in_tiles(piece, tensors, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        by_tensor = needs[: len(tensors)]
        parameters = [p for p, need in zip(ctx.parameters, needs[len(tensors) :], strict=True) if need]
        tiles = list(_tiles(tensors[0].shape[1], ctx.size))
        whole: list[torch.Tensor | None] = [None] * len(tensors)
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        for tokens in tiles:
            parts = [x[:, tokens].detach().requires_grad_(need) for x, need in zip(tensors, by_tensor, strict=True)]
            with torch.enable_grad(), ctx.autocast():
                outs = _several(ctx.piece(*parts, tokens))
            wanted = [x for x in parts if x.requires_grad]
            given = [dout[:, tokens] for dout in douts]
            found = iter(torch.autograd.grad(outs, (*wanted, *parameters), given, allow_unused=True))
            for number, need in enumerate(by_tensor):
                if need:
                    whole[number] = _placed(whole[number], next(found), tensors[number], tokens, len(tiles))
            sums = [_added(total, next(found), len(tiles)) for total in sums]
        done = iter(s if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))
        return None, None, None, *whole, *(next(done) if need else None for need in needs[len(tensors) :])


def _placed(whole: Any, part: Any, like: torch.Tensor, tokens: slice, tiles: int) -> Any:
    """A tile's gradient in its place."""
    if tiles == 1:
        return part
    whole = torch.empty_like(like) if whole is None else whole
    whole[:, tokens] = 0.0 if part is None else part
    return whole


def _added(total: Any, part: Any, tiles: int) -> Any:
    """A tile's gradient of a parameter on top of those before it, in float32 at least."""
    if total is None:
        return part if part is None or tiles == 1 else part.to(torch.promote_types(part.dtype, torch.float32))
    return total if part is None else total.add_(part)
