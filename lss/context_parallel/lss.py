"""LSS attention: gather all keys and values once, compute the outputs of one's own queries, scatter dK and dV once.

Forward, on each rank: out_r = attention(Q_r, K, V), with K, V = all-gather over the cp group. Outputs stay where they
are. Backward: dQ_r is local; each rank's dK, dV for all tokens are summed over the group and cut back to their owners
by one reduce-scatter. Source: "Ultra-Long Sequence Distributed Transformer", arXiv 2311.02382.

With head chunks the key heads are taken in groups, and the next group's gather is in flight while this group computes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from lss.comm import Pending
from lss.comm.collectives import new_dkv, split_kv
from lss.context_parallel.spec import AttentionSpec, head_groups, lse_like

KV = tuple[torch.Tensor, torch.Tensor]
HeadGroups = list[tuple[slice, slice]]


def lss_attention(q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Attention of this rank's queries to all keys of the sequence; out (B, T, N, H), 0 at padding.

    Collectives, per head chunk: one all-gather in forward and one reduce-scatter in backward, and one more all-gather
    in backward with `regather`; over all chunks 2*B*S*K*H elements each (S padded to equal segments; the
    reduce-scatter in float32 for half precision).
    Memory: the gathered K and V of one head chunk (two while the next is in flight); without `regather` those of all
    chunks until backward.
    """
    return _LSSAttention.apply(q_BTNH, k_BTKH, v_BTKH, spec)


def _gathered(k: torch.Tensor, v: torch.Tensor, groups: HeadGroups, spec: AttentionSpec) -> Iterator[KV]:
    """Keys and values of all tokens in sequence order, one head chunk after another, the next one already under way."""
    order = spec.segment.chunk_order

    def gather(heads: slice) -> Pending[KV]:
        return spec.comm.all_gather_kv(k[:, :, heads], v[:, :, heads])

    pending = gather(groups[0][1])
    for i in range(len(groups)):
        keys, values = pending.wait()
        if i + 1 < len(groups):
            pending = gather(groups[i + 1][1])
        yield spec.segment.reorder(keys, 1, order), spec.segment.reorder(values, 1, order)


class _LSSAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spec: AttentionSpec):
        groups = head_groups(q.shape[2], k.shape[2], spec.head_chunks)
        out, lse, kept = torch.zeros_like(q), lse_like(q), []
        for (q_heads, _), (keys, values) in zip(groups, _gathered(k, v, groups, spec), strict=True):
            for b in spec.segment.blocks(spec.causal):
                rows = slice(b.q_start, b.q_stop)
                out[:, rows, q_heads], lse[:, q_heads, rows] = spec.kernel.forward(
                    q[:, rows, q_heads],
                    keys[:, b.k_start : b.k_stop],
                    values[:, b.k_start : b.k_stop],
                    causal=b.causal,
                    scale=spec.scale,
                )
            if not spec.regather:
                kept += [keys, values]
        ctx.spec = spec
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        spec: AttentionSpec = ctx.spec
        q, k, v, out, lse, *kept = ctx.saved_tensors
        groups = head_groups(q.shape[2], k.shape[2], spec.head_chunks)
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        gathered = zip(kept[::2], kept[1::2], strict=True) if kept else _gathered(k, v, groups, spec)
        scatters = []
        for (q_heads, k_heads), (keys, values) in zip(groups, gathered, strict=True):
            dkv = new_dkv(keys, spec.segment.padded_len)
            _accumulate_gradients(dq, dkv, dout, q, keys, values, out, lse, q_heads, spec)
            dkv = spec.segment.reorder(dkv, 0, spec.segment.rank_order)
            scatters.append((k_heads, spec.comm.reduce_scatter_dkv(dkv)))
        for k_heads, scatter in scatters:
            dk[:, :, k_heads], dv[:, :, k_heads] = scatter.wait()
        return dq, dk, dv, None


def _accumulate_gradients(dq, dkv_S2BKH, dout, q, keys, values, out, lse, q_heads: slice, spec: AttentionSpec) -> None:
    """Write dQ of one head chunk and add its dK and dV, for all tokens in sequence order, to the buffer."""
    dk, dv = split_kv(dkv_S2BKH)
    for b in spec.segment.blocks(spec.causal):
        rows, seen = slice(b.q_start, b.q_stop), slice(b.k_start, b.k_stop)
        dq[:, rows, q_heads], dk_part, dv_part = spec.kernel.backward(
            dout[:, rows, q_heads],
            q[:, rows, q_heads],
            keys[:, seen],
            values[:, seen],
            out[:, rows, q_heads],
            lse[:, q_heads, rows],
            causal=b.causal,
            scale=spec.scale,
        )
        dk[:, seen] += dk_part
        dv[:, seen] += dv_part
