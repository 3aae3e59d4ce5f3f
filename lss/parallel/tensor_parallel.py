"""Megatron-style tensor and sequence parallelism (Korthikanti et al. 2022), the rival that the paper compares with.

Weights are cut over the ranks of the cp axis: the projections into heads and into the MLP by output rows, those back
into the residual stream by input columns. Between them the sequence is whole and the heads are cut; outside them the
sequence is cut. So attention and MLP are each entered through an all-gather of activations and left through a
reduce-scatter, and backward mirrors both: eight collectives of B*S*D elements a layer, where LSS issues two.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lss.comm import Communicator
from lss.config.errors import refuse
from lss.kernels import Rules, single_attention
from lss.model import Transformer
from lss.segment import Segment

# name ending -> dimension that is cut
CUTS = {
    "q_proj.weight": 0,
    "k_proj.weight": 0,
    "v_proj.weight": 0,
    "gate_proj.weight": 0,
    "up_proj.weight": 0,
    "o_proj.weight": 1,
    "down_proj.weight": 1,
}


def cut_dimension(name: str) -> int | None:
    """The dimension that tensor parallelism cuts this parameter along, None for those that every rank holds."""
    return next((dim for ending, dim in CUTS.items() if name.endswith(ending)), None)


def cut_weights(model: Transformer, comm: Communicator) -> dict[str, int]:
    """Cut the model's weights in place; returns the dimension of each that was cut, by name.

    Raises:
        Refused: query heads, key heads or the MLP's width do not divide by the number of ranks.
    """
    config = model.config
    for name in ("n_heads", "n_kv_heads", "d_mlp"):
        value = getattr(config, name)
        if value % comm.size:
            raise refuse(
                f"model.{name}", value, f"strategy 'tp' cuts it over parallel.cp={comm.size} ranks, which must divide "
                "it; use strategy 'lss', which takes any heads on any ranks"
            )  # fmt: skip
    cuts = {}
    for name, parameter in model.named_parameters():
        dim = cut_dimension(name)
        if dim is not None:
            parameter.data = parameter.data.chunk(comm.size, dim)[comm.rank].clone()
            cuts[name] = dim
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    return cuts


def enter(x_BTD: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Gather the sequence: (B, T, D) -> (B, cp*T, D), ranks behind one another. All-gather; backward reduce-scatter."""
    return _Enter.apply(x_BTD, comm)


def leave(x_BSD: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Sum the ranks' partial results and cut the sequence again. Reduce-scatter; backward all-gather."""
    return _Leave.apply(x_BSD, comm)


def whole_sequence_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: Rules, *, segment: Segment, comm: Communicator, kernel: str
) -> torch.Tensor:
    """Attention of this rank's heads over a gathered sequence, tokens in rank order before and after."""
    q, k, v = (segment.reorder(x, 1, segment.chunk_order)[:, : segment.seq_len] for x in (q, k, v))
    heads = slice(comm.rank * q.shape[2], (comm.rank + 1) * q.shape[2])
    out = single_attention(q, k, v, rules, segment=segment.alone(), kernel=kernel, heads=heads)
    padded = F.pad(out, (0, 0, 0, 0, 0, segment.padded_len - segment.seq_len))
    return segment.reorder(padded, 1, segment.rank_order)


def gathered_positions(segment: Segment) -> torch.Tensor:
    """Positions in their documents of the gathered tokens, in rank order."""
    return torch.cat([segment.peer(rank).document_positions for rank in range(segment.cp)])


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, comm: Communicator):
        ctx.comm = comm
        return comm.all_gather(x, 1, "activations").wait() if comm.size > 1 else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.comm.reduce_scatter(grad, 1, "activations").wait(), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, comm: Communicator):
        ctx.comm = comm
        return comm.reduce_scatter(x, 1, "activations").wait() if comm.size > 1 else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.comm.all_gather(grad, 1, "activations").wait(), None
