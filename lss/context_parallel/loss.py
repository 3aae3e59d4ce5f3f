"""The global loss: sum of local losses over the global number of counted labels.

A mean per rank and then a mean over ranks is right only where every rank counts equally many labels; masked prompts,
padding and the last token break that. So each rank divides the *sum* of its losses by the number of labels counted on
all ranks, and gradients are summed, not averaged.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from lss.comm import Communicator
from lss.config.errors import refuse
from lss.context_parallel.sharding import IGNORE_INDEX
from lss.mesh import axis_group
from lss.tiled import SoftmaxTile, check_tiles, linear_cross_entropy_sum


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mesh: DeviceMesh | None = None,
    *,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """Mean cross-entropy over all counted labels of all ranks, in nats.

        loss = sum over ranks of (sum of local losses) / number of labels counted on all ranks

    Args:
        logits: local, (..., V); half precision is computed in float32.
        labels: local, (...), int64, already shifted: the label of a token is the token that follows it in the whole
            sequence, so shift before the cut. `ignore_index` is not counted.
        mesh: sums run over its "dp" and "cp" axes; None is one rank.
        num_items_in_batch: the global count to divide by, where the loss of several micro-batches is to add up to the
            mean over all of them; by default the labels counted in this call on all ranks.

    Returns:
        A scalar, equal on every rank; 0 where no label is counted anywhere. Its backward gives each rank the gradient
        of the global loss by its own logits, so that parameter gradients are *summed* over ranks.

    Collectives: one all-reduce of two float64 numbers (sum and count).
    """
    group = None if mesh is None else axis_group(mesh, ("dp", "cp"))
    return global_cross_entropy(logits, labels, Communicator(group), num_items_in_batch, ignore_index)


def global_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    comm: Communicator,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """`cross_entropy` over a given group."""
    if logits.shape[:-1] != labels.shape:
        raise refuse("labels", tuple(labels.shape), f"logits are {tuple(logits.shape)}; give one label a token")
    return _global_mean(*sum_and_count(logits, labels, ignore_index), comm, num_items_in_batch)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mesh: DeviceMesh | None = None,
    *,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    tiles: int | str = "auto",
) -> torch.Tensor:
    """`cross_entropy(hidden @ weight.T, labels, mesh)`, a tile of tokens at a time: the logits never exist as a whole.

    Args:
        hidden: local, (..., D), what the logits are computed from.
        weight: (V, D), whole on every rank.
        labels, mesh, num_items_in_batch, ignore_index: as in `cross_entropy`.
        tiles: tokens whose logits exist at a time; "auto" keeps them to 1 GiB, as `lss.tiled.tile_budget` says.

    Memory: from forward to backward the gradients of hidden and, in float32, of weight; see `lss.tiled`.
    Collectives: one all-reduce of two float64 numbers (sum and count).
    """
    group = None if mesh is None else axis_group(mesh, ("dp", "cp"))
    return global_linear_cross_entropy(hidden, weight, labels, num_items_in_batch, comm=Communicator(group), tiles=tiles,
                                       ignore_index=ignore_index)  # fmt: skip


def global_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    *,
    comm: Communicator,
    tiles: int | str = "auto",
    ignore_index: int = IGNORE_INDEX,
    softmax: SoftmaxTile | None = None,
) -> torch.Tensor:
    """`linear_cross_entropy` over a given group."""
    if hidden.shape[:-1] != labels.shape:
        raise refuse("labels", tuple(labels.shape), f"hidden is {tuple(hidden.shape)}; give one label a token")
    flat = hidden.flatten(0, -2), weight, labels.flatten()
    local_sum = linear_cross_entropy_sum(*flat, tiles=check_tiles(tiles), ignore_index=ignore_index, softmax=softmax)
    return _global_mean(local_sum, (labels != ignore_index).sum(), comm, num_items_in_batch)


def _global_mean(
    local_sum: torch.Tensor, local_count: torch.Tensor, comm: Communicator, num_items: int | torch.Tensor | None
) -> torch.Tensor:
    """All ranks' sum over all ranks' count (or `num_items`). Collectives: one all-reduce of two float64 numbers."""
    totals = torch.stack((local_sum.detach().double(), local_count.double()))
    totals = comm.all_reduce(totals, "loss").wait()
    if num_items is None:
        count = totals[1]
    elif isinstance(num_items, torch.Tensor):
        count = num_items.to(totals)
    else:  # filled there: a copy from the host would wait for the device
        count = torch.full_like(totals[1], num_items)
    # no label anywhere: sum 0, and the mean of nothing is defined as 0 with no gradient
    return _GlobalMean.apply(local_sum, totals[0], count.clamp(min=1))


def sum_and_count(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the local losses in nats, number of counted labels), without any collective."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat = logits.flatten(0, -2).to(dtype)
    total = F.cross_entropy(flat, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return total, (labels != ignore_index).sum()


class _GlobalMean(torch.autograd.Function):
    """All-reduce in forward (done by the caller), identity in backward: the value is global, the gradient local."""

    @staticmethod
    def forward(ctx, local_sum, global_sum, count):
        ctx.save_for_backward(count)
        ctx.dtype = local_sum.dtype
        return (global_sum / count).to(local_sum.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (count,) = ctx.saved_tensors
        return (grad.double() / count).to(ctx.dtype), None, None
