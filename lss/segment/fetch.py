"""Which keys travel where when no rank needs all of them: windows and packed documents.

Each rank is sent the keys that its queries see, and no others: T + window - 1 with a sliding window over contiguous
segments. Every rank computes the whole plan by itself, so nothing need be agreed on. Index arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from lss.segment.blocks import LocalRun, keys_needed, make_blocks
from lss.segment.mask import Mask, Run, merged
from lss.segment.order import Segment


@dataclass(frozen=True)
class Fetch:
    """One rank's part of the exchange.

    Attributes:
        sends: for each rank, the local runs [start, stop) of this rank's tokens whose keys it is sent.
        counts: how many tokens' keys come from each rank, this one's own included.
        pieces: runs of the received buffer (in the order of the ranks) in the order of the sequence.
        runs: the ordered buffer's runs, as `LocalRun`s.
        local_len: tokens that this rank holds.
        sorted: whether the received buffer is in the order of the sequence as it comes.
    """

    sends: tuple[tuple[Run, ...], ...]
    counts: tuple[int, ...]
    pieces: tuple[Run, ...]
    runs: tuple[LocalRun, ...]
    local_len: int
    sorted: bool

    @property
    def length(self) -> int:
        """Tokens whose keys this rank holds after the exchange."""
        return sum(self.counts)


@lru_cache(maxsize=64)
def plan_fetch(queries: Segment, keys: Segment, masks: tuple[Mask, ...]) -> Fetch | None:
    """This rank's part of the exchange of keys; None where all ranks are to gather all keys.

    All are gathered where the mask has neither windows nor documents, and where every rank needs everything anyway.
    """
    if all(mask.window is None and _one_document(mask) for mask in masks):
        return None
    # queries that are whole on every rank need the same keys everywhere
    peers = [queries.peer(rank) if queries.cp > 1 else queries for rank in range(keys.cp)]
    needs = [keys_needed(peer.local_runs, masks) for peer in peers]
    if all(sum(stop - start for start, stop in need) == keys.seq_len for need in needs):
        return None
    mine = needs[keys.rank]
    sends = tuple(
        tuple((local, local + b - a) for local, a, b in _held(keys.local_runs, need)) for need in needs
    )
    counts, pieces, at = [], [], 0
    for rank in range(keys.cp):
        held = _held(keys.peer(rank).local_runs, mine)
        counts.append(sum(b - a for _, a, b in held))
        for _, a, b in held:
            pieces.append((a, b, at))
            at += b - a
    in_order = sorted(pieces)
    runs, at = [], 0
    for start, stop in merged((a, b) for a, b, _ in pieces):
        runs.append((at, at + stop - start, start, stop))
        at += stop - start
    places = tuple((where, where + b - a) for a, b, where in in_order)
    return Fetch(sends, tuple(counts), places, tuple(runs), keys.local_len, in_order == pieces)


@dataclass(frozen=True)
class Push:
    """One rank's part of an exchange by writing into the other ranks' memory; keys in the order of the sequence.

    Attributes:
        sends: for each rank, (start, stop, at): this rank's tokens [start, stop) go to places [at, ...) of its buffer.
        returns: for each rank, (at, start, stop): places [at, ...) of this rank's buffer are that one's tokens [start, stop).
        runs: this rank's buffer, as `LocalRun`s.
        lengths: tokens in each rank's buffer.
        length: tokens in this rank's buffer.
        local_len: tokens that this rank holds.
        firsts: for each rank, how much of its buffer its first call reads; the rest may come while that one computes.
        sums: (start, stop, first, end): tokens [start, stop) are seen by ranks [first, end), which return gradients of
            them; None where they are not neighbours somewhere, or there are too many pieces.
    """

    sends: tuple[tuple[tuple[int, int, int], ...], ...]
    returns: tuple[tuple[tuple[int, int, int], ...], ...]
    runs: tuple[LocalRun, ...]
    lengths: tuple[int, ...]
    length: int
    local_len: int
    firsts: tuple[int, ...]
    sums: tuple[tuple[int, int, int, int], ...] | None


# More pieces than this are summed at once, absent senders as zeros, instead of one launch each.
MOST_SUMS = 16


@lru_cache(maxsize=64)
def plan_push(queries: Segment, keys: Segment, masks: tuple[Mask, ...]) -> Push:
    """This rank's part of an exchange in which each rank gets the keys that its queries see, and no others."""
    peers = [queries.peer(rank) if queries.cp > 1 else queries for rank in range(keys.cp)]
    needs = [keys_needed(peer.local_runs, masks) for peer in peers]
    sends = tuple(_placed(keys.local_runs, need) for need in needs)
    held = (_placed(keys.peer(rank).local_runs, needs[keys.rank]) for rank in range(keys.cp))
    returns = tuple(tuple((at, a, b) for a, b, at in pieces) for pieces in held)
    runs = tuple(_buffer_runs(need) for need in needs)
    lengths = tuple(sum(stop - start for start, stop in need) for need in needs)
    firsts = tuple(
        _first_reach(peer.local_runs, held, masks) if len(masks) == 1 else length
        for peer, held, length in zip(peers, runs, lengths, strict=True)
    )
    mine = keys.rank
    return Push(sends, returns, runs[mine], lengths, lengths[mine], keys.local_len, firsts, _sums(sends, keys.local_len))


def _buffer_runs(need: tuple[Run, ...]) -> tuple[LocalRun, ...]:
    """Where the needed tokens lie when they stand behind one another."""
    runs, at = [], 0
    for start, stop in need:
        runs.append((at, at + stop - start, start, stop))
        at += stop - start
    return tuple(runs)


def _first_reach(queries: tuple[LocalRun, ...], keys: tuple[LocalRun, ...], masks: tuple[Mask, ...]) -> int:
    blocks = make_blocks(queries, keys, masks[0])
    return blocks[0].k_stop if blocks else 0


def _placed(local_runs: tuple[LocalRun, ...], need: tuple[Run, ...]) -> tuple[tuple[int, int, int], ...]:
    """(local start, local stop, place among the needed tokens) of each piece of `need` that lies in these runs."""
    offsets = dict(zip(need, accumulate((b - a for a, b in need), initial=0), strict=False))
    return tuple(
        (local, local + b - a, offsets[run] + a - run[0])
        for run in need
        for local, a, b in _held(local_runs, (run,))
    )


def _sums(sends: tuple[tuple[tuple[int, int, int], ...], ...], length: int) -> tuple[tuple[int, int, int, int], ...] | None:
    borders = sorted({0, length, *(x for pieces in sends for a, b, _ in pieces for x in (a, b))})
    if len(borders) - 1 > MOST_SUMS:
        return None
    sums = []
    for a, b in pairwise(borders):
        ranks = [rank for rank, pieces in enumerate(sends) if any(c <= a and b <= d for c, d, _ in pieces)]
        if ranks and ranks != list(range(ranks[0], ranks[-1] + 1)):
            return None
        sums.append((a, b, ranks[0], ranks[-1] + 1) if ranks else (a, b, 0, 0))
    return tuple(sums)


def _one_document(mask: Mask) -> bool:
    """Whether all areas of a mask that see keys see the same part of the sequence, as far as causality lets them."""
    return len({area.k_start for area in mask.areas}) <= 1


def _held(local_runs: tuple[LocalRun, ...], need: tuple[Run, ...]) -> list[tuple[int, int, int]]:
    """(local start, global start, global stop) of each piece of `need` that lies in these runs, in local order."""
    pieces = []
    for local, _, start, stop in local_runs:
        for first, end in need:
            a, b = max(start, first), min(stop, end)
            if a < b:
                pieces.append((local + a - start, a, b))
    return pieces
