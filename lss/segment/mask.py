"""Who sees whom: causal masks, windows, documents, prefixes and padding as a few rectangles of the score matrix.

Query i (by its place in its sequence) sees key j where both lie in one of the mask's areas, j <= i if that area is
causal, and |i - j| < window if there is one. Index arithmetic only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

from lss.config.errors import refuse

Run = tuple[int, int]  # consecutive places [start, stop)
# Every pair of runs of one row is an area of its own: a mask full of holes is a matter for a mask_mod.
MOST_RUNS = 64


@dataclass(frozen=True)
class Area:
    """Queries [q_start, q_stop) see keys [k_start, k_stop): all, or, causal, those at their own place and before."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool


@dataclass(frozen=True)
class Mask:
    """Areas in the order of their queries, and the window that holds in all of them (None: unbounded)."""

    areas: tuple[Area, ...]
    window: int | None = None

    @cached_property
    def _starts(self) -> list[int]:
        return [area.q_start for area in self.areas]

    @cached_property
    def _reach(self) -> list[int]:
        """How far the areas up to each one reach: areas may lie over one another."""
        reach, furthest = [], 0
        for area in self.areas:
            furthest = max(furthest, area.q_stop)
            reach.append(furthest)
        return reach

    @cached_property
    def merging(self) -> bool:
        """Whether a query meets its keys in several areas, whose results must be merged."""
        return any(before > area.q_start for before, area in zip(self._reach, self.areas[1:], strict=False))

    def areas_of(self, start: int, stop: int) -> Iterator[Area]:
        """The areas that have queries in [start, stop)."""
        first = bisect_right(self._reach, start)
        for number in range(first, len(self.areas)):
            if self._starts[number] >= stop:
                return
            if self.areas[number].q_stop > start:
                yield self.areas[number]

    def keys_of(self, start: int, stop: int) -> Iterator[Run]:
        """The runs of keys that any query in [start, stop) sees, area by area."""
        for area in self.areas_of(start, stop):
            a, b = max(area.q_start, start), min(area.q_stop, stop)
            behind, ahead = reach_of(area, self.window)
            first, end = max(area.k_start, a - behind), min(area.k_stop, b + ahead)
            if first < end:
                yield first, end


def reach_of(area: Area, window: int | None) -> tuple[int, int]:
    """How far behind itself and ahead of itself a query of this area may see."""
    everything = max(area.q_stop, area.k_stop) if window is None else window - 1
    return everything, 0 if area.causal else everything


def merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The union of some runs as rising runs that do not touch."""
    union: list[Run] = []
    for start, stop in sorted(runs):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], stop))
        else:
            union.append((start, stop))
    return tuple(union)


@lru_cache(maxsize=64)
def make_mask(
    edges: Sequence[int],
    *,
    causal: bool,
    window: int | None = None,
    k_edges: Sequence[int] | None = None,
    prefixes: tuple[int, ...] = (),
    keep: tuple[Run, ...] | None = None,
) -> Mask:
    """The mask of one row of a batch.

    Args:
        edges: document borders, 0 first and the length last.
        causal, window: as in `lss.attention`.
        k_edges: borders on the side of the keys where that is another sequence; document d of the queries then sees
            document d of the keys.
        prefixes: for each document, how many tokens at its beginning see each other.
        keep: runs of tokens that are no padding. A padding token is seen by none, and sees none; with `k_edges` it
            holds for the keys.
    """
    areas: list[Area] = []
    for d, (q_doc, k_doc) in enumerate(zip(pairwise(edges), pairwise(k_edges or edges), strict=True)):
        queries = [q_doc] if keep is None or k_edges is not None else _within(keep, q_doc)
        keys = [k_doc] if keep is None else _within(keep, k_doc)
        border = q_doc[0] + (prefixes[d] if prefixes else 0)
        for q_run in queries:
            for part, part_causal in _halves(q_run, border, causal):
                limit = border if causal and not part_causal else k_doc[1]  # nothing of a prefix sees what follows it
                for k_start, k_stop in keys:
                    k_stop = min(k_stop, limit, part[1] if part_causal else k_stop)
                    if k_start < k_stop:
                        areas.append(Area(*part, k_start, k_stop, part_causal))
    return Mask(tuple(sorted(areas, key=lambda a: (a.q_start, a.k_start))), window)


def _within(runs: Iterable[Run], bounds: Run) -> list[Run]:
    cut = [(max(start, bounds[0]), min(stop, bounds[1])) for start, stop in runs]
    return [(start, stop) for start, stop in cut if start < stop]


def _halves(run: Run, border: int, causal: bool) -> list[tuple[Run, bool]]:
    """(queries, whether causal): those before the border see each other whole, those after it as `causal` says."""
    start, stop = run
    halves = [((start, min(stop, border)), False), ((max(start, border), stop), causal)]
    return [half for half in halves if half[0][0] < half[0][1]]


def runs_of(keep_S: torch.Tensor) -> tuple[Run, ...]:
    """The runs of True in one row of a padding mask.

    Raises:
        Refused: more than 64 of them.
    """
    padded = torch.nn.functional.pad(keep_S.to(torch.int8).cpu(), (1, 1))
    change = padded.diff()
    starts, stops = (change > 0).nonzero().flatten().tolist(), (change < 0).nonzero().flatten().tolist()
    if len(starts) > MOST_RUNS:
        fit = f"at most {MOST_RUNS} are computed; give the tokens behind one another, or a mask_mod"
        raise refuse("attention_mask", f"{len(starts)} separate runs of tokens in one row", fit)
    return tuple(zip(starts, stops, strict=True))
