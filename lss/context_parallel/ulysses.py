"""DeepSpeed-Ulysses (Jacobs et al. 2023), LSS's second rival: all-to-all from segments to heads and back.

Each rank receives the whole sequence of a share of the query heads, with the key heads that they use, computes plain
attention, and sends the outputs back. Heads are shared out in nearly even runs, so that any number of heads works on
any number of ranks; key heads that several ranks need are sent to each. Same signature and results as `lss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable

from lss.context_parallel.spec import AttentionSpec
from lss.kernels import Work
from lss.kernels.blocks import add_sinks_, sinks_gradient
from lss.kernels.merge import empty_lse


def ulysses_attention(
    q_BTNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    sinks_N: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of this rank's queries to all keys of the sequence; out (B, T, N, H), 0 at padding.

    Collectives: two all-to-alls in forward (q, k, v out; outputs back) of B*T*(N+2K)*H and B*T*N*H elements, more
    where key heads go to several ranks; the same two mirrored in backward, and with `regather` the first once more.
    Memory: the whole sequence of this rank's heads; without `regather` kept until backward.
    """
    return _UlyssesAttention.apply(q_BTNH, k_BTKH, v_BTKH, sinks_N, spec)


@dataclass(frozen=True)
class _Share:
    """The heads of one rank: query heads [q_start, q_stop) and the key heads [k_start, k_stop) that they use."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int

    @property
    def q(self) -> slice:
        return slice(self.q_start, self.q_stop)

    @property
    def k(self) -> slice:
        return slice(self.k_start, self.k_stop)

    @property
    def n_q(self) -> int:
        return self.q_stop - self.q_start

    @property
    def n_k(self) -> int:
        return self.k_stop - self.k_start


def _shares(n_heads: int, n_kv_heads: int, ranks: int) -> list[_Share]:
    per_key = n_heads // n_kv_heads
    edges = [n_heads * r // ranks for r in range(ranks + 1)]
    runs = pairwise(edges)
    # a rank without query heads (more ranks than heads) needs no key heads either
    return [_Share(a, b, a // per_key, -(-b // per_key) if b > a else a // per_key) for a, b in runs]


class _Exchange:
    """Moves tensors between "my tokens, all heads" and "all tokens, my heads" for one call's shapes."""

    def __init__(self, q_shape: torch.Size, n_kv_heads: int, spec: AttentionSpec) -> None:
        self.spec = spec
        self.B, self.T, self.N, self.H = q_shape
        self.K = n_kv_heads
        self.shares = _shares(self.N, self.K, spec.comm.size)
        self.mine = self.shares[spec.comm.rank]

    def to_heads(self, parts: list[torch.Tensor], n_heads: int) -> torch.Tensor:
        """Send parts[d] (B, T, heads of d, H) to rank d; return (B, S, n_heads, H) in sequence order, padding cut off."""
        size = self.B * self.T * n_heads * self.H
        received = self.spec.comm.all_to_all(parts, [size] * self.spec.comm.size, "heads").wait()
        rank_ordered = torch.cat([x.view(self.B, self.T, n_heads, self.H) for x in received], dim=1)
        segment = self.spec.segment
        return segment.reorder(rank_ordered, 1, segment.chunk_order)[:, : segment.seq_len]

    def to_tokens(self, x_BSnH: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Send each rank its tokens of my heads; return from each rank r my tokens of its `counts[r]` heads."""
        segment = self.spec.segment
        padded = torch.nn.functional.pad(x_BSnH, (0, 0, 0, 0, 0, segment.padded_len - segment.seq_len))
        parts = segment.reorder(padded, 1, segment.rank_order).chunk(self.spec.comm.size, dim=1)
        sizes = [self.B * self.T * n * self.H for n in counts]
        received = self.spec.comm.all_to_all(parts, sizes, "heads").wait()
        return [x.view(self.B, self.T, n, self.H) for x, n in zip(received, counts, strict=True)]

    def qkv_to_heads(self, q, k, v) -> tuple[torch.Tensor, ...]:
        """One all-to-all for q, k and v together."""
        parts = [torch.cat((q[:, :, s.q], k[:, :, s.k], v[:, :, s.k]), dim=2) for s in self.shares]
        n_q, n_k = self.mine.n_q, self.mine.n_k
        return self.to_heads(parts, n_q + 2 * n_k).split((n_q, n_k, n_k), dim=2)

    def spread(self, kv: torch.Tensor) -> torch.Tensor:
        """Give each of my query heads its own copy of its key head, where a native grouping would not fit."""
        if self.native:
            return kv
        return kv[:, :, self._key_of_query(kv.device)]

    def gather_back(self, dkv: torch.Tensor) -> torch.Tensor:
        """The adjoint of `spread`."""
        if self.native:
            return dkv
        summed = dkv.new_zeros(*dkv.shape[:2], self.mine.n_k, self.H)
        return summed.index_add(2, self._key_of_query(dkv.device), dkv)

    @property
    def native(self) -> bool:
        """Whether my query heads are whole groups, so that the kernel's own head grouping is right."""
        return self._whole_groups(self.mine)

    @property
    def all_native(self) -> bool:
        """Whether that is so on every rank: no key head is then another rank's too."""
        return all(self._whole_groups(share) for share in self.shares)

    def _whole_groups(self, share: _Share) -> bool:
        per_key = self.N // self.K
        return share.q_start % per_key == 0 and share.q_stop % per_key == 0

    def _key_of_query(self, device: torch.device) -> torch.Tensor:
        heads = torch.arange(self.mine.q_start, self.mine.q_stop, device=device)
        return heads // (self.N // self.K) - self.mine.k_start


def _my_heads(exchange: _Exchange, sinks: torch.Tensor | None) -> tuple[Work, torch.Tensor | None]:
    """What my heads compute over the whole sequence, and their sinks."""
    spec, heads = exchange.spec, exchange.mine.q
    work = spec.work.of_heads(heads).of_queries(spec.segment.alone().local_runs)
    return work, None if sinks is None else sinks[heads]


class _UlyssesAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, spec: AttentionSpec):
        exchange = _Exchange(q.shape, k.shape[2], spec)
        whole = exchange.qkv_to_heads(q, k, v)
        queries, keys, values = whole[0], exchange.spread(whole[1]), exchange.spread(whole[2])
        out_heads, lse = torch.empty_like(queries), empty_lse(queries)
        work, my_sinks = _my_heads(exchange, sinks)
        work.forward(out_heads, lse, queries, keys, values, spec.segment.alone().local_runs)
        add_sinks_(out_heads, lse, my_sinks)
        out = torch.cat(exchange.to_tokens(out_heads, [s.n_q for s in exchange.shares]), dim=2)
        ctx.spec = spec
        ctx.k_shape = k.shape
        ctx.save_for_backward(out_heads, lse, sinks, *((q, k, v) if spec.regather else whole))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        spec: AttentionSpec = ctx.spec
        out_heads, lse, sinks, *kept = ctx.saved_tensors
        exchange = _Exchange(dout.shape, ctx.k_shape[2], spec)
        queries, keys, values = exchange.qkv_to_heads(*kept) if spec.regather else kept
        dout_heads = exchange.to_heads([dout[:, :, s.q] for s in exchange.shares], exchange.mine.n_q)
        keys, values = exchange.spread(keys), exchange.spread(values)
        work, my_sinks = _my_heads(exchange, sinks)
        runs = spec.segment.alone().local_runs
        # float32 only where gradients of several calls, or of several ranks for a key head that they share, are added up
        schedule = work.schedule(runs, queries.shape[1], keys.shape[1])
        alone = exchange.all_native and not (schedule.dq_summed or schedule.dk_summed)
        dq, dk, dv = (torch.empty_like(x, dtype=dout.dtype if alone else lse.dtype) for x in (queries, keys, values))
        work.backward(dq, dk, dv, dout_heads, queries, keys, values, out_heads, lse, runs)
        fused = torch.cat((dq, exchange.gather_back(dk), exchange.gather_back(dv)), dim=2)
        parts = exchange.to_tokens(fused, [s.n_q + 2 * s.n_k for s in exchange.shares])
        grad_q = torch.cat([p[:, :, : s.n_q] for p, s in zip(parts, exchange.shares, strict=True)], dim=2)
        grad_k = fused.new_zeros(ctx.k_shape)
        grad_v = torch.zeros_like(grad_k)
        for part, s in zip(parts, exchange.shares, strict=True):
            grad_k[:, :, s.k] += part[:, :, s.n_q : s.n_q + s.n_k]
            grad_v[:, :, s.k] += part[:, :, s.n_q + s.n_k :]
        dsinks, mine = None, sinks_gradient(dout_heads, out_heads, lse, my_sinks)
        if mine is not None:  # of my heads over all queries: a share of the sum over ranks, like every gradient
            dsinks = torch.zeros_like(sinks)
            dsinks[exchange.mine.q] = mine
        return *(x.to(dout.dtype) for x in (grad_q, grad_k, grad_v)), dsinks, None
