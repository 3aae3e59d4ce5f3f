"""Which keys travel where when no rank needs all of them: windows and packed documents.

Each rank is sent the keys that its queries see, and no others: T + window - 1 with a sliding window over contiguous
segments. Every rank computes the whole plan by itself, so nothing need be agreed on. Index arithmetic only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from lss.segment.blocks import LocalRun, keys_needed, make_blocks, rooms_of
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


Pieces = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Push:
    """One rank's part of an exchange by writing into the other ranks' memory; keys in the order of the sequence.

    Gradients are computed into one or two *rooms*, each with a place for every fetched token: where two kernel calls see
    the same key, each writes into a room of its own, and the owner adds up what all rooms of all ranks hold.

    Attributes:
        sends: for each rank, (start, stop, at): this rank's tokens [start, stop) go to places [at, ...) of its buffer.
        runs: this rank's buffer, as `LocalRun`s.
        lengths: tokens in each rank's buffer; `length` in this one's.
        local_len: tokens that this rank holds.
        firsts: for each rank, how much of its buffer its first call reads; the rest may come while that one computes.
        returns: for each room and rank, (at, start, stop): places [at, ...) of the room are that one's tokens [start, stop).
        slots: for each room, where its gradients come to lie on the ranks that own the tokens; `n_slots` in all.
        sums: (start, stop, first, end): tokens [start, stop) get gradients in slots [first, end), and nowhere else; None
            where those are not neighbours somewhere, or there are too many pieces.
    """

    sends: tuple[Pieces, ...]
    runs: tuple[LocalRun, ...]
    lengths: tuple[int, ...]
    length: int
    local_len: int
    firsts: tuple[int, ...]
    returns: tuple[tuple[Pieces, ...], ...]
    slots: tuple[int, ...]
    n_slots: int
    sums: tuple[tuple[int, int, int, int], ...] | None


# More pieces than this are summed at once, absent senders as zeros, instead of one launch each.
MOST_SUMS = 16


@lru_cache(maxsize=64)
def plan_push(queries: Segment, keys: Segment, masks: tuple[Mask, ...], placed: bool = True, apart: bool = False) -> Push:
    """This rank's part of an exchange in which each rank gets the keys that its queries see, and no others.

    Args:
        placed: as in `make_blocks`.
        apart: calls that see the same key write into rooms of their own, where every rank's can (`Plan.apart`).
    """
    plan = plan_all(queries, keys, masks, placed)
    apart = apart and plan.apart
    mine, local = keys.rank, keys.local_runs
    sends = tuple(_placed(local, need) for need in plan.needs)
    held = [_placed(keys.peer(rank).local_runs, plan.needs[mine]) for rank in range(keys.cp)]
    rooms = [plan.covered[rank] if apart else (((0, plan.lengths[rank]),),) for rank in range(keys.cp)]
    returns = tuple(tuple(_within(pieces, room) for pieces in held) for room in rooms[mine])
    # second rooms behind the first ones, last rank first: those who see a token then stand beside one another
    order = [(rank, 0) for rank in range(keys.cp)]
    order += [(rank, 1) for rank in reversed(range(keys.cp)) if len(rooms[rank]) > 1]
    filled = [tuple((a, b, at) for at, a, b in _within(sends[rank], rooms[rank][room])) for rank, room in order]
    slots = tuple(order.index((mine, room)) for room in range(len(rooms[mine])))
    firsts = tuple(plan.firsts)
    return Push(sends, plan.runs[mine], plan.lengths, plan.lengths[mine], keys.local_len, firsts, returns,
                slots, len(order), _sums(filled, keys.local_len))  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What all ranks need and compute.

    Attributes:
        needs: the places in the sequence of each rank's keys; `runs` and `lengths` say how they lie in its buffer.
        firsts: how much of its buffer each rank's first call reads.
        covered: for each rank and room, the places of its buffer whose gradients are computed there.
        apart: whether on every rank each call writes its gradients where no other does.
    """

    needs: tuple[tuple[Run, ...], ...]
    runs: tuple[tuple[LocalRun, ...], ...]
    lengths: tuple[int, ...]
    firsts: tuple[int, ...]
    covered: tuple[tuple[tuple[Run, ...], ...], ...]
    apart: bool


@lru_cache(maxsize=64)
def plan_all(queries: Segment, keys: Segment, masks: tuple[Mask, ...], placed: bool = True) -> Plan:
    """What all ranks need and compute, as every rank knows it."""
    peers = [queries.peer(rank) if queries.cp > 1 else queries for rank in range(keys.cp)]
    needs = tuple(keys_needed(peer.local_runs, masks) for peer in peers)
    runs = tuple(_buffer_runs(need) for need in needs)
    lengths = tuple(sum(stop - start for start, stop in need) for need in needs)
    firsts, covered, apart = [], [], len(masks) == 1
    for peer, held, length in zip(peers, runs, lengths, strict=True):
        blocks = make_blocks(peer.local_runs, held, masks[0], placed) if len(masks) == 1 else ()
        rooms = rooms_of(blocks)
        apart = apart and rooms is not None
        firsts.append(blocks[0].k_stop if blocks else length)
        covered.append(tuple(
            merged((b.k_start, b.k_stop) for b, own in zip(blocks, rooms or (), strict=False) if own == room)
            for room in range(max(rooms or (), default=0) + 1)
        ))  # fmt: skip
    return Plan(needs, runs, lengths, tuple(firsts), tuple(covered), apart)


def _buffer_runs(need: tuple[Run, ...]) -> tuple[LocalRun, ...]:
    """Where the needed tokens lie when they stand behind one another."""
    runs, at = [], 0
    for start, stop in need:
        runs.append((at, at + stop - start, start, stop))
        at += stop - start
    return tuple(runs)


def _placed(local_runs: tuple[LocalRun, ...], need: tuple[Run, ...]) -> Pieces:
    """(local start, local stop, place among the needed tokens) of each piece of `need` that lies in these runs."""
    offsets = dict(zip(need, accumulate((b - a for a, b in need), initial=0), strict=False))
    return tuple(
        (local, local + b - a, offsets[run] + a - run[0])
        for run in need
        for local, a, b in _held(local_runs, (run,))
    )


def _within(pieces: Pieces, places: tuple[Run, ...]) -> Pieces:
    """(place, local start, local stop) of what lies at these places of the buffer."""
    found = []
    for start, stop, at in pieces:
        for first, end in places:
            a, b = max(at, first), min(at + stop - start, end)
            if a < b:
                found.append((a, start + a - at, start + b - at))
    return tuple(found)


def _sums(filled: Sequence[Pieces], length: int) -> tuple[tuple[int, int, int, int], ...] | None:
    borders = sorted({0, length, *(x for pieces in filled for a, b, _ in pieces for x in (a, b))})
    if len(borders) - 1 > MOST_SUMS:
        return None
    sums = []
    for a, b in pairwise(borders):
        slots = [slot for slot, pieces in enumerate(filled) if any(c <= a and b <= d for c, d, _ in pieces)]
        if slots and slots != list(range(slots[0], slots[-1] + 1)):
            return None
        sums.append((a, b, slots[0], slots[-1] + 1) if slots else (a, b, 0, 0))
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
