"""Ring attention (Liu et al. 2023), LSS's first rival: keys and values travel around the ranks, one segment at a time.

Each rank attends to the segment that it holds for the moment and merges the partial results by log-sum-exp. In
backward K, V travel again and dK, dV travel with them, home in the end. Same signature and results as `lss`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from lss.comm.collectives import split_kv
from lss.context_parallel.spec import AttentionSpec
from lss.kernels.blocks import add_sinks_, sinks_gradient
from lss.kernels.merge import no_keys_yet
from lss.segment import LocalRun


def ring_attention(
    q_BTNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    sinks_N: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of this rank's queries to all keys of the sequence; out (B, T, N, H), 0 at padding.

    Collectives: cp-1 exchanges of 2*B*T*K*H elements in forward; in backward as many again (none without `regather`)
    and cp exchanges of dK and dV (float32 for half precision).
    Memory: two segments of K and V; without `regather` all of them until backward.
    """
    return _RingAttention.apply(q_BTNH, k_BTKH, v_BTKH, sinks_N, spec)


def _held(step: int, spec: AttentionSpec) -> tuple[LocalRun, ...]:
    """The tokens whose keys this rank holds after `step` exchanges."""
    return spec.segment.peer((spec.segment.rank - step) % spec.comm.size).local_runs


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
    def forward(ctx, q, k, v, sinks, spec: AttentionSpec):
        lse = no_keys_yet(q)
        out = torch.zeros_like(q, dtype=lse.dtype)
        kept = []
        fused = torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1)
        for step, kv in enumerate(_travel(fused, spec, None)):
            keys, values = split_kv(kv)
            spec.work.forward(out, lse, q, keys, values, _held(step, spec), merging=True)
            if not spec.regather:
                kept.append(kv)
        add_sinks_(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.spec = spec
        ctx.save_for_backward(q, fused, sinks, out, lse, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        spec: AttentionSpec = ctx.spec
        q, fused, sinks, out, lse, *kept = ctx.saved_tensors
        dq = torch.zeros_like(q, dtype=lse.dtype)
        pending = None
        for step, kv in enumerate(_travel(fused, spec, kept)):
            keys, values = split_kv(kv)
            part = torch.empty_like(kv, dtype=lse.dtype)
            held = _held(step, spec)
            spec.work.backward(dq, *split_kv(part), dout, q, keys, values, out, lse, held, add_dq=True)
            # what the ranks before this one added for the same segment arrives while this rank computes its share
            dkv = part if pending is None else pending.wait() + part
            pending = spec.comm.shift(dkv, "dkv")
        assert pending is not None
        dk, dv = split_kv(pending.wait())
        grads = (x.to(q.dtype) for x in (dq, dk, dv))
        return *grads, sinks_gradient(dout, out, lse, sinks), None
