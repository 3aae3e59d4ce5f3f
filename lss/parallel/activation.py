"""Activation checkpointing: what a block keeps for its backward, and what it computes again.

A block is attentions with linear pieces before and after them (`lss.model.layers`). What each choice keeps of a block:

    none        what autograd keeps
    full        the block's input; backward computes everything again, attention and its collectives included
    attention   the block's input, and the attention's output and lse; backward computes the linear pieces again, once,
                and never the attention

The queries, keys and values that an attention saves for its own backward would be the larger part of what is kept, so
under "attention" a saved-tensor hook drops them as they are saved, and asks the checkpoint of the piece before for them
when they are needed; that piece's backward then finds what that one recomputation left. "full" does the same one place
further on, with the attention inside of the checkpoint and its output dropped where the piece after it saves it.

What is kept may be kept elsewhere: an `Offloader` takes it to host memory or disk and brings it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from lss.comm import cp_communicator
from lss.config import ModelConfig
from lss.config.errors import refuse
from lss.config.hybrid import scans
from lss.context_parallel.spec import spend
from lss.model.layers import Before, Pieces
from lss.offload import HostTier, Kept, Offloader
from lss.tiled import (
    HIDDEN_BYTES,
    PROJECTED_BYTES,
    Piece,
    SoftmaxTile,
    check_tiles,
    compute_dtype,
    recomputed,
    softmax_tile,
    tile_budget,
    tile_size,
)

CHOICES = ("none", "full", "attention")


def make_pieces(
    checkpointing: str | None, *, tiles: int | str, width: int | None, compiling: bool, offloader: Offloader | None = None,
    stack: Stack | None = None,
) -> Pieces:  # fmt: skip
    """How a block's pieces are run.

    Args:
        checkpointing: of `CHOICES`; None is "none".
        tiles: tokens at a time in the pieces before and after attention, where they are computed again; or "auto".
        width: elements that a token has in the widest tensor after it; None where a piece needs all tokens at once.
        compiling: pieces are compiled by torch.compile.
        offloader: where what is kept goes; None keeps it on the device.
        stack: what there is to keep, where "attention" is to compute again what the offloader has no room for.

    Raises:
        Refused: unknown values, or an offloader where everything is kept.
    """
    check_tiles(tiles)
    if checkpointing in (None, "none"):
        if offloader is not None:
            fit = 'with memory.offload what is kept must be little; use "full" or "attention"'
            raise refuse("memory.checkpointing", '"none"', fit)
        return _Compiled() if compiling else Pieces()
    if checkpointing not in CHOICES:
        raise refuse("memory.checkpointing", checkpointing, f"use one of {', '.join(map(repr, CHOICES))}")
    return _Recomputing(checkpointing == "full", tiles, width, _Compiled() if compiling else Pieces(), offloader, stack)


class _Compiled(Pieces):
    """Each function compiled once and used by all layers; shapes are static, since a run's segments are all alike."""

    def __init__(self) -> None:
        self._done: dict[Callable, Callable] = {}

    def compiled(self, function: Callable) -> Callable:
        if function not in self._done:
            self._done[function] = torch.compile(function, dynamic=False)
        return self._done[function]


@dataclass(frozen=True)
class Stack:
    """Blocks that are alike: how many, and the heads of their one attention."""

    blocks: int
    n_heads: int

    def outputs_kept(self, x_BTD: torch.Tensor, room: int, dtype: torch.dtype) -> int:
        """How many blocks' attention has room for its output, of `dtype`, and lse where the inputs of all find theirs."""
        tokens = x_BTD.shape[0] * x_BTD.shape[1]
        lse = tokens * self.n_heads * torch.promote_types(dtype, torch.float32).itemsize
        left = room - self.blocks * x_BTD.numel() * x_BTD.element_size()
        return max(0, left // (x_BTD.numel() * dtype.itemsize + lse))


def stack_of(config: ModelConfig, strategy: str, regather: bool | str) -> Stack | None:
    """The stack of a model of one; None where more is saved of a block than its input, the output and lse."""
    alike = config.kind != "encoder_decoder" and strategy == "lss" and regather is not False and not scans(config)
    return Stack(config.n_layers, config.n_heads) if alike else None


def agree_on_room(offloader: Offloader, mesh: DeviceMesh) -> None:
    """Lower the room for activations to the least of a cp group's ranks: by it they choose what is computed again."""
    cp = cp_communicator(mesh)
    (tier,) = offloader.tiers
    if cp.size > 1 and isinstance(tier, HostTier):
        most_lacking = torch.tensor([-tier.limit], dtype=torch.int64, device=mesh.device_type)
        tier.limit = -int(cp.all_reduce_max(most_lacking, "host memory").wait())


class _Recomputing(Pieces):
    """Pieces under checkpoints; `full`: attention too.

    Where what is kept goes to a bounded room that holds all blocks' inputs but not all attentions' outputs, the blocks
    behind those that have room compute their attention again: 4.5 in place of 3.5, where a tensor that finds no room would
    stay on the device. The offloader is told how many do.
    """

    def __init__(
        self, full: bool, tiles: int | str, width: int | None, plain: Pieces, offloader: Offloader | None,
        stack: Stack | None = None,
    ) -> None:  # fmt: skip
        self._full, self._tiles, self._width, self.offloader, self._stack = full, tiles, width, offloader, stack
        self._before = tiles  # as `tiles`, for what stands before attention and behind all blocks
        self.compiled = plain.compiled

    def stand_for(self, before: int) -> None:
        """Take so many tokens at a time before attention, in a trace of a sequence that stands for a longer one."""
        self._before = before

    def _all_again(self, layer: int, x_BTD: torch.Tensor) -> bool:
        """Whether this block computes its attention again; the same on every rank of a cp group."""
        stack, offloader = self._stack, self.offloader
        if self._full or stack is None or offloader is None or offloader.room is None:
            return self._full
        if x_BTD.numel() * x_BTD.element_size() < offloader.least_bytes:
            return False
        kept = min(stack.outputs_kept(x_BTD, offloader.room, compute_dtype(x_BTD)), stack.blocks)
        offloader.again = stack.blocks - kept
        return layer >= kept

    def attended(
        self, layer: int, before: Before, parameters: Sequence[torch.Tensor], attend: Callable[..., torch.Tensor],
        *inputs: torch.Tensor, by_token: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        # in tiles the pieces before are computed once more, for their gradients; whole, one computation serves both
        x, *others = inputs
        size = self._narrow(x) if by_token and not others else None
        if size is None or size >= x.shape[1]:
            project = partial(_whole, before)
        else:
            project = partial(_in_parts, before, parameters, size)
        if not torch.is_grad_enabled():
            return attend(*project(*inputs))
        if self.offloader is not None:
            self.offloader.next_group()
        with _kept(self.offloader):
            if self._all_again(layer, x):
                (out,) = _checkpoint(lambda *xs: _Remembered.apply(attend(*project(*xs))), *inputs)
                return out
            qkv = _checkpoint(lambda *xs: _Remembered.apply(*project(*xs)), *inputs)
        with _dropped(qkv, self.offloader):
            return attend(*qkv)

    def after(
        self, layer: int, piece: Piece, parameters: Sequence[torch.Tensor], x: torch.Tensor, a: torch.Tensor
    ) -> torch.Tensor:
        with _dropped((a,) if torch.is_grad_enabled() and self._all_again(layer, x) else (), self.offloader):
            size = self._size(x, self._width, compute_dtype(x), HIDDEN_BYTES, self._tiles)
            return recomputed(piece, (x, a), parameters, size)

    def alone(self, piece: Piece, parameters: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        size = self._narrow(x)
        # whole, what autograd keeps of it is not worth computing it again
        if size is None or size >= x.shape[1]:
            return piece(x, slice(None))
        return recomputed(piece, (x,), parameters, size)

    def _narrow(self, x_BTD: torch.Tensor) -> int | None:
        # a norm is computed in float32 at least
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        return self._size(x_BTD, x_BTD.shape[-1], wide, PROJECTED_BYTES, self._before)

    def _size(
        self, x_BTD: torch.Tensor, width: int | None, dtype: torch.dtype, most: int, tiles: int | str
    ) -> int | None:
        """Tokens of a tile whose widest tensor is this wide; None where a piece needs all tokens at once."""
        if self._width is None or width is None:
            return None
        bytes_per_token = x_BTD.shape[0] * width * dtype.itemsize
        return tile_size(tiles, x_BTD.shape[1], bytes_per_token, tile_budget(x_BTD.device, most))


def _whole(before: Before, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return before(*inputs, slice(None))


def _in_parts(
    before: Before, parameters: Sequence[torch.Tensor], size: int, *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return recomputed(before, inputs, parameters, size)


def softmax_of(pieces: Pieces) -> SoftmaxTile:
    """The loss's softmax, compiled where pieces are."""
    return pieces.compiled(softmax_tile)


def _checkpoint(function: Callable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    # nothing in a block draws from torch's generators, so their state need not be saved and restored
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class _Remembered(torch.autograd.Function):
    """Identity on tensors at the end of a checkpoint: saved there, they can be asked for, and are computed again."""

    @staticmethod
    def forward(ctx, *tensors: torch.Tensor):
        ctx.save_for_backward(*tensors)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return grads


class _Recall:
    """The tensors that a checkpoint remembered, asked of it once in a backward: a checkpoint hands each out once.

    Each is held until it has been asked for as often as it was saved: with keys that are kept, one rank saves its own twice.
    """

    def __init__(self, node: torch.autograd.graph.Node) -> None:
        self._node, self._left = node, {}
        self._uses: Counter[int] = Counter()
        self._asked: Counter[int] = Counter()

    def saved(self, number: int) -> int:
        """Count one more that will ask for it."""
        self._uses[number] += 1
        return number

    def __call__(self, number: int) -> torch.Tensor:
        if number not in self._left:
            self._left = dict(enumerate(self._node.saved_tensors))  # type: ignore[attr-defined]
            self._asked.clear()
        self._asked[number] += 1
        return spend(self._left.pop(number)) if self._asked[number] == self._uses[number] else self._left[number]


def _kept(offloader: Offloader | None) -> AbstractContextManager[None]:
    """Inside, what autograd saves goes where the offloader keeps it."""
    return nullcontext() if offloader is None else offloader.keeping()


@contextmanager
def _dropped(remembered: tuple[torch.Tensor, ...], offloader: Offloader | None) -> Iterator[None]:
    """Inside, autograd keeps none of these outputs of `_Remembered`, and finds them again in backward."""
    node = remembered[0].grad_fn if remembered else None
    if node is None:  # nothing before this needs a gradient, so nothing could be computed again
        with _kept(offloader):
            yield
        return
    recall = _Recall(node)
    # what is saved is a view or an alias of what was handed in; both are the same bytes, read the same way
    numbers = {_bytes_of(x): number for number, x in enumerate(remembered)}

    def pack(tensor: torch.Tensor) -> torch.Tensor | Kept | int:
        number = numbers.get(_bytes_of(tensor))
        if number is not None:
            return recall.saved(number)
        return tensor.detach() if offloader is None else offloader.keep(tensor)

    def unpack(packed: torch.Tensor | Kept | int) -> torch.Tensor:
        if isinstance(packed, int):
            return recall(packed)
        if isinstance(packed, torch.Tensor):
            return packed
        assert offloader is not None, "who else would have kept it"
        return offloader.restore(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _bytes_of(x: torch.Tensor) -> tuple:
    # by its storage, which tensors without data have too
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype
