"""`lss bench scan`: forward and backward of one recurrence, on one device and cut, beside attention of the same width.

A cell is one length. In it the recurrence, full attention up to `attention_upto` tokens, and attention of a window take
turns, on one device and, where there are several ranks, cut. Errors are against float64, at the cell's own length up to
`check_upto` and at that length where it is longer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lss.bench.candidates import ONE_DEVICE, Candidate
from lss.bench.cell import Cell, Run, measure_cells, tokens_at
from lss.bench.plan import CAPS, DTYPES, Heads, sizes_of
from lss.bench.rival import places_of
from lss.bench.rows import Results, Row, full_row, run_facts
from lss.bench.timing import Clock, spread_of
from lss.config.errors import Refused, refuse
from lss.config.support import SCAN_KERNEL_CHOICES
from lss.context_parallel import AttentionOptions, attend, cut_scan
from lss.kernels import Rules, pick_kernel, single_attention
from lss.kernels.scan import single_scan
from lss.kernels.scan_table import pick_scan_kernel
from lss.segment import ORDERS, make_segment

NAMES = ("y", "dq", "dk", "dv", "dg")
SCAN, ATTENTION = "scan", "attention"


@dataclass(frozen=True)
class Sizes:
    """N heads of size H, K groups of them that share q and k of size P; written "32/1x128x64"."""

    N: int
    K: int
    P: int
    H: int

    def __str__(self) -> str:
        return f"{self.N}/{self.K}x{self.P}x{self.H}"

    @staticmethod
    def parse(text: str) -> Sizes:
        """Read "32/1x128x64".

        Raises:
            Refused: other text, or N no multiple of K.
        """
        return Sizes(*sizes_of("--sizes", text, 2, "heads/groups x state x size, 32/1x128x64"))


@dataclass(frozen=True)
class ScanPlan:
    """What to measure.

    Attributes:
        sizes: of the recurrence.
        heads: of attention beside it; N H of both should be one width.
        kernels: of the recurrence, "auto" the one that is chosen.
        window: of windowed attention; 0: none.
        attention_upto: tokens up to which full attention is measured; 0: never.
        only: measure those candidates alone whose name and tokens contain one of these words; all if empty.
        repeat, seconds: as of `AttentionPlan`.
        check_upto: tokens at which results are held to float64 at most.
    """

    lengths: Sequence[int]
    sizes: Sizes
    heads: Heads
    kernels: Sequence[str] = ("auto",)
    orders: Sequence[str] = ("head_tail",)
    window: int = 0
    attention_upto: int = 131072
    dtype: str = "bfloat16"
    batch: int = 1
    repeat: int = 7
    seconds: float = 30.0
    check_upto: int = 4096
    only: Sequence[str] = ()

    def validate(self, ranks: int) -> None:
        """Refuse names that there are not, before any rank is started.

        Raises:
            Refused: naming the option, its value and what there is.
        """
        for option, values, known in (
            ("--kernels", self.kernels, SCAN_KERNEL_CHOICES),
            ("--orders", self.orders, [order for order in ORDERS if order != "balanced"]),
            ("--dtype", [self.dtype], DTYPES),
        ):
            for value in values:
                if value not in known:
                    raise refuse(option, value, f"unknown; use one of {', '.join(known)}")
        ones = {"--repeat": [self.repeat], "--batch": [self.batch], "--check-upto": [self.check_upto]}
        for option, numbers in ({"--lengths": self.lengths} | ones).items():
            if not numbers or min(numbers) < 1:
                raise refuse(option, ",".join(map(str, numbers)), "give whole numbers, 1 or more")
        for option, number in (("--attention-window", self.window), ("--attention-upto", self.attention_upto)):
            if number < 0:
                raise refuse(option, number, "give a number of tokens, or 0 for none")
        short = [length for length in self.lengths if length < ranks]
        if short:
            raise refuse("--lengths", short[0], f"fewer tokens than the {ranks} ranks; give longer sequences")

    @property
    def layers(self) -> dict[str, int]:
        """Layer -> tokens up to which it is measured."""
        layers = {SCAN: max(self.lengths), ATTENTION: self.attention_upto}
        return layers | ({f"{ATTENTION}, window {self.window}": max(self.lengths)} if self.window else {})

    def rules(self, layer: str) -> Rules:
        """Of a layer of attention."""
        return Rules(causal=True, window=None if layer == ATTENTION else self.window)


@dataclass(frozen=True)
class Given:
    """Tensors of some tokens: what is differentiated, the output's gradient, and the tokens' positions (T,)."""

    seq_len: int
    leaves: tuple[torch.Tensor, ...]
    dout: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class LayerCandidate(Candidate):
    """A candidate of one kind of layer.

    Attributes:
        call: (leaves, number of tokens of the whole sequence) -> the output.
    """

    layer: str
    call: Callable[..., torch.Tensor]

    @property
    def name(self) -> str:
        """The layer before what else it is called."""
        return f"{self.layer} {super().name}"


class ScanCell(Cell):
    """All candidates at one length: the data, the truth, and the rows."""

    names = NAMES

    def __init__(self, plan: ScanPlan, tokens: int, clock: Clock, results: Results, facts: Row) -> None:
        super().__init__(plan, tokens, clock, results, facts)
        self.plan = plan
        found = [
            c for layer, upto in plan.layers.items() if tokens <= upto for c in layer_candidates(plan, layer, clock)
        ]
        whole = [c for c in found if c.order == "whole"]
        self.arrange([c for c in found if c.order != "whole"], [c for c in whole if self.wants(c)])
        self._given: dict[tuple[str, str, int], Given] = {}
        self._truth: dict[str, list[torch.Tensor]] = {}

    def wants(self, candidate: Candidate) -> bool:
        """Whether `only` picks it."""
        return not self.plan.only or any(word in f"{candidate.name} {self.tokens}" for word in self.plan.only)

    def identity(self, candidate: Candidate) -> Row:
        """The row that it would give, with nothing measured."""
        assert isinstance(candidate, LayerCandidate)
        one = candidate.order == "whole"
        known = {
            "bench": "scan", "model": candidate.layer, "strategy": candidate.strategy, "kernel": candidate.kernel,
            "order": None if one else candidate.order, "options": {}, "layers": 1, "tokens": self.tokens,
            "batch": self.plan.batch, "dtype": self.plan.dtype,
            "heads": str(self.plan.sizes if candidate.layer == SCAN else self.plan.heads),
        }  # fmt: skip
        return full_row(known | ({"world_size": 1} if one else {}), self.facts)

    # -- data --------------------------------------------------------------------------------------------------------

    def make_data(self) -> None:
        """Random tensors of every layer, and the truth of those that are checked."""
        self._checked = min(self.tokens, self.plan.check_upto)
        for layer in dict.fromkeys(_layered(run).layer for run in self.runs):
            for tokens in {self.tokens, self._checked}:
                self._given[layer, "whole", tokens] = drawn(self.plan, layer, tokens, self.clock.device)
            checked = self._given[layer, "whole", self._checked]
            exact = [x.detach().double().requires_grad_() for x in checked.leaves]
            out = single_scan(*exact) if layer == SCAN else single_attention(*exact, rules=self.plan.rules(layer))
            self._truth[layer] = [out.detach(), *torch.autograd.grad(out, exact, checked.dout.double())]

    def given(self, layer: str, order: str, tokens: int) -> Given:
        """This rank's tokens in this order, cut from the whole; kept, since candidates share them."""
        key = layer, order, tokens
        if key not in self._given:
            whole, comm = self._given[layer, "whole", tokens], self.clock.comm
            places = places_of(order, tokens, comm.size, comm.rank).to(self.clock.device)
            *leaves, dout = (tokens_at(x, places, tokens) for x in (*whole.leaves, whole.dout))
            self._given[key] = Given(tokens, tuple(x.requires_grad_() for x in leaves), dout, places)
        return self._given[key]

    def prepare(self, run: Run) -> None:
        """Give a run its step; where its sequence is too long to be checked, check it on a shorter one."""
        candidate = _layered(run)
        if self._checked < self.tokens:
            shorter = self.given(candidate.layer, candidate.order, self._checked)
            run.sums = self._squared_errors(run, shorter, _step(candidate, shorter)())
        run.step = _step(candidate, self.given(candidate.layer, candidate.order, self.tokens))

    def check(self, run: Run, results: tuple[torch.Tensor, ...]) -> None:
        """Hold results to the truth, where the cell's own length is checked."""
        if self._checked == self.tokens:
            given = self.given(_layered(run).layer, run.candidate.order, self.tokens)
            run.sums = self._squared_errors(run, given, results)

    def _squared_errors(self, run: Run, given: Given, results: tuple[torch.Tensor, ...]) -> list[float]:
        """[||found - exact||^2, ||exact||^2] of each of NAMES over this rank's tokens; 0 and 0 for what is not there."""
        true, sums = given.places < given.seq_len, [0.0] * (2 * len(NAMES))
        for i, (found, exact) in enumerate(zip(results, self._truth[_layered(run).layer], strict=True)):
            mine, wanted = found.detach()[:, true].double(), exact[:, given.places[true]]
            sums[2 * i : 2 * i + 2] = float((mine - wanted).square().sum()), float(wanted.square().sum())
        return sums

    def bound(self, run: Run) -> dict[str, float]:
        """Largest error of each tensor that passes."""
        return dict.fromkeys(NAMES, CAPS[self.plan.dtype])

    # -- rows --------------------------------------------------------------------------------------------------------

    def measured(self, run: Run, ideal: float | None) -> Row:
        """What a row says beside its identity; the ideal is of the same layer."""
        known: Row = {"status": run.status, "ideal_ms": None}
        alike = [r for r in self.runs if _layered(r).layer == _layered(run).layer and r.candidate.order == "whole"]
        whole = [statistics.median(r.times) for r in alike if r.ok and r.times]
        if whole and run.candidate.order != "whole":
            known["ideal_ms"] = round(min(whole) / self.clock.comm.size, 4)
        if run.errors:
            known["error"] = float(f"{max(run.errors.values(), key=lambda e: (e != e, e)):.3e}")
        if not run.ok:
            return known
        ms = statistics.median(run.times)
        return known | run.found | {
            "ms": round(ms, 4), "spread": round(spread_of(run.times), 4), "rounds": len(run.times),
            "tokens_per_s": round(1e3 * self.plan.batch * self.tokens / ms, 1),
        }  # fmt: skip


def _layered(run: Run) -> LayerCandidate:
    """The run's candidate, which is of a kind of layer here."""
    assert isinstance(run.candidate, LayerCandidate)
    return run.candidate


def layer_candidates(plan: ScanPlan, layer: str, clock: Clock) -> list[LayerCandidate]:
    """One device and, where there are several ranks, every order, with each kernel of the recurrence."""
    like = {"dtype": DTYPES[plan.dtype], "device": clock.device}
    s, heads, comm, found = plan.sizes, plan.heads, clock.comm, []
    for choice in plan.kernels if layer == SCAN else ("auto",):
        missing, kernel = None, choice
        try:
            if layer == SCAN:
                q, v = (torch.empty(1, 1, *size, **like) for size in ((s.K, s.P), (s.N, s.H)))
                kernel = pick_scan_kernel(choice, q, v).name
            else:
                features = () if layer == ATTENTION else ("window",)
                kernel = pick_kernel(choice, torch.empty(1, 1, heads.N, heads.H, **like), features).name
        except Refused as refusal:
            missing = str(refusal)
        for order in ("whole", *(plan.orders if comm.size > 1 else ())):
            strategy = ONE_DEVICE if order == "whole" else "lss"
            call = _call(plan, layer, kernel, order, comm)
            candidate = LayerCandidate(strategy, kernel, order, None, missing=missing, layer=layer, call=call)
            if candidate.name not in {c.name for c in found}:
                found.append(candidate)
    return found


def _call(plan: ScanPlan, layer: str, kernel: str, order: str, comm: Any) -> Callable[..., torch.Tensor]:
    """(leaves, tokens of the whole sequence) -> the output."""

    def of(leaves, tokens: int) -> torch.Tensor:
        if order == "whole":
            if layer == SCAN:
                return single_scan(*leaves, kernel=kernel)
            return single_attention(*leaves, rules=plan.rules(layer), kernel=kernel)
        cut = {"segment": make_segment(tokens, cp=comm.size, rank=comm.rank, order=order), "comm": comm}
        if layer == SCAN:
            return cut_scan(*leaves, **cut, kernel=kernel)
        q, k, v = leaves
        return attend(q, k, v, plan.rules(layer), **cut, options=AttentionOptions(kernel=kernel))

    return of


def _step(candidate: LayerCandidate, given: Given) -> Callable[[], tuple[torch.Tensor, ...]]:
    def step() -> tuple[torch.Tensor, ...]:
        out = candidate.call(given.leaves, given.seq_len)
        return out.detach(), *torch.autograd.grad(out, given.leaves, given.dout)

    return step


def drawn(plan: ScanPlan, layer: str, tokens: int, device: torch.device) -> Given:
    """Random tensors of a whole sequence, the same on every rank; heads of a recurrence forget from slowly to at once."""
    generator = torch.Generator(device=device).manual_seed(tokens)
    like = {"dtype": DTYPES[plan.dtype], "device": device, "generator": generator}
    s, h = plan.sizes, plan.heads
    sizes = [(s.K, s.P), (s.K, s.P), (s.N, s.H)] if layer == SCAN else [(h.N, h.H), (h.K, h.H), (h.K, h.H)]
    q, k, v = (torch.randn(plan.batch, tokens, *size, **like) for size in sizes)
    leaves = [q, k, v]
    if layer == SCAN:
        wide = torch.promote_types(q.dtype, torch.float32)
        steps = torch.rand(plan.batch, tokens, s.N, dtype=wide, device=device, generator=generator)
        leaves = [q * s.P**-0.5, k, v, -steps * torch.logspace(-3, 0, s.N, dtype=wide, device=device)]
    dout = torch.randn(plan.batch, tokens, s.N if layer == SCAN else h.N, s.H if layer == SCAN else h.H, **like)
    return Given(tokens, tuple(x.requires_grad_() for x in leaves), dout, torch.arange(tokens, device=device))


def bench_scan(
    plan: ScanPlan, clock: Clock, results: Results, command: str, on_row: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Measure all that the plan wants and the results lack; returns the new rows, the same on every rank.

    Every rank must call, and `results` must read the same file on all of them. `on_row` is called with each row when its
    cell is complete.

    Raises:
        Failed: the ranks fell out of step.
    """
    facts = run_facts(clock.device, clock.comm.size, command)
    cells = (partial(ScanCell, plan, tokens, clock, results, facts) for tokens in plan.lengths)
    return measure_cells(cells, clock, results, on_row)
