"""LSS attention: gather all keys and values once, compute the outputs of one's own queries, scatter dK and dV once.

Forward, on each rank: out_r = attention(Q_r, K, V), with K, V = all-gather over the cp group. Outputs stay where they
are. Backward: dQ_r is local; each rank's dK, dV for all tokens are summed over the group and cut back to their owners
by one reduce-scatter. Source: "Ultra-Long Sequence Distributed Transformer", arXiv 2311.02382.

With head chunks the key heads are taken in groups, and the next group's gather is in flight while this group computes.
Where windows or documents hide most keys from most queries, each rank fetches only what its own queries see, by one
all-to-all in place of the gather, and another in place of the scatter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.autograd.function import once_differentiable

from lss.comm import Pending
from lss.comm.collectives import KV, new_dkv, split_kv
from lss.context_parallel.spec import AttentionSpec
from lss.kernels.blocks import add_sinks_, sinks_gradient
from lss.kernels.merge import no_keys_yet
from lss.segment import LocalRun

HeadGroups = Sequence[tuple[slice, slice]]


def lss_attention(
    q_BTNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    sinks_N: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of this rank's queries to all keys of the sequence; out (B, T, N, H), 0 at padding.

    Collectives, per head chunk: one all-gather in forward and one reduce-scatter in backward, and one more all-gather
    in backward with `regather`; over all chunks 2*B*S*K*H elements each (S padded to equal segments; the
    reduce-scatter in float32 for half precision). With `spec.fetch` all-to-alls of 2*B*L*K*H elements in their place,
    L the tokens that this rank's queries see. None where the keys are whole on every rank: dK and dV are then this
    rank's share of a sum over ranks, like every gradient.
    Memory: the fetched K and V of one head chunk (two while the next is in flight); without `regather` those of all
    chunks until backward.
    """
    return _LSSAttention.apply(q_BTNH, k_BTKH, v_BTKH, sinks_N, spec)


def _key_runs(spec: AttentionSpec) -> tuple[LocalRun, ...]:
    """Where the fetched keys lie."""
    return spec.fetch.runs if spec.fetch is not None else spec.keys.alone().local_runs


def _fetched(k: torch.Tensor, v: torch.Tensor, groups: HeadGroups, spec: AttentionSpec) -> Iterator[KV]:
    """The keys and values of other tokens in sequence order, one head chunk after another, the next already under way."""
    order = spec.keys.orders(spec.comm.arrival)[0] if spec.fetch is None and spec.keys.cp > 1 else None

    def fetch(heads: slice) -> Pending[KV]:
        mine = k[:, :, heads], v[:, :, heads]
        if spec.keys.cp == 1:
            return Pending((), lambda: mine)
        return spec.comm.all_gather_kv(*mine) if spec.fetch is None else spec.comm.exchange_kv(*mine, spec.fetch)

    pending = fetch(groups[0][1])
    for i in range(len(groups)):
        keys, values = pending.wait()
        if i + 1 < len(groups):
            pending = fetch(groups[i + 1][1])
        yield spec.keys.reorder(keys, 1, order), spec.keys.reorder(values, 1, order)


def _scatter(dkv_S2BKH: torch.Tensor, spec: AttentionSpec) -> Pending[KV]:
    """Bring each token's dK and dV home, summed over the ranks."""
    if spec.keys.cp == 1:
        return Pending((), lambda: split_kv(dkv_S2BKH))
    if spec.fetch is not None:
        return spec.comm.return_dkv(dkv_S2BKH, spec.fetch)
    return spec.comm.reduce_scatter_dkv(spec.keys.reorder(dkv_S2BKH, 0, spec.keys.orders(spec.comm.arrival)[1]))


class _LSSAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, spec: AttentionSpec):
        groups = spec.head_groups(q.shape[2], k.shape[2])
        out, lse, kept = torch.zeros_like(q), no_keys_yet(q), []
        runs = _key_runs(spec)
        for (q_heads, _), (keys, values) in zip(groups, _fetched(k, v, groups, spec), strict=True):
            work = spec.work.of_heads(q_heads)
            work.forward(out[:, :, q_heads], lse[:, q_heads], q[:, :, q_heads], keys, values, runs)
            if not spec.regather:
                kept += [keys, values]
        add_sinks_(out, lse, sinks)
        ctx.spec = spec
        ctx.save_for_backward(q, k, v, sinks, out, lse, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        spec: AttentionSpec = ctx.spec
        q, k, v, sinks, out, lse, *kept = ctx.saved_tensors
        groups = spec.head_groups(q.shape[2], k.shape[2])
        dq, dk, dv = torch.zeros_like(q, dtype=lse.dtype), torch.empty_like(k), torch.empty_like(v)
        fetched = zip(kept[::2], kept[1::2], strict=True) if kept else _fetched(k, v, groups, spec)
        length = spec.keys.padded_len if spec.fetch is None else spec.fetch.length
        scatters, runs = [], _key_runs(spec)
        for (q_heads, k_heads), (keys, values) in zip(groups, fetched, strict=True):
            dkv = new_dkv(keys, length)
            douts, queries, outs, dqs = (x[:, :, q_heads] for x in (dout, q, out, dq))
            work, (dks, dvs) = spec.work.of_heads(q_heads), split_kv(dkv)
            work.backward(dqs, dks, dvs, douts, queries, keys, values, outs, lse[:, q_heads], runs)
            scatters.append((k_heads, _scatter(dkv, spec)))
        for k_heads, scatter in scatters:
            dk[:, :, k_heads], dv[:, :, k_heads] = scatter.wait()
        return dq.to(q.dtype), dk, dv, sinks_gradient(dout, out, lse, sinks), None
