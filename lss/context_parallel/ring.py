"""Ring attention (Liu et al. 2023), LSS's first rival: keys and values travel around the ranks, one segment at a time.

Each rank attends to the segment that it holds for the moment and merges the partial results by log-sum-exp. In
backward K, V travel again and dK, dV travel with them, home in the end. Same signature and results as `lss`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from lss.comm.collectives import new_dkv, split_kv
from lss.context_parallel.spec import AttentionSpec, lse_like
from lss.kernels.merge import merge
from lss.segment import Segment


def ring_attention(q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Attention of this rank's queries to all keys of the sequence; out (B, T, N, H), 0 at padding.

    Collectives: cp-1 exchanges of 2*B*T*K*H elements in forward; in backward as many again (none without `regather`)
    and cp exchanges of dK and dV (float32 for half precision).
    Memory: two segments of K and V; without `regather` all of them until backward.
    """
    return _RingAttention.apply(q_BTNH, k_BTKH, v_BTKH, spec)


def _pairs(mine: Segment, theirs: Segment, causal: bool) -> Iterator[tuple[slice, slice, bool]]:
    """(local queries, local keys of the other segment, on the diagonal) of every pair of runs with scores to compute."""
    for q_start, q_stop, q_first, _ in mine.local_runs:
        for k_start, k_stop, k_first, _ in theirs.local_runs:
            # runs of two segments are equal or disjoint, so the whole of one lies before or after the other
            if not causal or k_first <= q_first:
                yield slice(q_start, q_stop), slice(k_start, k_stop), causal and k_first == q_first


def _travel(first: torch.Tensor, spec: AttentionSpec, kept: list[torch.Tensor] | None) -> Iterator[torch.Tensor]:
    """This rank's fused K and V, then those of the rank before it, and so on around; the next is under way meanwhile."""
    if kept:
        yield from kept
        return
    held = first
    for step in range(spec.comm.size):
        pending = spec.comm.shift(held, "kv") if step + 1 < spec.comm.size else None
        yield held
        if pending is not None:
            held = pending.wait()


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spec: AttentionSpec):
        lse = lse_like(q)
        out = torch.zeros_like(q, dtype=lse.dtype)
        kept = []
        fused = torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1)
        for step, kv in enumerate(_travel(fused, spec, None)):
            keys, values = split_kv(kv)
            theirs = spec.segment.peer((spec.segment.rank - step) % spec.comm.size)
            for rows, seen, diagonal in _pairs(spec.segment, theirs, spec.causal):
                part = spec.kernel.forward(
                    q[:, rows], keys[:, seen], values[:, seen], causal=diagonal, scale=spec.scale
                )
                out[:, rows], lse[:, :, rows] = merge(out[:, rows], lse[:, :, rows], *part)
            if not spec.regather:
                kept.append(kv)
        out = out.to(q.dtype)
        ctx.spec = spec
        ctx.save_for_backward(q, fused, out, lse, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        spec: AttentionSpec = ctx.spec
        q, fused, out, lse, *kept = ctx.saved_tensors
        dq = torch.zeros_like(q, dtype=lse.dtype)
        pending = None
        for step, kv in enumerate(_travel(fused, spec, kept)):
            keys, values = split_kv(kv)
            theirs = spec.segment.peer((spec.segment.rank - step) % spec.comm.size)
            part = new_dkv(keys, keys.shape[1])
            dk, dv = split_kv(part)
            for rows, seen, diagonal in _pairs(spec.segment, theirs, spec.causal):
                grads = spec.kernel.backward(
                    dout[:, rows],
                    q[:, rows],
                    keys[:, seen],
                    values[:, seen],
                    out[:, rows],
                    lse[:, :, rows],
                    causal=diagonal,
                    scale=spec.scale,
                )
                dq[:, rows] += grads[0]
                dk[:, seen] += grads[1]
                dv[:, seen] += grads[2]
            # what the ranks before this one added for the same segment arrives while this rank computes its share
            dkv = part if pending is None else pending.wait() + part
            pending = spec.comm.shift(dkv, "dkv")
        assert pending is not None
        dk, dv = split_kv(pending.wait())
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None
