"""The global loss of a transformers model, from the logits of this rank's tokens and its routers' logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from lss.comm import Communicator


class _GlobalSum(torch.autograd.Function):
    """All-reduce in forward, identity in backward: each rank's gradient is its share, and gradients are summed."""

    @staticmethod
    def forward(ctx, x, comm: Communicator, purpose: str):
        return comm.all_reduce(x.clone(), purpose).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None, None


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor], weights_T: torch.Tensor, top_k: int, comm: Communicator
) -> torch.Tensor:
    """Mixtral's load-balancing loss from the counts of all ranks.

        loss = E sum over experts e of (assignments to e / rows) (sum of probabilities of e / rows)

    over the tokens of all ranks and layers. A product of two means is not linear in tokens, so that a mean of the ranks'
    own losses would be another number.

    Args:
        router_logits: for each layer (T', E), T' this rank's tokens of all rows of the batch.
        weights_T: (T',), 1 for tokens that count and 0 for padding.

    Collectives: one all-reduce of 2 E + 1 numbers.

    Source: Switch Transformer (Fedus et al. 2021), equations 4 to 6, in the form of transformers' Mixtral.
    """
    E = router_logits[0].shape[-1]
    dtype = torch.promote_types(router_logits[0].dtype, torch.float32)
    weights = weights_T.to(dtype)
    counts, sums = weights.new_zeros(E), weights.new_zeros(E)
    for logits in router_logits:
        probabilities = torch.softmax(logits.view(-1, E), dim=-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        counts = counts.scatter_add(0, chosen.flatten(), weights.repeat_interleave(top_k))
        sums = sums + (probabilities.to(dtype) * weights[:, None]).sum(0)
    rows = (weights.sum() * len(router_logits))[None]
    counts, sums, rows = _GlobalSum.apply(torch.cat((counts, sums, rows)), comm, "load balance").split((E, E, 1))
    rows = rows.clamp(min=1)
    return E * (counts / rows * (sums / rows)).sum()
