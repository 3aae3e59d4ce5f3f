"""Sharing out heads: one all-to-all from "my tokens, all heads" to "our tokens, my heads", and one back.

Heads are shared out in nearly even runs, so that any number of heads works on any number of ranks; key heads that the
queries of several ranks use are sent to each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from lss.comm import Communicator
from lss.segment import Segment


@dataclass(frozen=True)
class Share:
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

    @property
    def n_qkv(self) -> int:
        return self.n_q + 2 * self.n_k

    def groups(self, per_key: int, chunks: int) -> tuple[tuple[slice, slice], ...]:
        """(query heads, key heads), counted within this share, in `chunks` nearly even runs of key heads or more.

        In each run all key heads serve equally many queries, which kernels need; a share that begins or ends within the
        `per_key` queries of a key head has a run more for it.
        """
        first = [max(self.q_start, head * per_key) - self.q_start for head in range(self.k_start, self.k_stop)]
        first.append(self.n_q)
        served = [b - a for a, b in pairwise(first)]
        cuts = {self.n_k * i // chunks for i in range(chunks + 1)}
        cuts |= {i for i in range(1, self.n_k) if served[i] != served[i - 1]}
        return tuple((slice(first[a], first[b]), slice(a, b)) for a, b in pairwise(sorted(cuts)))


def shares_of(n_heads: int, n_kv_heads: int, ranks: int) -> list[Share]:
    """Each rank's heads."""
    per_key = n_heads // n_kv_heads
    edges = [n_heads * r // ranks for r in range(ranks + 1)]
    runs = pairwise(edges)
    # a rank without query heads (more ranks than heads) needs no key heads either
    return [Share(a, b, a // per_key, -(-b // per_key) if b > a else a // per_key) for a, b in runs]


class HeadExchange:
    """Moves tensors between "my tokens, all heads" and "the group's tokens, my heads" for one call's shapes.

    Args:
        q_shape: (B, T, N, H), this rank's queries.
        n_kv_heads: K.
        comm: the group that shares out heads: neighbours in the ranks of `segment`, all of them or some.
        segment: this rank's tokens.
    """

    def __init__(self, q_shape: torch.Size, n_kv_heads: int, comm: Communicator, segment: Segment) -> None:
        self.comm, self.segment = comm, segment
        self.B, self.T, self.N, self.H = q_shape
        self.K = n_kv_heads
        self.shares = shares_of(self.N, self.K, comm.size)
        self.mine = self.shares[comm.rank]
        self.whole = segment.merged(comm.size)  # the group's tokens
        first = segment.rank - comm.rank
        self._in, self._out = segment.orders(tuple(range(first, first + comm.size)))

    def to_heads(self, parts: list[torch.Tensor], n_heads: int) -> torch.Tensor:
        """Send parts[d] (B, T, heads of d, H) to rank d; return (B, tokens of the group, n_heads, H) in sequence order.

        Where the group holds the whole sequence its padding is cut off.
        """
        size = self.B * self.T * n_heads * self.H
        received = self.comm.all_to_all(parts, [size] * self.comm.size, "heads").wait()
        rank_ordered = torch.cat([x.view(self.B, self.T, n_heads, self.H) for x in received], dim=1)
        return self.segment.reorder(rank_ordered, 1, self._in)[:, : self.whole.local_len]

    def to_tokens(self, x_BLnH: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Send each rank its tokens of my heads; return from each rank r my tokens of its `counts[r]` heads."""
        padding = self.comm.size * self.T - x_BLnH.shape[1]
        padded = torch.nn.functional.pad(x_BLnH, (0, 0, 0, 0, 0, padding)) if padding else x_BLnH
        parts = self.segment.reorder(padded, 1, self._out).chunk(self.comm.size, dim=1)
        sizes = [self.B * self.T * n * self.H for n in counts]
        received = self.comm.all_to_all(parts, sizes, "heads").wait()
        return [x.view(self.B, self.T, n, self.H) for x, n in zip(received, counts, strict=True)]

    def qkv_to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One all-to-all for q, k and v together."""
        parts = [torch.cat((q[:, :, s.q], k[:, :, s.k], v[:, :, s.k]), dim=2) for s in self.shares]
        n_q, n_k = self.mine.n_q, self.mine.n_k
        return self.to_heads(parts, self.mine.n_qkv).split((n_q, n_k, n_k), dim=2)

    def dqkv_to_tokens(self, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The adjoint of `qkv_to_heads`, in one all-to-all: gradients of a key head that several ranks had are summed.

        Sums are in float32 for half precision.
        """
        parts = self.to_tokens(torch.cat((dq, dk, dv), dim=2), [s.n_qkv for s in self.shares])
        grad_q = torch.cat([p[:, :, : s.n_q] for p, s in zip(parts, self.shares, strict=True)], dim=2)
        dtype = torch.promote_types(dk.dtype, torch.float32)
        grad_k = dk.new_zeros(self.B, self.T, self.K, self.H, dtype=dtype)
        grad_v = torch.zeros_like(grad_k)
        for part, s in zip(parts, self.shares, strict=True):
            grad_k[:, :, s.k] += part[:, :, s.n_q : s.n_q + s.n_k]
            grad_v[:, :, s.k] += part[:, :, s.n_q + s.n_k :]
        return grad_q, grad_k, grad_v

    def q_to_heads(self, x_BTNH: torch.Tensor) -> torch.Tensor:
        """One all-to-all for a tensor of all query heads: my heads of the group's tokens."""
        return self.to_heads([x_BTNH[:, :, s.q] for s in self.shares], self.mine.n_q)

    def q_to_tokens(self, x_BLnH: torch.Tensor) -> torch.Tensor:
        """The inverse of `q_to_heads`: all query heads of my tokens; 0 at padding that was cut off."""
        return torch.cat(self.to_tokens(x_BLnH, [s.n_q for s in self.shares]), dim=2)
