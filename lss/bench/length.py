"""`lss bench length`: the longest sequence whose whole training step fits, by trials that each have processes of their own.

A trial takes steps at one length and tells its peak of memory, or that there was not enough; the search draws a line
through the peaks of two lengths, tries where it meets the memory there is, and halves what is left. The layers of a large
model are alike, so a model cut to a few of them may stand for the whole: of two trials with L1 < L2 layers

    peak(n) = peak(L1) + (n - L1) (peak(L2) - peak(L1)) / (L2 - L1).

That the whole model takes a step at the length found is then to be confirmed by one.

Memory is what tensors take, on a GPU the most that its allocator has given out, within all that it may give. On a CPU a
ledger counts them, and ends a trial that takes more than it may, so that a host is not driven out of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from lss.bench.rival import Rival
from lss.bench.rows import Row
from lss.bench.timing import Clock
from lss.bench.train_step import Step, our_step, rival_entries
from lss.config import Config
from lss.config.errors import Failed

# How often a length that the estimate gives and the whole model has no memory for is shortened, and by what part.
CONFIRMATIONS = 6
SHORTER = 64


@dataclass(frozen=True)
class Trial:
    """What came of steps at one length: `status` as of a row; the largest peak of a rank, the memory that it may take."""

    tokens: int
    status: str
    peak_bytes: int | None = None
    limit_bytes: int | None = None
    ms: float | None = None

    @property
    def ok(self) -> bool:
        """Whether all steps came to their end."""
        return self.status == "ok"


@dataclass(frozen=True)
class Bounds:
    """Where to look.

    Attributes:
        granule: lengths are multiples of it.
        start: the first length that is tried.
        upto: no length beyond it is tried.
    """

    granule: int
    start: int
    upto: int

    def snap(self, tokens: float) -> int:
        """The multiple of the granule at or below, one granule at least."""
        return max(1, int(tokens) // self.granule) * self.granule


@dataclass(frozen=True)
class Found:
    """Where a search ended: the longest that fits, None where nothing does; every trial; why it was broken off."""

    best: Trial | None
    trials: tuple[Trial, ...]
    failure: str | None = None


def longest(attempt: Callable[[int], Trial], bounds: Bounds) -> Found:
    """The longest length at which `attempt` is "ok", where a granule more is "oom" (or beyond the bounds).

    Any other status ends the search.
    """
    trials: list[Trial] = []
    fits: list[Trial] = []
    low, high = 0, bounds.snap(bounds.upto) + bounds.granule
    tokens = min(bounds.snap(bounds.start), high - bounds.granule)
    while high - low > bounds.granule:
        trial = attempt(tokens)
        trials.append(trial)
        if trial.ok:
            low, fits = tokens, sorted([*fits, trial], key=lambda one: one.tokens)
        elif trial.status == "oom":
            high = tokens
        else:
            return Found(fits[-1] if fits else None, tuple(trials), trial.status)
        tokens = _next(fits, low, high, bounds, len(trials))
    return Found(fits[-1] if fits else None, tuple(trials))


def _next(fits: Sequence[Trial], low: int, high: int, bounds: Bounds, tried: int) -> int:
    """The next length to try, between the longest that fits and the shortest that does not."""
    middle = bounds.snap((low + high) / 2) if low else bounds.snap(high / 2)
    told = [one for one in fits if one.peak_bytes is not None]
    if len(told) < 2:
        wanted = 2 * low if low else middle
    else:
        # a line through the two longest; every third time the middle, should peaks not lie on one
        (a, b), limit = told[-2:], told[-1].limit_bytes
        slope = ((b.peak_bytes or 0) - (a.peak_bytes or 0)) / (b.tokens - a.tokens)
        straight = limit is not None and slope > 0 and tried % 3
        wanted = bounds.snap(b.tokens + (limit - (b.peak_bytes or 0)) / slope) if straight else min(middle, 4 * low)  # type: ignore[operator]
    return min(max(wanted, low + bounds.granule), high - bounds.granule)


def of_layers(attempt: Callable[[int, int], Trial], layers: Sequence[int], whole: int) -> Callable[[int], Trial]:
    """Trials of a whole model by those of it cut to so many layers, two or one.

    Args:
        attempt: the trial at (tokens, layers).
        layers: one number, whose trial stands as it is, or two, whose peaks are drawn out.
        whole: layers of the whole model.
    """

    def tried(tokens: int) -> Trial:
        found = []
        for count in layers:
            found.append(attempt(tokens, count))
            if not found[-1].ok:
                return found[-1]
        if len(found) == 1:
            return found[0]
        peak = drawn_out(layers, [one.peak_bytes or 0 for one in found], whole)
        limit = found[-1].limit_bytes
        return Trial(tokens, "ok" if limit is None or peak <= limit else "oom", peak, limit)

    return tried


def drawn_out(layers: Sequence[int], peaks: Sequence[int], whole: int) -> int:
    """The peak of `whole` layers on the line through those of two numbers of layers."""
    (first, second), (a, b) = layers, peaks
    return a + round((whole - first) * (b - a) / (second - first))


def confirm(attempt: Callable[[int], Trial], tokens: int, bounds: Bounds) -> Trial:
    """The whole model's trial at this length, or at the next shorter ones where it has no memory; the last one made."""
    trial = attempt(tokens)
    for _ in range(CONFIRMATIONS):
        shorter = bounds.snap(tokens - max(bounds.granule, tokens / SHORTER))
        if trial.status != "oom" or shorter >= tokens:
            return trial
        tokens = shorter
        trial = attempt(tokens)
    return trial


# -- one trial, inside its own processes ---------------------------------------------------------------------------------


class Counting(AbstractContextManager, Protocol):
    """Counts what tensors take while it is entered, and raises MemoryError at more than it was made for."""

    def peak(self) -> Any:
        """What has `bytes` and `host`, most at any time."""
        ...


def take_steps(
    build: Callable[[], Step], clock: Clock, *, steps: int, memory: int | None, free: int,
    counting: Callable[[int], Counting],
) -> dict[str, Any]:  # fmt: skip
    """Build a step and take it so often; the memory it took, the same on every rank.

    Args:
        memory: bytes that this rank may take; None: all that its GPU has free, or `free` on a CPU.
        counting: makes the count of a CPU's tensors, up to so many bytes.

    Raises:
        MemoryError, torch.OutOfMemoryError: there is not enough.
    """
    if clock.device.type != "cuda":
        limit = memory or free
        with counting(limit) as count:
            step = build()
            for _ in range(steps):
                step()
        peak = count.peak()
        taken, ms = peak.bytes + peak.host, None  # a count takes time, so a time would be none
    else:
        there, total = torch.cuda.mem_get_info()
        limit = min(memory or total, there + torch.cuda.memory_reserved())
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        torch.cuda.reset_peak_memory_stats()
        step = build()
        for _ in range(steps):
            ms, _ = clock.time(step)
        taken = torch.cuda.max_memory_allocated()
    limits = clock.largest([-float(limit)])
    largest = clock.largest([float(taken), ms or 0.0])
    return {"status": "ok", "peak_bytes": int(largest[0]), "limit_bytes": int(-limits[0]), "ms": largest[1] or None}


def step_of(
    config: Config, layers: int, entry: int | None, rivals: Sequence[Rival], clock: Clock,
    mesh_of: Callable[[int, int], DeviceMesh],
) -> Callable[[], Step]:  # fmt: skip
    """What builds the step of a config cut to so many layers: ours, or that of one entry of the rivals.

    Raises:
        Failed: the rival has no such entry, or it cannot run here.
    """
    config = replace(config, model=replace(config.model, n_layers=layers))
    if entry is None:
        return partial(our_step, config, mesh_of, clock.device)
    label, variant, step, missing = rival_entries(rivals, config, clock)[entry]
    if step is None:
        raise Failed(f"{label} {variant or ''}: {missing}.")
    return lambda: step


def length_row(config: Config, found: Found, confirmed: Trial | None, cut: Sequence[int], bytes_of: float | None) -> Row:
    """What a search says in a row.

    Args:
        confirmed: the whole model's own trial, where it was made.
        cut: layers of the trials.
        bytes_of: bytes of the peak by token of a rank and layer.
    """
    best = confirmed or found.best
    whole = list(cut) == [config.model.n_layers]
    if found.failure is not None or best is None or not best.ok:
        status = found.failure or (best.status if best is not None else "oom")
        return {"status": status, "tokens": None, "confirmed": False, "rounds": len(found.trials)}
    return {
        "status": "ok", "tokens": best.tokens, "peak_bytes": best.peak_bytes, "limit_bytes": best.limit_bytes,
        "ms": best.ms, "confirmed": whole or confirmed is not None, "rounds": len(found.trials),
        "token_layer_bytes": None if bytes_of is None else round(bytes_of, 1),
    }  # fmt: skip
