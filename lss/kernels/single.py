"""Attention over a whole sequence on one device, differentiable, with the same kernels as the cut one."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from lss.kernels.blocks import Work, add_sinks_, make_work, sinks_gradient
from lss.kernels.merge import empty_lse
from lss.kernels.outside import outside_graphs
from lss.kernels.rules import Rules
from lss.kernels.table import pick_kernel
from lss.segment import LocalRun, Segment, make_segment


@outside_graphs
def single_attention(
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    rules: Rules = Rules(),  # noqa: B008  (frozen)
    *,
    segment: Segment | None = None,
    kv_segment: Segment | None = None,
    kernel: str = "auto",
    heads: slice = slice(None),
) -> torch.Tensor:
    """Attention of all queries to all keys by these rules; (B, T, N, H), 0 where a query sees nothing.

    Args:
        segment: the queries' sequence, whole, with its documents; one document by default.
        kv_segment: the keys' sequence where that is another one.
        heads: which of the rules' heads these are.
    """
    segment = segment or make_segment(q_BTNH.shape[1], cp=1, rank=0)
    keys = kv_segment or segment
    features = set(rules.features()) | ({"documents"} if segment.edges else set())
    work = make_work(pick_kernel(kernel, q_BTNH, features), rules, segment, keys, q_BTNH, kv_segment is not None)
    sinks = None if rules.sinks is None else rules.sinks[heads]
    return _SingleAttention.apply(q_BTNH, k_BSKH, v_BSKH, sinks, work.of_heads(heads), keys.local_runs)


class _SingleAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, work: Work, keys: tuple[LocalRun, ...]):
        out, lse = torch.empty_like(q), empty_lse(q)
        work.forward(out, lse, q, k, v, keys)
        add_sinks_(out, lse, sinks)
        ctx.work, ctx.keys = work, keys
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse, sinks = ctx.saved_tensors
        schedule = ctx.work.schedule(ctx.keys, q.shape[1], k.shape[1])
        # what several calls add to is kept in float32; what one call writes needs no other dtype than its own
        summed = (schedule.dq_summed, schedule.dk_summed, schedule.dk_summed)
        grads = [
            torch.empty_like(x, dtype=lse.dtype if sums else q.dtype)
            for x, sums in zip((q, k, v), summed, strict=True)
        ]
        ctx.work.backward(*grads, dout, q, k, v, out, lse, ctx.keys)
        return *(g.to(q.dtype) for g in grads), sinks_gradient(dout, out, lse, sinks), None, None
