"""LSS attention a chunk of the sequence at a time, so that the gathered keys and values never have to fit.

The plain algorithm holds the K and V of all S tokens, for the heads of one head chunk. Here the tokens of every segment are
taken in `token_chunks` nearly even runs [t_c, t_c+1): chunk c is the c-th run of all ranks, gathered by one all-gather while
chunk c - 1 computes. Outputs over the chunks are merged by their log-sum-exp:

    lse = log sum_c exp(lse_c),   out = sum_c exp(lse_c - lse) out_c

and in backward each chunk's dK, dV come from the global out and lse and go home by one reduce-scatter of their own, while
dQ adds up over chunks. This is the sequence-chunked pipeline of the Fully Pipelined Distributed Transformer (Yao et al.
2024) on LSS's collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise, product

import torch
from torch.autograd.function import once_differentiable

from lss.comm import Pending
from lss.comm.collectives import KV, split_kv
from lss.context_parallel.spec import AttentionSpec
from lss.kernels.blocks import add_sinks_, sinks_gradient
from lss.kernels.merge import lse_dtype, no_keys_yet
from lss.segment import LocalRun, Segment

# (query heads, key heads, the local tokens of every rank)
Chunk = tuple[slice, slice, slice]


def chunked_attention(
    q_BTNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    sinks_N: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of this rank's queries to all keys of the sequence; out (B, T, N, H), 0 at padding.

    Collectives, for each head chunk and token chunk: one all-gather in forward, one more in backward with `regather`, and
    one reduce-scatter in backward; over all chunks as many bytes as without chunks.
    Memory: the gathered K and V of one chunk and of the next, 2 x 2 B (S / token_chunks) (K / head_chunks) H elements, dK
    and dV of one; out and dQ of one head chunk in float32 (float64). Without `regather` the K and V of all chunks.
    """
    return _ChunkedAttention.apply(q_BTNH, k_BTKH, v_BTKH, sinks_N, spec)


def token_spans(local_len: int, chunks: int) -> list[slice]:
    """The local tokens of each chunk: nearly even runs, none of them empty."""
    edges = [local_len * c // chunks for c in range(chunks + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


@lru_cache(maxsize=1024)
def chunk_runs(keys: Segment, arrival: tuple[int, ...] | None, start: int, stop: int) -> tuple[LocalRun, ...]:
    """Where a chunk's tokens lie in its gathered tensors, the ranks' parts behind one another as they arrive."""
    runs = []
    for place, rank in enumerate(range(keys.cp) if arrival is None else arrival):
        for local, local_stop, first, _ in keys.peer(rank).local_runs:
            a, b = max(local, start), min(local_stop, stop)
            if a < b:
                at = place * (stop - start) + a - start
                runs.append((at, at + b - a, first + a - local, first + b - local))
    return tuple(runs)


def _chunks(spec: AttentionSpec, N: int, K: int) -> list[Chunk]:
    """All chunks, those of a group of heads behind one another."""
    spans = token_spans(spec.keys.local_len, spec.token_chunks)
    return [(*heads, span) for heads, span in product(spec.head_groups(N, K), spans)]


def _fetched(k: torch.Tensor, v: torch.Tensor, chunks: list[Chunk], spec: AttentionSpec) -> Iterator[KV]:
    """The gathered keys and values of one chunk after another, the next already under way."""

    def gather(chunk: Chunk) -> Pending[KV]:
        _, heads, span = chunk
        return spec.comm.all_gather_kv(k[:, span, heads], v[:, span, heads])

    pending = gather(chunks[0])
    for number in range(len(chunks)):
        come = pending.wait()
        if number + 1 < len(chunks):
            pending = gather(chunks[number + 1])
        yield come


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, spec: AttentionSpec):
        chunks = _chunks(spec, q.shape[2], k.shape[2])
        out, lse, kept = torch.empty_like(q), no_keys_yet(q), []
        summed = out  # of one head chunk: rounding it after every chunk would add up
        for (q_heads, _, span), (keys, values) in zip(chunks, _fetched(k, v, chunks, spec), strict=True):
            first, last = span.start == 0, span.stop == spec.keys.local_len
            queries = q[:, :, q_heads]
            if first:
                summed = torch.zeros_like(queries, dtype=lse.dtype)
            runs = chunk_runs(spec.keys, spec.comm.arrival, span.start, span.stop)
            work = spec.work.of_heads(q_heads)
            work.forward(summed, lse[:, q_heads], queries, keys, values, runs, merging=True)
            if last:
                out[:, :, q_heads] = summed
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
        chunks = _chunks(spec, q.shape[2], k.shape[2])
        fetched = zip(kept[::2], kept[1::2], strict=True) if kept else _fetched(k, v, chunks, spec)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        wire = k.dtype if spec.dkv_dtype == "inputs" else lse_dtype(k)
        summed, going = dq, None
        for (q_heads, k_heads, span), (keys, values) in zip(chunks, fetched, strict=True):
            first, last = span.start == 0, span.stop == spec.keys.local_len
            douts, queries, outs = (x[:, :, q_heads] for x in (dout, q, out))
            if first:
                summed = torch.zeros_like(queries, dtype=lse.dtype)
            B, S, K, H = keys.shape
            dkv_S2BKH = torch.empty(S, 2, B, K, H, dtype=wire, device=k.device)
            work, runs = spec.work.of_heads(q_heads), chunk_runs(spec.keys, spec.comm.arrival, span.start, span.stop)
            given = douts, queries, keys, values, outs, lse[:, q_heads]
            work.backward(summed, *split_kv(dkv_S2BKH), *given, runs, add_dq=True)
            if last:
                dq[:, :, q_heads] = summed
            _arrive(going)  # the last chunk's scatter has had this chunk's time
            going = spec.comm.reduce_scatter_dkv(dkv_S2BKH), dk[:, span, k_heads], dv[:, span, k_heads]
        _arrive(going)
        return dq, dk, dv, sinks_gradient(dout, out, lse, sinks), None


def _arrive(going: tuple[Pending[KV], torch.Tensor, torch.Tensor] | None) -> None:
    """Wait for a chunk's scatter and put what it brings into its place."""
    if going is None:
        return
    pending, *places = going
    for place, part in zip(places, pending.wait(), strict=True):
        place.copy_(part)
