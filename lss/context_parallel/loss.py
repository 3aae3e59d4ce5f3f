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
    local_sum, local_count = sum_and_count(logits, labels, ignore_index)
    totals = torch.stack((local_sum.detach().double(), local_count.double()))
    totals = comm.all_reduce(totals, "loss").wait()
    count = totals[1] if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=totals.device)
    # no label anywhere: sum 0, and the mean of nothing is defined as 0 with no gradient
    return _GlobalMean.apply(local_sum, totals[0], count.clamp(min=1).double())


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
