"""LSS attention: gather all keys and values once, compute the outputs of one's own queries, scatter dK and dV once.

Forward, on each rank: out_r = attention(Q_r, K, V), with K, V = all-gather over the cp group. Outputs stay where they
are. Backward: dQ_r is local; each rank's dK, dV for all tokens are summed over the group and cut back to their owners
by one reduce-scatter. Source: "Ultra-Long Sequence Distributed Transformer", arXiv 2311.02382.

With head chunks the key heads are taken in groups: while one group computes, the next group's gather and the last one's
scatter are in flight. Where windows or documents hide most keys from most queries, each rank fetches only what its own
queries see. How keys travel is the transport's matter (`lss.comm.transport`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.autograd.function import once_differentiable

from lss.comm import Pending
from lss.comm.collectives import KV
from lss.comm.transport import Transport, make_transport
from lss.context_parallel.chunked import chunked_attention
from lss.context_parallel.spec import AttentionSpec, is_spendable
from lss.kernels.blocks import Ready, add_sinks_, sinks_gradient
from lss.kernels.merge import empty_lse

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
    in backward with `regather`; over all chunks 2*B*S*K*H elements each (S padded to equal segments; dK and dV in
    `dkv_dtype`). Where a rank fetches only what its queries see, 2*B*L*K*H elements, L those tokens: by all-to-alls, or
    by writing into peers' memory. None where the keys are whole on every rank: dK and dV are then this rank's share of a
    sum over ranks, like every gradient.
    Memory: the fetched K and V of one head chunk (two while the next is in flight); without `regather` those of all
    chunks until backward. With token chunks see `chunked_attention`.
    """
    if spec.token_chunks > 1:
        return chunked_attention(q_BTNH, k_BTKH, v_BTKH, sinks_N, spec)
    return _LSSAttention.apply(q_BTNH, k_BTKH, v_BTKH, sinks_N, spec, open_transport(spec, k_BTKH))


def open_transport(spec: AttentionSpec, k_BTKH: torch.Tensor) -> Transport:
    """How this call's keys travel, or a refusal."""
    keys, work = spec.keys, spec.work
    return make_transport(
        spec.transport,
        spec.comm,
        spec.segment,
        keys,
        tuple(mask for _, mask in work.masks),
        k_BTKH,
        dkv_dtype=spec.dkv_dtype,
        head_chunks=len(spec.groups or ()) or spec.head_chunks,
        placed=work.scores is not None,
        summed=work.schedule(keys.local_runs, spec.segment.local_len, keys.local_len).dk_summed,
    )


def _fetched(
    k: torch.Tensor, v: torch.Tensor, groups: HeadGroups, transport: Transport
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Ready | None]]:
    """The keys and values that this rank sees, one head chunk after another, the next already under way.

    With them comes what waits until the first so many tokens of them are there.
    """
    first = groups[0][1]
    pending = transport.gather(_heads(k, first, groups), _heads(v, first, groups))
    for i in range(len(groups)):
        come, arriving = pending.begin(), pending
        if i + 1 < len(groups):
            heads = groups[i + 1][1]
            pending = transport.gather(k[:, :, heads], v[:, :, heads])
        yield *come, arriving.upto


def _heads(x_BTNH: torch.Tensor, heads: slice, groups: HeadGroups) -> torch.Tensor:
    # all of them are not cut: at short lengths every call on the host counts
    return x_BTNH if len(groups) == 1 else x_BTNH[:, :, heads]


class _LSSAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, spec: AttentionSpec, transport: Transport):
        groups = spec.head_groups(q.shape[2], k.shape[2])
        out, lse, kept = torch.empty_like(q), empty_lse(q), []
        for (q_heads, _), (keys, values, ready) in zip(groups, _fetched(k, v, groups, transport), strict=True):
            work = spec.work.of_heads(q_heads)
            places = _heads(out, q_heads, groups), lse[:, q_heads]
            how = {"ready": ready, "together": transport.together(keys)}
            work.forward(*places, _heads(q, q_heads, groups), keys, values, transport.runs, **how)
            if not spec.regather:
                kept += [x.clone() for x in (keys, values)] if transport.volatile else [keys, values]
            transport.release()
        add_sinks_(out, lse, sinks)
        ctx.spec, ctx.transport = spec, transport
        ctx.save_for_backward(q, k, v, sinks, out, lse, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        spec: AttentionSpec = ctx.spec
        q, k, v, sinks, out, lse, *kept = ctx.saved_tensors
        groups, transport = spec.head_groups(q.shape[2], k.shape[2]), ctx.transport
        # what several calls add to is kept in float32
        summed = spec.work.schedule(transport.runs, q.shape[1], transport.length).dq_summed
        dq = _QueryGradient(q, lse.dtype if summed else q.dtype, len(groups))
        there = ((keys, values, None) for keys, values in zip(kept[::2], kept[1::2], strict=True))
        fetched = there if kept else _fetched(k, v, groups, transport)
        home = _Home(k, len(groups))
        for (q_heads, k_heads), (keys, values, ready) in zip(groups, fetched, strict=True):
            rooms = transport.new_dkv(keys)
            douts, queries, outs = (_heads(x, q_heads, groups) for x in (dout, q, out))
            dqs = dq.room(q_heads)
            work, ((dks, dvs), *more) = spec.work.of_heads(q_heads), [transport.split(room) for room in rooms]
            given = douts, queries, keys, values, outs, lse[:, q_heads]
            how = {"ready": ready, "together": transport.together(keys), "done": partial(transport.leave, rooms)}
            work.backward(dqs, dks, dvs, *given, transport.runs, more=more, **how)
            dq.fill(q_heads, dqs)
            if not kept:
                transport.release()
            home.arrive()  # the last chunk's scatter has had this chunk's time
            home.expect(k_heads, transport.scatter(rooms))
        home.arrive()
        return dq.whole, *home.grads, sinks_gradient(dout, out, lse, sinks), None, None


class _QueryGradient:
    """dQ of all heads, as head chunks compute it: where Q lies, if nobody reads that again, else in a tensor of its own."""

    def __init__(self, q: torch.Tensor, dtype: torch.dtype, chunks: int) -> None:
        self._like, self._dtype, self._chunks = q, dtype, chunks
        self._spent = chunks > 1 and is_spendable(q)
        self._direct = not self._spent and dtype == q.dtype
        self.whole = q  # spent; or until the one part that there is has been rounded
        if not self._spent and (self._direct or chunks > 1):
            self.whole = torch.empty_like(q)

    def room(self, heads: slice) -> torch.Tensor:
        """Where a chunk's dQ is to be written."""
        if self._direct:
            return self.whole if self._chunks == 1 else self.whole[:, :, heads]
        return torch.empty_like(self._like if self._chunks == 1 else self._like[:, :, heads], dtype=self._dtype)

    def fill(self, heads: slice, part: torch.Tensor) -> None:
        """The chunk is done: its queries have been read, and its dQ written to its room."""
        if self._direct:
            return
        if self._chunks == 1:
            self.whole = part.to(self._like.dtype)
        else:
            self.whole[:, :, heads] = part


class _Home:
    """dK and dV of this rank's own tokens, as the head chunks' scatters bring them."""

    def __init__(self, like_BTKH: torch.Tensor, chunks: int) -> None:
        self._dtype = like_BTKH.dtype
        self.grads = tuple(torch.empty_like(like_BTKH) for _ in range(2)) if chunks > 1 else ()
        self._pending: tuple[slice, Pending[KV]] | None = None

    def expect(self, heads: slice, scatter: Pending[KV]) -> None:
        """A scatter is under way."""
        self._pending = heads, scatter

    def arrive(self) -> None:
        """Wait for the scatter that is under way, if one is."""
        if self._pending is None:
            return
        (heads, scatter), self._pending = self._pending, None
        parts = scatter.wait()
        if not self.grads:  # of all heads
            self.grads = tuple(part.to(self._dtype) for part in parts)
            return
        for grad, part in zip(self.grads, parts, strict=True):
            grad[:, :, heads] = part
