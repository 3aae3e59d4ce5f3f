"""Cutting a mask into attention calls: which of a rank's queries meet which of the keys at hand, and how masked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from lss.segment.mask import Area, Mask, Run, merged, reach_of

LocalRun = tuple[int, int, int, int]  # (local start, local stop, global start, global stop)


@dataclass(frozen=True)
class Block:
    """One attention call: queries [q_start, q_stop) of a rank's tokens, keys [k_start, k_stop) of another run of tokens.

    Every query of a block sees at least one of its keys. With n queries and m keys, query i sees key j where

        causal:                    j - i <= m - n
        window = (left, right):    -left <= (j - i) - (m - n) <= right

    both aligned bottom-right; with neither it sees all. `q_place` and `k_place` are the places of the first query and
    the first key in their sequences.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    window: tuple[int, int] | None = None
    q_place: int = 0
    k_place: int = 0


# From more blocks on their launches cost more than their scores, and kernels compute many of them together.
MOST_APART = 3
MOST_ROOMS = 2


@lru_cache(maxsize=64)
def make_blocks(
    q_runs: tuple[LocalRun, ...], k_runs: tuple[LocalRun, ...], mask: Mask, placed: bool = True
) -> tuple[Block, ...]:
    """The calls that cover what the queries of `q_runs` see of the keys of `k_runs`, in the order of the queries.

    Without `placed` the places of a block's queries need not follow one another, which makes fewer calls.
    """
    blocks: list[Block] = []
    for q_run in q_runs:
        for area in mask.areas_of(q_run[2], q_run[3]):
            queries = _clip(q_run, area.q_start, area.q_stop)
            for k_run in k_runs:
                blocks += _visible(queries, _clip(k_run, area.k_start, area.k_stop), area, mask.window)
    return _joined(blocks, placed)


def backward_order(blocks: Sequence[Block]) -> list[int]:
    """The numbers of the blocks as gradients are computed: the one that sees most keys first."""
    return sorted(range(len(blocks)), key=lambda number: blocks[number].k_start - blocks[number].k_stop)


def rooms_of(blocks: Sequence[Block]) -> tuple[int, ...] | None:
    """For each block the room that its dK and dV are written to, so that no two blocks of a room see the same key.

    None where that takes more rooms, or there are more blocks, than are worth it: all then share one room, and add.
    """
    if len(blocks) > MOST_APART:
        return None
    rooms: list[int | None] = [None] * len(blocks)
    for number in backward_order(blocks):
        block = blocks[number]
        taken = {
            rooms[other]
            for other, b in enumerate(blocks)
            if rooms[other] is not None and b.k_start < block.k_stop and block.k_start < b.k_stop
        }
        rooms[number] = next(room for room in range(len(blocks)) if room not in taken)
    found = tuple(room for room in rooms if room is not None)
    return None if max(found, default=0) >= MOST_ROOMS else found


def keys_needed(q_runs: Iterable[LocalRun], masks: Iterable[Mask]) -> tuple[Run, ...]:
    """The places of all keys that these queries see under any of the masks, as rising runs."""
    runs = list(q_runs)
    return merged(keys for mask in masks for run in runs for keys in mask.keys_of(run[2], run[3]))


def _joined(blocks: list[Block], placed: bool) -> tuple[Block, ...]:
    """Neighbouring blocks without a mask that see the same keys, as one: a document without causality, for one."""
    out: list[Block] = []
    for block in blocks:
        last = out[-1] if out else None
        if (
            last is not None
            and not (block.causal or block.window or last.causal or last.window)
            and (last.k_start, last.k_stop, last.q_stop) == (block.k_start, block.k_stop, block.q_start)
            and (not placed or last.q_place + last.q_stop - last.q_start == block.q_place)
        ):
            out[-1] = replace(last, q_stop=block.q_stop)
        else:
            out.append(block)
    return tuple(out)


def _clip(run: LocalRun, first: int, end: int) -> LocalRun:
    """The part of a run that lies in [first, end)."""
    start, stop = max(run[2], first), max(min(run[3], end), max(run[2], first))
    return run[0] + start - run[2], run[0] + stop - run[2], start, stop


def _visible(q_run: LocalRun, k_run: LocalRun, area: Area, window: int | None) -> list[Block]:
    """The block of these queries on these keys, both cut to those that see something; none where nothing is seen.

    Two where the last queries see all keys to their right and the first do not, and that is no window which a kernel can
    be given: cuDNN has none, and torch's flash operator takes one that reaches over as many keys as there are for none at
    all, though more queries than keys are bounded by it.
    """
    (q_local, q_end, a, b), (k_local, _, c, d) = q_run, k_run
    behind, ahead = reach_of(area, window)
    if window is None and not area.causal:  # also where places of queries and keys cannot be compared
        where = (q_local, q_local + b - a, k_local, k_local + d - c)
        return [Block(*where, causal=False, q_place=a, k_place=c)] if a < b and c < d else []
    k_start, k_stop = max(c, a - behind), min(d, b + ahead)
    q_start, q_stop = max(a, c - ahead), min(b, d + behind)
    n, m = q_stop - q_start, k_stop - k_start
    if n <= 0 or m <= 0:
        return []
    # key place - query place = (j - i) - (m - n) - (q_stop - k_stop), which lies in [-behind, ahead]
    left, right = behind - (q_stop - k_stop), ahead + (q_stop - k_stop)
    if 0 < right < n - 1 and (left >= m - 1 or right >= m):
        at = k_stop - ahead  # queries from here on see all keys to their right
        first, rest = (q_local, q_local + at - a, a, at), (q_local + at - a, q_end, at, b)
        return [*_visible(first, k_run, area, window), *_visible(rest, k_run, area, window)]
    where = (q_local + q_start - a, q_local + q_stop - a, k_local + k_start - c, k_local + k_stop - c)
    places = q_start, k_start
    if left >= m - 1 and right >= n - 1:
        return [Block(*where, False, None, *places)]
    if left >= m - 1 and right == 0:
        return [Block(*where, True, None, *places)]
    return [Block(*where, right == 0, (min(left, m + n), min(right, m + n)), *places)]
