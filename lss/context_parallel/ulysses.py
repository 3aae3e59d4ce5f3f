"""DeepSpeed-Ulysses (Jacobs et al. 2023), LSS's second rival: all-to-all from segments to heads and back.

Each rank receives the whole sequence of a share of the query heads, with the key heads that they use, computes plain
attention, and sends the outputs back. Heads are shared out in nearly even runs, so that any number of heads works on
any number of ranks; key heads that several ranks need are sent to each. Same signature and results as `lss`.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from lss.context_parallel.heads import HeadExchange, Share
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


class _Exchange(HeadExchange):
    """The exchange over all ranks, with key heads spread where a kernel's own grouping of heads would not fit."""

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

    def _whole_groups(self, share: Share) -> bool:
        per_key = self.N // self.K
        return share.q_start % per_key == 0 and share.q_stop % per_key == 0

    def _key_of_query(self, device: torch.device) -> torch.Tensor:
        heads = torch.arange(self.mine.q_start, self.mine.q_stop, device=device)
        return heads // (self.N // self.K) - self.mine.k_start


def _my_heads(
    exchange: _Exchange, sinks: torch.Tensor | None, spec: AttentionSpec
) -> tuple[Work, torch.Tensor | None]:
    """What my heads compute over the whole sequence, and their sinks."""
    heads = exchange.mine.q
    work = spec.work.of_heads(heads).of_queries(spec.segment.alone().local_runs)
    return work, None if sinks is None else sinks[heads]


class _UlyssesAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, spec: AttentionSpec):
        exchange = _Exchange(q.shape, k.shape[2], spec.comm, spec.segment)
        whole = exchange.qkv_to_heads(q, k, v)
        queries, keys, values = whole[0], exchange.spread(whole[1]), exchange.spread(whole[2])
        out_heads, lse = torch.empty_like(queries), empty_lse(queries)
        work, my_sinks = _my_heads(exchange, sinks, spec)
        work.forward(out_heads, lse, queries, keys, values, spec.segment.alone().local_runs)
        add_sinks_(out_heads, lse, my_sinks)
        out = exchange.q_to_tokens(out_heads)
        ctx.spec = spec
        ctx.n_kv_heads = k.shape[2]
        ctx.save_for_backward(out_heads, lse, sinks, *((q, k, v) if spec.regather else whole))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        spec: AttentionSpec = ctx.spec
        out_heads, lse, sinks, *kept = ctx.saved_tensors
        exchange = _Exchange(dout.shape, ctx.n_kv_heads, spec.comm, spec.segment)
        queries, keys, values = exchange.qkv_to_heads(*kept) if spec.regather else kept
        dout_heads = exchange.q_to_heads(dout)
        keys, values = exchange.spread(keys), exchange.spread(values)
        work, my_sinks = _my_heads(exchange, sinks, spec)
        runs = spec.segment.alone().local_runs
        # float32 only where gradients of several calls, or of several ranks for a key head that they share, are added up
        schedule = work.schedule(runs, queries.shape[1], keys.shape[1])
        alone = exchange.all_native and not (schedule.dq_summed or schedule.dk_summed)
        dq, dk, dv = (torch.empty_like(x, dtype=dout.dtype if alone else lse.dtype) for x in (queries, keys, values))
        work.backward(dq, dk, dv, dout_heads, queries, keys, values, out_heads, lse, runs)
        grads = exchange.dqkv_to_tokens(dq, exchange.gather_back(dk), exchange.gather_back(dv))
        dsinks, mine = None, sinks_gradient(dout_heads, out_heads, lse, my_sinks)
        if mine is not None:  # of my heads over all queries: a share of the sum over ranks, like every gradient
            dsinks = torch.zeros_like(sinks)
            dsinks[exchange.mine.q] = mine
        return *(x.to(dout.dtype) for x in grads), dsinks, None
