"""Orders: how a sequence of S tokens is cut into one segment per rank.

The sequence is padded at its end to `padded_len` and cut into equal chunks. `contiguous` gives rank r chunk r of
cp chunks (the paper's cut). `head_tail` cuts into 2*cp chunks and gives rank r chunks r and 2*cp-1-r, so that under
a causal mask every rank has the same area of scores to compute. In both, each run of consecutive tokens that a rank
holds sees a *prefix* of the keys: one local attention call with a bottom-right aligned causal mask per run, and no
merging of partial results. `balanced` deals out 8 or more chunks a rank by counted area, which packed documents need.

With packed documents a run is cut at their borders, and each piece sees keys of its own document only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from lss.config.errors import refuse
from lss.segment.blocks import Block, make_blocks
from lss.segment.documents import balanced_chunks, document_edges, positions_in_document
from lss.segment.mask import make_mask

ORDERS = ("contiguous", "head_tail", "balanced")


@dataclass(frozen=True)
class Segment:
    """One rank's part of a sequence of `seq_len` tokens.

    Attributes:
        seq_len: S, the true length. Padding brings it up to `padded_len`; positions >= S are padding.
        cp, rank: size of the context-parallel group and this rank's place in it.
        order: "contiguous", "head_tail" or "balanced".
        edges: document borders, 0 first and S last; (0, S) for one document.
        shares: the chunks of every rank under the balanced order.
    """

    seq_len: int
    cp: int
    rank: int
    order: str
    edges: tuple[int, ...] = ()
    shares: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Global chunk numbers of this rank, in local order."""
        # one rank holds everything: both orders are the sequence itself, and padding to an even length would be waste
        if self.cp == 1 or self.order == "contiguous":
            return (self.rank,)
        if self.order == "balanced":
            return self.shares[self.rank]
        return (self.rank, 2 * self.cp - 1 - self.rank)

    @property
    def n_chunks(self) -> int:
        """Number of chunks of the whole sequence."""
        return len(self.chunks) * self.cp

    @property
    def chunk_len(self) -> int:
        """Tokens in each chunk, padding included."""
        return -(-self.seq_len // self.n_chunks)

    @property
    def local_len(self) -> int:
        """T: tokens this rank holds, padding included; the same on every rank."""
        return self.chunk_len * len(self.chunks)

    @property
    def padded_len(self) -> int:
        """cp * T: the length of the gathered sequence."""
        return self.local_len * self.cp

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Runs [start, stop) of consecutive global positions in local order; they may run into the padding."""
        runs: list[tuple[int, int]] = []
        for chunk in self.chunks:
            start, stop = chunk * self.chunk_len, (chunk + 1) * self.chunk_len
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        return tuple(runs)

    @cached_property
    def local_runs(self) -> tuple[tuple[int, int, int, int], ...]:
        """The true tokens: (local start, local stop, global start, global stop) of each run, padding cut off."""
        runs, local = [], 0
        for start, stop in self.spans:
            true_stop = min(stop, self.seq_len)
            if true_stop > start:
                runs.append((local, local + true_stop - start, start, true_stop))
            local += stop - start
        return tuple(runs)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Global position of each local token: int64, shape (T,), on the CPU; values >= seq_len mark padding."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.spans])

    @property
    def true_len(self) -> int:
        """Local tokens that are not padding."""
        return sum(stop - start for start, stop, _, _ in self.local_runs)

    @cached_property
    def chunk_order(self) -> tuple[int, ...] | None:
        """For sequence order: which chunk of the rank-ordered gather stands at each place; None where it already does."""
        return self.orders()[0]

    @cached_property
    def rank_order(self) -> tuple[int, ...] | None:
        """The inverse of `chunk_order`: which chunk in sequence order stands at each place of the rank-ordered layout."""
        return self.orders()[1]

    def orders(self, ranks: tuple[int, ...] | None = None) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """(`chunk_order`, `rank_order`) where the parts of some or all ranks lie behind one another, in this order.

        With some ranks, places and chunks count those that they hold only. (None, None) where the two orders agree.
        """
        return _orders(self, tuple(range(self.cp)) if ranks is None else ranks)

    def merged(self, inner: int) -> Segment:
        """What `inner` neighbouring ranks hold together, as one rank's part of cp / inner, in the order of the sequence."""
        if inner == 1:
            return self
        if inner == self.cp:
            return self.alone()
        groups = [range(first, first + inner) for first in range(0, self.cp, inner)]
        shares = tuple(tuple(sorted(c for r in group for c in self.peer(r).chunks)) for group in groups)
        return replace(self, cp=len(groups), rank=self.rank // inner, order="balanced", shares=shares)

    @cached_property
    def document_positions(self) -> torch.Tensor:
        """Each local token's place in its own document: int64, shape (T,)."""
        return positions_in_document(self.documents, self.positions)

    def peer(self, rank: int) -> Segment:
        """The segment that another rank of the group holds."""
        return replace(self, rank=rank)

    def alone(self) -> Segment:
        """The same sequence held whole by one rank."""
        return replace(self, cp=1, rank=0, shares=())

    @property
    def documents(self) -> tuple[int, ...]:
        """Borders of the documents, 0 first and S last, also where there is only one."""
        return self.edges or (0, self.seq_len)

    def blocks(self, causal: bool, window: int | None = None) -> tuple[Block, ...]:
        """The attention calls of this rank on the gathered sequence; padding is in none of them, as query or as key."""
        mask = make_mask(self.documents, causal=causal, window=window)
        return make_blocks(self.local_runs, self.alone().local_runs, mask, placed=False)

    def reorder(self, x: torch.Tensor, dim: int, order: tuple[int, ...] | None) -> torch.Tensor:
        """Permute the chunks of a gathered tensor along `dim`, by one of `orders`; no copy where that is None."""
        if order is None:
            return x
        chunked = x.unflatten(dim, (len(order), self.chunk_len))
        index = _index(order, x.device) if x.is_cuda else torch.tensor(order, device=x.device)
        return chunked.index_select(dim, index).flatten(dim, dim + 1)


@lru_cache(maxsize=64)
def _index(order: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An order as a tensor on a GPU; kept, since bringing it there would wait for the GPU in every layer."""
    return torch.tensor(order, device=device)


@lru_cache(maxsize=64)
def _orders(segment: Segment, ranks: tuple[int, ...]) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    arriving = [chunk for rank in ranks for chunk in segment.peer(rank).chunks]
    in_order = sorted(range(len(arriving)), key=arriving.__getitem__)
    if in_order == list(range(len(arriving))):
        return None, None
    place = {at: i for i, at in enumerate(in_order)}
    return tuple(in_order), tuple(place[at] for at in range(len(arriving)))


def make_segment(
    seq_len: int,
    *,
    cp: int,
    rank: int,
    order: str = "head_tail",
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Segment:
    """Build the segment of `rank` among `cp` ranks for a sequence of `seq_len` tokens (any length >= 1).

    Args:
        cu_seqlens: borders of packed documents: 0, the end of each, last `seq_len`.
        causal, window: the mask that the balanced order counts work by.

    Raises:
        Refused: an unknown order, a length below 1, a rank outside the group, or borders that do not fit.
    """
    if order not in ORDERS:
        raise refuse("order", order, f"unknown; use {' or '.join(map(repr, ORDERS))}")
    if not isinstance(seq_len, int) or seq_len < 1:
        raise refuse("seq_len", seq_len, "a sequence has at least 1 token; give a whole number >= 1")
    if not 0 <= rank < cp:
        raise refuse("rank", rank, f"outside the group of cp={cp} ranks")
    edges = () if cu_seqlens is None else document_edges(cu_seqlens, seq_len)
    shares: tuple[tuple[int, ...], ...] = ()
    if order == "balanced" and cp > 1:
        shares = balanced_chunks(seq_len, cp, edges or (0, seq_len), causal, window)
    return Segment(seq_len, cp, rank, order, edges, shares)
