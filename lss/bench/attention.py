"""`lss bench attention`: forward and backward of one layer's causal attention, by every candidate, beside the truth.

A cell is one head shape at one length. In it every candidate takes a first step, whose results are held to
`lss.bench.oracle` and whose bytes and memory are counted; then all take turns, `repeat` rounds of them, so that a
device that warms up or slows down does so for all of them alike. docs/benchmarks.md says how to read the rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from lss.bench import oracle
from lss.bench.candidates import (
    Candidate,
    Inputs,
    StepResults,
    one_device_candidates,
    our_candidates,
    rival_candidates,
)
from lss.bench.cell import Cell, Run, measure_cells, tokens_at
from lss.bench.plan import CAPS, DTYPES, AttentionPlan, Heads, own_bound
from lss.bench.rival import places_of
from lss.bench.rows import Results, Row, full_row, run_facts
from lss.bench.timing import Clock, spread_of
from lss.flops import peak_flops


class AttentionCell(Cell):
    """All candidates at one head shape and length: the data, the truth, the rounds and the rows.

    `graph`: as in `Cell`.
    """

    names = oracle.NAMES

    def __init__(
        self, plan: AttentionPlan, heads: Heads, tokens: int, rivals: Sequence[Candidate], clock: Clock, results: Results,
        facts: Row, *, graph: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(plan, tokens, clock, results, facts, graph=graph)
        self.plan, self.heads = plan, heads
        comm, device, dtype = clock.comm, clock.device, DTYPES[plan.dtype]
        like = torch.empty(1, 1, 1, 1, dtype=dtype, device=device).expand(plan.batch, tokens, heads.N, heads.H)
        yardsticks = one_device_candidates(plan.kernels, like, plan.yardsticks)
        # NCCL's calls may hang inside a capture, and a ring's did: of graphs there are ours and one device's only
        strategies = [name for name in plan.strategies if name.startswith("lss") or not graph]
        cut = our_candidates(strategies, plan.kernels, plan.orders, plan.options, like, comm)
        cut += [] if graph else rivals
        self.arrange(cut, yardsticks)
        self._inputs: dict[str, Inputs] = {}

    def wants(self, candidate: Candidate) -> bool:
        """Whether `only` picks it."""
        return self.plan.wants(candidate, self.heads, self.tokens)

    def identity(self, candidate: Candidate) -> Row:
        """The row that it would give, with nothing measured."""
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
            q, k, v, dout = (tokens_at(x, places, self.tokens) for x in uncut)
            for x in (q, k, v):
                x.requires_grad_()
            self._inputs[order] = Inputs(self.tokens, q, k, v, dout, places)
        return self._inputs[order]

    def prepare(self, run: Run) -> None:
        """Give a run its steps."""
        inputs = self.inputs(run.candidate.order)
        assert run.candidate.prepare is not None
        run.step = run.candidate.prepare(inputs)
        run.local_step = run.candidate.without_comm(inputs) if run.candidate.without_comm is not None else None

    def check(self, run: Run, results: StepResults) -> None:
        """Hold results to the truth. No collective: what comes back differs by rank until `_judge`."""
        run.sums = oracle.squared_errors(self.truth, results, self.inputs(run.candidate.order).places)

    def bound(self, run: Run) -> dict[str, float]:
        """Largest error of each tensor that passes."""
        cap, candidate = CAPS[self.plan.dtype], run.candidate
        own = [r for r in self.runs if r.candidate.order == "whole" and r.ok and r.errors]
        own = [r for r in own if r.candidate.kernel == candidate.kernel] or own
        if not candidate.strict or not own or self.plan.dtype in ("float64", "float32"):
            return dict.fromkeys(oracle.NAMES, cap)
        dtype = DTYPES[self.plan.dtype]
        return {name: min(cap, own_bound(name, max(r.errors[name] for r in own), dtype)) for name in oracle.NAMES}

    def measured(self, run: Run, ideal: float | None) -> Row:
        """What a row says beside its identity."""
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
    rivals = rival_candidates(plan.rivals, clock)
    cells = (
        partial(AttentionCell, plan, heads, tokens, rivals, clock, results, facts, graph=graph)
        for heads in plan.heads
        for tokens in plan.lengths
        for graph in ((False, True) if tokens <= plan.graphs_upto else (False,))
    )
    return measure_cells(cells, clock, results, on_row)
