"""What every bench of one layer shares: a cell's first steps, the rounds that its candidates take in turn, and rows.

In a cell every candidate takes a first step, whose results are held to the truth and whose bytes and memory are counted;
then all take turns, `repeat` rounds of them, so that a device that warms up or slows down does so for all of them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from lss.bench import graphs
from lss.bench.candidates import Candidate
from lss.bench.oracle import relative_errors
from lss.bench.rows import Results, Row
from lss.bench.timing import Clock
from lss.comm import count_collectives

# A step of so many milliseconds needs no third warm-up.
LONG_MS = 2000.0
MIN_ROUNDS = 3


@dataclass
class Run:
    """One candidate in one cell: its steps, once it has one, and what was found of it.

    `row` is its identity in the results, None for a yardstick that has its row already.
    """

    candidate: Candidate
    row: Row | None
    status: str = "ok"
    step: Any = None
    local_step: Any = None
    estimate: float = 0.0
    rounds: int = 0
    times: list[float] = field(default_factory=list)
    local_times: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    found: Row = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong so far."""
        return self.status == "ok"


class Measure(Protocol):
    """What a cell asks of a plan: rounds at most; fewer, but 3 at least, where a candidate would take more seconds."""

    @property
    def repeat(self) -> int: ...

    @property
    def seconds(self) -> float: ...


class Cell:
    """Several candidates on the same data: the rounds and the rows. Each bench says what the data and the truth are.

    `graph`: each step is captured as a CUDA graph, and its replay is what is checked and timed.
    """

    # the results of a step, in their order
    names: Sequence[str] = ()

    def __init__(
        self, plan: Measure, tokens: int, clock: Clock, results: Results, facts: Row, *, graph: bool = False
    ) -> None:
        self.graph, self.tokens, self.clock, self.results, self.facts = graph, tokens, clock, results, facts
        self.measure = plan
        self.runs: list[Run] = []

    def arrange(self, cut: Sequence[Candidate], yardsticks: Sequence[Candidate]) -> None:
        """Make a run of each candidate that is wanted and has no row yet, beside the yardsticks."""
        self.runs = [Run(c, row) for c in cut if self.wants(c) and not self.results.done(row := self.identity(c))]
        rows = {c.name: self.identity(c) for c in yardsticks}
        missing = [c for c in yardsticks if self.wants(c) and not self.results.done(rows[c.name])]
        # yardsticks run wherever anything does, but a second row of the same would say nothing
        if self.runs or missing:
            fresh = {c.name for c in missing}
            self.runs = [Run(c, rows[c.name] if c.name in fresh else None) for c in yardsticks] + self.runs

    # -- each bench's own --------------------------------------------------------------------------------------------

    def wants(self, candidate: Candidate) -> bool:
        """Whether the plan wants it."""
        raise NotImplementedError

    def identity(self, candidate: Candidate) -> Row:
        """The row that it would give, with nothing measured."""
        raise NotImplementedError

    def make_data(self) -> None:
        """The data, the same on every rank, and the truth of them."""
        raise NotImplementedError

    def prepare(self, run: Run) -> None:
        """Give a run its steps."""
        raise NotImplementedError

    def check(self, run: Run, results: Any) -> None:
        """Hold results to the truth, in `run.sums`. No collective: what comes back differs by rank until `_judge`."""
        raise NotImplementedError

    def bound(self, run: Run) -> dict[str, float]:
        """Largest error of each of a step's results that passes."""
        raise NotImplementedError

    def measured(self, run: Run, ideal: float | None) -> Row:
        """What a row says beside its identity."""
        raise NotImplementedError

    # -- first steps -------------------------------------------------------------------------------------------------

    def first_step(self, run: Run) -> None:
        """Prepare a run, take its first step, hold the results to the truth, and count bytes and memory of a second."""
        candidate, identity = run.candidate, self.identity(run.candidate)
        run.status = self._known_failure(candidate, identity) or "ok"
        if not run.ok:
            return
        self.results.begin(identity)
        outside = self._outside_bytes()
        for action in (self.prepare, self._take_first):
            if run.ok:
                run.status = self.clock.attempt(partial(action, run))[1] or "ok"
        if run.ok:
            self._judge(run)
        if run.ok:
            run.found["outside_bytes"] = self._outside_bytes(outside)
            run.status = self.clock.attempt(partial(self._count, run))[1] or "ok"
        if run.ok and run.local_step is not None and self.clock.attempt(partial(self._take_local, run))[1] is not None:
            run.local_step = None
        self.clock.tidy()
        self.results.end()

    def _known_failure(self, candidate: Candidate, identity: Row) -> str | None:
        if candidate.missing is not None:
            return f"failed: {candidate.missing}"
        if self.results.killed(identity):
            return "failed: the last two runs ended in one of its steps, where a rank hung or died"
        if candidate.rival is not None and self.tokens % self.clock.comm.size:
            return f"failed: {self.tokens} tokens do not divide over {self.clock.comm.size} ranks"
        return None

    def _take_first(self, run: Run) -> None:
        assert run.step is not None
        if self.graph:
            run.step = graphs.captured(run.step)
        self.check(run, run.step())

    def _take_local(self, run: Run) -> None:
        assert run.local_step is not None
        if self.graph:
            run.local_step = graphs.captured(run.local_step)
        run.local_step()

    def _judge(self, run: Run) -> None:
        """Fail a run whose errors over all ranks are too large. Errors of the last steps count where they are larger."""
        # a sum also where every rank has the whole: the largest of numbers may pass over NaN
        errors = relative_errors(self.clock.total(run.sums), self.names)
        # NaN is worse than any number
        run.errors = {n: e if e != e else max(e, run.errors.get(n, 0.0)) for n, e in errors.items()}
        bound = self.bound(run)
        wrong = [name for name, error in run.errors.items() if not error <= bound[name]]
        if wrong:
            told = ", ".join(f"{name} {run.errors[name]:.2e} above {bound[name]:.2e}" for name in wrong)
            run.status = f"failed: error of {told}"

    def _count(self, run: Run) -> None:
        cuda = self.clock.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        assert run.step is not None
        with count_collectives() as counter:
            run.estimate = self.clock.time(run.step)[0]
        if self.graph:  # its memory is its own for good, and its collectives pass by what counts them
            return
        run.found["peak_bytes"] = torch.cuda.max_memory_allocated() - before if cuda else None
        # a rival's own collectives are not ours to count
        known = run.candidate.rival is None
        run.found |= {"payload_bytes": counter.bytes() if known else None, "calls": counter.calls() if known else None}

    def _outside_bytes(self, before: int | None = 0) -> int | None:
        """Device memory that torch's allocator does not hold (NCCL's and symmetric buffers), and how it grew."""
        if self.clock.device.type != "cuda" or before is None:
            return None
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved() - before

    # -- rounds ------------------------------------------------------------------------------------------------------

    def take_rounds(self) -> None:
        """All that are well take turns: a last warm-up for those that are short, then the rounds that count."""
        for run in self.runs:
            if run.ok:
                run.estimate = self.clock.largest([run.estimate])[0]
                # equal on all ranks, since the estimate is
                affordable = int(1e3 * self.measure.seconds / max(run.estimate, 1e-3))
                run.rounds = min(self.measure.repeat, max(MIN_ROUNDS, affordable))
        for run in self.runs:
            if run.estimate < LONG_MS:
                self._take_turn(run)
                run.times, run.local_times = [], []
        for number in range(self.measure.repeat):
            # each round begins with another one: what a step leaves behind, heat above all, meets them all in turn
            first = number % max(len(self.runs), 1)
            for run in self.runs[first:] + self.runs[:first]:
                if number < run.rounds:
                    self._take_turn(run, last=number + 1 == run.rounds)
        for run in self.runs:
            if run.ok:
                run.times, run.local_times = self.clock.largest(run.times), self.clock.largest(run.local_times)
                self._add_found(run)

    def _take_turn(self, run: Run, *, last: bool = False) -> None:
        if not run.ok:
            return
        self.results.begin(self.identity(run.candidate))
        self.clock.barrier()

        def turn() -> None:
            assert run.step is not None
            took, results = self.clock.time(run.step)
            run.times.append(took)
            if last:  # a buffer that is overwritten too early shows after many steps, if at all
                self.check(run, results)

        run.status = self.clock.attempt(turn)[1] or "ok"
        if run.ok and last:
            self._judge(run)
        if run.ok and run.local_step is not None:
            self.clock.barrier()
            run.local_times.append(self.clock.time(run.local_step)[0])
        self.results.end()

    def _add_found(self, run: Run) -> None:
        """Bytes and calls of the rank that has most."""
        names = [name for name, value in run.found.items() if value is not None]
        most = self.clock.largest([float(run.found[name]) for name in names])
        run.found |= {name: int(value) for name, value in zip(names, most, strict=True)}

    # -- rows --------------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """One row for each run that has none yet."""
        whole = [statistics.median(r.times) for r in self.runs if r.candidate.order == "whole" and r.ok and r.times]
        ideal = min(whole) / self.clock.comm.size if whole else None
        return [run.row | self.measured(run, ideal) for run in self.runs if run.row is not None]

def measure(cell: Cell) -> list[Row]:
    """The rows of a cell. Every rank must call."""
    failure = cell.clock.attempt(cell.make_data)[1]
    for run in cell.runs:
        if failure is None:
            cell.first_step(run)
        else:
            run.status = failure
    cell.take_rounds()
    return cell.rows()


def measure_cells(
    makers: Iterable[Callable[[], Cell]], clock: Clock, results: Results, on_row: Callable[[Row], None]
) -> list[Row]:
    """Make and measure one cell after another and write their rows; returns these, the same on every rank.

    Every rank must call, and `results` must read the same file on all of them. `on_row` is called with each row when its
    cell is complete.

    Raises:
        Failed: the ranks fell out of step.
    """
    clock.barrier()  # no rank writes before all have read
    new: list[Row] = []
    for make in makers:
        cell = make()
        for row in measure(cell) if cell.runs else []:
            results.add(row)
            on_row(row)
            new.append(row)
        del cell  # its memory goes before the next one is made
        clock.tidy()
    return new


def tokens_at(x: torch.Tensor, places_T: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens at these places of x (B, tokens, ...); 0 at padding, which places at and beyond the end are."""
    part = x.detach().index_select(1, places_T.clamp(max=tokens - 1))
    return part.masked_fill_((places_T >= tokens).view(-1, *[1] * (x.dim() - 2)), 0)
