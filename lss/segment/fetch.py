"""Which keys travel where when no rank needs all of them: windows and packed documents.

Each rank is sent the keys that its queries see, and no others: T + window - 1 with a sliding window over contiguous
segments. Every rank computes the whole plan by itself, so nothing need be agreed on. Index arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lss.segment.blocks import LocalRun, keys_needed
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
