"""`lss bench attention`: forward and backward of one layer's causal attention, by every candidate, beside the truth.

A cell is one head shape at one length. In it every candidate takes a first step, whose results are held to
`lss.bench.oracle` and whose bytes and memory are counted; then all take turns, `repeat` rounds of them, so that a
device that warms up or slows down does so for all of them alike. docs/benchmarks.md says how to read the rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from lss.bench import graphs, oracle
from lss.bench.candidates import (
    Candidate,
    Inputs,
    Step,
    StepResults,
    one_device_candidates,
    our_candidates,
    rival_candidates,
)
from lss.bench.plan import CAPS, DTYPES, AttentionPlan, Heads, own_bound
from lss.bench.rival import places_of
from lss.bench.rows import Results, Row, full_row, run_facts
from lss.bench.timing import Clock, spread_of
from lss.comm import count_collectives
from lss.flops import peak_flops

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
    step: Step | None = None
    local_step: Step | None = None
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


class Cell:
    """All candidates at one head shape and length: the data, the truth, the rounds and the rows.

    `graph`: each step is captured as a CUDA graph, and its replay is what is checked and timed.
    """

    def __init__(
        self, plan: AttentionPlan, heads: Heads, tokens: int, rivals: Sequence[Candidate], clock: Clock, results: Results,
        facts: Row, *, graph: bool = False,
    ) -> None:  # fmt: skip
        self.graph = graph
        self.plan, self.heads, self.tokens, self.clock, self.results, self.facts = plan, heads, tokens, clock, results, facts
        comm, device, dtype = clock.comm, clock.device, DTYPES[plan.dtype]
        like = torch.empty(1, 1, 1, 1, dtype=dtype, device=device).expand(plan.batch, tokens, heads.N, heads.H)
        yardsticks = one_device_candidates(plan.kernels, like, plan.yardsticks)
        # NCCL's calls may hang inside a capture, and a ring's did: of graphs there are ours and one device's only
        strategies = [name for name in plan.strategies if name.startswith("lss") or not graph]
        cut = our_candidates(strategies, plan.kernels, plan.orders, plan.options, like, comm)
        cut += [] if graph else rivals
        self.runs = [Run(c, row) for c in cut if plan.wants(c, heads, tokens) and not results.done(row := self._identity(c))]
        rows = {c.name: self._identity(c) for c in yardsticks}
        missing = [c for c in yardsticks if plan.wants(c, heads, tokens) and not results.done(rows[c.name])]
        # yardsticks run wherever anything does, but a second row of the same would say nothing
        if self.runs or missing:
            fresh = {c.name for c in missing}
            self.runs = [Run(c, rows[c.name] if c.name in fresh else None) for c in yardsticks] + self.runs
        self._inputs: dict[str, Inputs] = {}

    def _identity(self, candidate: Candidate) -> Row:
        one = candidate.order == "whole"
        known = {
            "bench": "attention", "strategy": candidate.strategy, "kernel": candidate.kernel, "rival": candidate.rival,
            "order": None if one else candidate.order, "options": candidate.options, "layers": 1, "tokens": self.tokens,
            "batch": self.plan.batch, "heads": str(self.heads), "dtype": self.plan.dtype, "graph": self.graph or None,
        }  # fmt: skip
        return full_row(known | ({"world_size": 1} if one else {}), self.facts)

    # -- data --------------------------------------------------------------------------------------------------------

    def make_data(self) -> None:
        """Random q, k, v and dout, the same on every rank, and the truth of them."""
        plan, device = self.plan, self.clock.device
        generator = torch.Generator(device=device).manual_seed(self.tokens)
        like = {"dtype": DTYPES[plan.dtype], "device": device, "generator": generator}
        N, K, H = self.heads.N, self.heads.K, self.heads.H
        q, k, v, dout = (torch.randn(plan.batch, self.tokens, heads, H, **like) for heads in (N, K, K, N))
        places = torch.arange(self.tokens, device=device)
        for x in (q, k, v):
            x.requires_grad_()
        self._inputs["whole"] = Inputs(self.tokens, q, k, v, dout, places)
        self.truth = oracle.exact(q, k, v, dout, keys_too=self.tokens <= plan.check_upto)

    def inputs(self, order: str) -> Inputs:
        """This rank's tokens in this order, cut from the whole; kept, since candidates of one order share them."""
        if order not in self._inputs:
            whole, comm = self._inputs["whole"], self.clock.comm
            places = places_of(order, self.tokens, comm.size, comm.rank).to(self.clock.device)
            uncut = whole.q_BTNH, whole.k_BTKH, whole.v_BTKH, whole.dout_BTNH
            q, k, v, dout = (_cut(x, places, self.tokens) for x in uncut)
            for x in (q, k, v):
                x.requires_grad_()
            self._inputs[order] = Inputs(self.tokens, q, k, v, dout, places)
        return self._inputs[order]

    # -- first steps -------------------------------------------------------------------------------------------------

    def first_step(self, run: Run) -> None:
        """Prepare a run, take its first step, hold the results to the truth, and count bytes and memory of a second."""
        candidate, identity = run.candidate, self._identity(run.candidate)
        run.status = self._known_failure(candidate, identity) or "ok"
        if not run.ok:
            return
        self.results.begin(identity)
        outside = self._outside_bytes()
        for action in (self._prepare, self._take_first):
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

    def _prepare(self, run: Run) -> None:
        inputs = self.inputs(run.candidate.order)
        assert run.candidate.prepare is not None
        run.step = run.candidate.prepare(inputs)
        run.local_step = run.candidate.without_comm(inputs) if run.candidate.without_comm is not None else None

    def _take_first(self, run: Run) -> None:
        assert run.step is not None
        if self.graph:
            run.step = graphs.captured(run.step)
        self._check(run, run.step())

    def _take_local(self, run: Run) -> None:
        assert run.local_step is not None
        if self.graph:
            run.local_step = graphs.captured(run.local_step)
        run.local_step()

    def _check(self, run: Run, results: StepResults) -> None:
        """Hold results to the truth. No collective: what comes back differs by rank until `_judge`."""
        run.sums = oracle.squared_errors(self.truth, results, self.inputs(run.candidate.order).places)

    def _judge(self, run: Run) -> None:
        """Fail a run whose errors over all ranks are too large. Errors of the last steps count where they are larger."""
        # a sum also where every rank has the whole: the largest of numbers may pass over NaN
        errors = oracle.relative_errors(self.clock.total(run.sums))
        # NaN is worse than any number
        run.errors = {n: e if e != e else max(e, run.errors.get(n, 0.0)) for n, e in errors.items()}
        bound = self.bound(run)
        wrong = [name for name, error in run.errors.items() if not error <= bound[name]]
        if wrong:
            told = ", ".join(f"{name} {run.errors[name]:.2e} above {bound[name]:.2e}" for name in wrong)
            run.status = f"failed: error of {told}"

    def bound(self, run: Run) -> dict[str, float]:
        """Largest error of each tensor that passes."""
        cap, candidate = CAPS[self.plan.dtype], run.candidate
        own = [r for r in self.runs if r.candidate.order == "whole" and r.ok and r.errors]
        own = [r for r in own if r.candidate.kernel == candidate.kernel] or own
        if not candidate.strict or not own or self.plan.dtype in ("float64", "float32"):
            return dict.fromkeys(oracle.NAMES, cap)
        dtype = DTYPES[self.plan.dtype]
        return {name: min(cap, own_bound(name, max(r.errors[name] for r in own), dtype)) for name in oracle.NAMES}

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
                run.rounds = min(self.plan.repeat, max(MIN_ROUNDS, int(1e3 * self.plan.seconds / max(run.estimate, 1e-3))))
        for run in self.runs:
            if run.estimate < LONG_MS:
                self._take_turn(run)
                run.times, run.local_times = [], []
        for number in range(self.plan.repeat):
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
        self.results.begin(self._identity(run.candidate))
        self.clock.barrier()

        def turn() -> None:
            assert run.step is not None
            took, results = self.clock.time(run.step)
            run.times.append(took)
            if last:  # a buffer that is overwritten too early shows after many steps, if at all
                self._check(run, results)

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
        return [run.row | self._measured(run, ideal) for run in self.runs if run.row is not None]

    def _measured(self, run: Run, ideal: float | None) -> Row:
        cut = run.candidate.order != "whole"
        known: Row = {"status": run.status, "ideal_ms": round(ideal, 4) if ideal is not None and cut else None}
        if run.errors:
            known["error"] = float(f"{max(run.errors.values(), key=lambda e: (e != e, e)):.3e}")
        if not run.ok:
            return known
        heads, ms = self.heads, statistics.median(run.times)
        ranks = self.clock.comm.size if cut else 1
        unit = 2.0 * self.plan.batch * heads.N * heads.H * self.tokens**2  # causal forward
        per_second = unit / (1e-3 * ms) / ranks
        peak = peak_flops(self.facts["gpu"]) if self.plan.dtype in ("bfloat16", "float16") else None
        alone = statistics.median(run.local_times) if run.local_times else None
        return known | run.found | {
            "ms": round(ms, 4), "spread": round(spread_of(run.times), 4), "rounds": len(run.times),
            "no_comm_ms": None if alone is None else round(alone, 4), "tflops": float(f"{3.5 * per_second / 1e12:.4g}"),
            "tokens_per_s": round(1e3 * self.plan.batch * self.tokens / ms, 1),
            "mfu": round(3.0 * per_second / peak, 4) if peak else None,
        }  # fmt: skip


def bench_attention(
    plan: AttentionPlan, clock: Clock, results: Results, command: str, on_row: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Measure all that the plan wants and the results lack; returns the new rows, the same on every rank.

    Every rank must call, and `results` must read the same file on all of them. `on_row` is called with each row when its
    cell is complete.

    Raises:
        Failed: the ranks fell out of step.
    """
    facts = run_facts(clock.device, clock.comm.size, command)
    clock.barrier()  # no rank writes before all have read
    rivals = rival_candidates(plan.rivals, clock)
    new: list[Row] = []
    for heads in plan.heads:
        for tokens in plan.lengths:
            for graph in (False, True) if tokens <= plan.graphs_upto else (False,):
                cell = Cell(plan, heads, tokens, rivals, clock, results, facts, graph=graph)
                for row in _measure(cell) if cell.runs else []:
                    results.add(row)
                    on_row(row)
                    new.append(row)
                del cell
                clock.tidy()
    return new


def _measure(cell: Cell) -> list[Row]:
    failure = cell.clock.attempt(cell.make_data)[1]
    for run in cell.runs:
        if failure is None:
            cell.first_step(run)
        else:
            run.status = failure
    cell.take_rounds()
    return cell.rows()


def _cut(x: torch.Tensor, places: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens at these places; 0 at padding, which places at and beyond the end are."""
    part = x.detach().index_select(1, places.clamp(max=tokens - 1))
    return part.masked_fill_((places >= tokens)[:, None, None], 0)
