"""LSS across groups of ranks, heads shared out inside them: for many ranks and many heads.

The cp ranks are groups of `inner` neighbours. Inside a group one all-to-all turns "my tokens, all heads" into "the
group's tokens, my share of the heads", as DeepSpeed-Ulysses (Jacobs et al. 2023) does over all ranks. What a group holds
is one segment of cp / inner, so LSS attention follows for those heads, among the ranks with equal place in their groups;
one all-to-all brings the outputs back. Gathered bytes and memory are those of K / inner heads. inner = 1 is `lss`,
inner = cp is `ulysses`. Any head counts, masks and orders, with the same results.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.autograd.function import once_differentiable

from lss.comm import Communicator
from lss.context_parallel.heads import HeadExchange
from lss.context_parallel.lss import lss_attention
from lss.context_parallel.spec import AttentionSpec


def two_level_attention(
    q_BTNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    sinks_N: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of this rank's queries to all keys of the sequence; out (B, T, N, H), 0 at padding.

    Collectives, n query and m key heads in this rank's share (N / inner and K / inner where that divides; a key head
    that several ranks' queries use is in the share of each):

        inside a group, forward and backward alike: two all-to-alls, which send B*T*(N + 2 sum of all m)*H elements and
        inner*B*T*n*H elements forward, and as many the other way in backward;
        across groups: those of `lss_attention` for m key heads, 2*B*S*m*H elements each; one more gather with `regather`.
        Where the share begins or ends within a key head's queries, up to two head chunks more.

    None across groups where inner is cp, nor inside one where it is 1.
    Memory: q, k, v, outputs and lse of this rank's share are kept for backward, as many elements as the tokens' own (more
    where key heads are in several shares), so that backward repeats no all-to-all; the outputs handed back are a second
    tensor. K and V gathered across groups as in `lss_attention`, of m heads.
    """
    inner, outer = spec.comm.levels(spec.inner)
    exchange = HeadExchange(q_BTNH.shape, k_BTKH.shape[2], inner, spec.segment)
    if inner.size == 1:
        q, k, v = q_BTNH, k_BTKH, v_BTKH
    else:
        q, k, v = _ToHeads.apply(q_BTNH, k_BTKH, v_BTKH, exchange)
    if exchange.mine.n_q:
        sinks = None if sinks_N is None else sinks_N[exchange.mine.q]
        out = lss_attention(q, k, v, sinks, _across(exchange, outer, spec))
    else:  # more ranks than heads: this one has nothing to compute, but its backward must take part in the exchanges
        out = q * 1.0 if sinks_N is None else q + sinks_N.sum()
    return out if inner.size == 1 else _ToTokens.apply(out, exchange)


def _across(exchange: HeadExchange, outer: Communicator, spec: AttentionSpec) -> AttentionSpec:
    """The LSS attention of my heads among the ranks with my place in their groups."""
    whole, mine = exchange.whole, exchange.mine
    return replace(
        spec,
        segment=whole,
        keys=whole,
        comm=outer,
        work=spec.work.of_heads(mine.q).of_queries(whole.local_runs),
        groups=mine.groups(exchange.N // exchange.K, min(spec.head_chunks, mine.n_k)),
        inner=1,
    )


class _ToHeads(torch.autograd.Function):
    """q, k and v of all heads of my tokens -> those of my heads of the group's tokens."""

    @staticmethod
    def forward(ctx, q, k, v, exchange: HeadExchange):
        ctx.exchange, ctx.dtype = exchange, q.dtype
        return exchange.qkv_to_heads(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        return *(x.to(ctx.dtype) for x in ctx.exchange.dqkv_to_tokens(dq, dk, dv)), None


class _ToTokens(torch.autograd.Function):
    """Outputs of my heads of the group's tokens -> those of all heads of my tokens."""

    @staticmethod
    def forward(ctx, out, exchange: HeadExchange):
        ctx.exchange = exchange
        return exchange.q_to_tokens(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return ctx.exchange.q_to_heads(dout), None
