"""A step of any length, depth and number of ranks, from a few short traces of it.

Depth is counted in blocks, or in rounds of blocks of several kinds.

A trace at full length would take as many operations as there are tiles. So two short lengths are traced, and what grows is
drawn out to the run's own length: each allocation, after which the moment of most bytes is looked for, the FLOPs of matrix
products and the bytes of collectives. All grow linearly. What blocks add is the difference of the models of two and three.
Ranks beyond many are drawn out likewise from fewer, with as many tokens each.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lss.comm.counter import Tally
from lss.config import Config
from lss.context_parallel import count_head_chunks, count_inner, count_token_chunks, pick_regather
from lss.offload.saved import EARLY_BYTES, LATE_BYTES, LEAST_BYTES
from lss.planner.curve import curve_of
from lss.planner.fakes import QuickFakes
from lss.planner.ledger import Ledger, Peak, stretch
from lss.planner.trace import StepTrace
from lss.planner.tracers import Request, Tracers
from lss.tiled import HIDDEN_BYTES, PROJECTED_BYTES
from lss.train.steps import parameter_dtype

# Tokens a rank of the shorter trace; the longer one has twice as many.
SHORT = 1024
# Tiles of a trace at most for the logits, whose bytes are known, and for all else; and runs of tokens that are gathered.
# Their number does not grow with the length.
TILES, MOST_TILES, RUNS = 8, 64, 2
# What is exchanged, and gathered, is a line over the ranks, as many tokens a rank given. More ranks than these are drawn out
# from fewer: of a ring, whose every hop is traced, from two small ones; else from so many hosts. Where keys come in runs of
# tokens, of which each has parts of every rank's, a trace takes time for each part, and so many hosts stand for more.
MANY_IN_RING, RINGS = 16, (4, 8)
MANY_HOSTS, HOSTS = 128, (32, 64)
IN_RUNS = 2
_KEYS, _GATHERED = ("kv", "dkv"), "gathered keys"

_Call = tuple[str, str, "str | None"]
_Calls = dict[_Call, Tally]


@dataclass(frozen=True)
class Drawn:
    """What a rank does in a step.

    Attributes:
        peak: the moment of most memory.
        products: FLOPs of matrix products.
        collectives: calls, elements and bytes by (kind, purpose, link).
        ledger: all allocations; None where not the same ones are made at each length.
    """

    peak: Peak
    products: float
    collectives: _Calls
    ledger: Ledger | None = None

    @classmethod
    def of(cls, trace: StepTrace, ledger: Ledger | None = None) -> Drawn:
        """What was traced, as it is."""
        return cls(ledger.peak() if ledger else trace.peak, float(trace.products), trace.collectives, ledger)

    @property
    def payload(self) -> dict[str, int]:
        """Bytes of collectives by purpose."""
        return self._by_purpose(lambda tally: tally.bytes)

    @property
    def calls(self) -> dict[str, int]:
        """Numbers of collectives by purpose."""
        return self._by_purpose(lambda tally: tally.calls)

    def _by_purpose(self, of: Callable[[Tally], int]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for (_, purpose, _), tally in self.collectives.items():
            found[purpose] += of(tally)
        return dict(found)


class Traces:
    """Takes traces and keeps them: plans that differ in the sequence's length alone are drawn from the same ones.

    Args:
        tracers: processes that take them; by default this one does.
    """

    def __init__(self, tracers: Tracers | None = None) -> None:
        self._taken: dict[str, tuple[Ledger, StepTrace]] = {}
        self._fakes, self._tracers = QuickFakes(), tracers

    def ask(
        self, config: Config, granularity: int, ranks_per_node: int | None, most_logits: int,
        stands_for: tuple[int, int] | None = None,
    ) -> Callable[[], Drawn]:  # fmt: skip
        """Have a step traced; what is returned waits for it, and gives it with its ledger."""
        request = Request(config, granularity, ranks_per_node, stands_for)
        key = repr(request)
        if self._tracers is not None and key not in self._taken:
            self._tracers.ask(key, request)

        def found() -> Drawn:
            if key not in self._taken:
                beside = self._tracers.result(key) if self._tracers is not None else None
                self._taken[key] = beside or request.take(self._fakes)
            ledger, trace = self._taken[key]
            ledger.most_logits = most_logits  # which is by the run's length
            return Drawn.of(trace, ledger)

        return found


@dataclass(frozen=True)
class _Way:
    """How traces are taken, as of `draw`."""

    logits: int
    granularity: int
    ranks_per_node: int | None
    traces: Traces


def draw(
    config: Config, logits: int, *, granularity: int = 1, ranks_per_node: int | None = None, kernel: str = "auto",
    traces: Traces | None = None,
) -> Drawn:
    """A step of rank 0. Packed documents are taken for one text. No process group may be there.

    Args:
        config: resolved.
        logits: bytes of a tile's logits.
        granularity: bytes that an allocation is rounded up to.
        ranks_per_node: neighbours that share a host; all by default.
        kernel: of attention: "traced" stands for that of a GPU.
        traces: those that earlier plans took.

    Raises:
        Refused: what the layout refuses.
    """
    steps, rounds = by_depth(
        config, logits, granularity=granularity, ranks_per_node=ranks_per_node, kernel=kernel, traces=traces
    )
    return drawn_out(steps, rounds)


def drawn_out(steps: list[Drawn], rounds: float) -> Drawn:
    """The step that those of `by_depth` make."""
    if len(steps) == 1:
        return steps[0]
    few, more = steps

    def whole(a: int, b: int) -> int:
        return round(a + max(0, b - a) * rounds)

    host = whole(few.peak.host, more.peak.host)
    if few.ledger is not None and more.ledger is not None:
        peak = replace(curve_of((few.ledger, more.ledger), rounds).highest(), host=host)
    else:  # the peaks themselves are drawn out
        classes = _by_name(whole, few.peak.classes, more.peak.classes)
        peak = replace(more.peak, bytes=whole(few.peak.bytes, more.peak.bytes), classes=classes, host=host)
    products = few.products + (more.products - few.products) * rounds
    return Drawn(peak, products, by_call(whole, few.collectives, more.collectives))


def by_depth(
    config: Config, logits: int, *, granularity: int = 1, ranks_per_node: int | None = None, kernel: str = "auto",
    traces: Traces | None = None,
) -> tuple[list[Drawn], float]:  # fmt: skip
    """The steps that `draw` draws out, which takes the same arguments.

    Returns:
        the steps of models of two rounds of blocks and of three, or of the model itself where it has no more than two; and
        how many rounds it has beyond two.
    """
    way, blocks = _Way(logits, granularity, ranks_per_node, traces or Traces()), config.model.n_layers
    config = replace(
        config,
        data=replace(config.data, packing=False),
        parallel=replace(config.parallel, kernel=kernel, transport="auto", regather=_regathers(config, kernel)),
    )

    def of_blocks(count: int) -> Callable[[], Drawn]:
        return _of_ranks(replace(config, model=replace(config.model, n_layers=count)), way)

    # layers of several kinds come again after so many; models of whole rounds are compared
    round_of = max(1, len(config.model.layers))
    # of one block alone the peak is elsewhere: nothing of another one is kept while it is computed again
    least = 2 * round_of
    asked = [of_blocks(min(least, blocks))]
    if blocks > least:
        asked.append(of_blocks(least + round_of))
    return [step() for step in asked], max(0, blocks - least) / round_of


def _by_name(of: Callable[[int, int], int], a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: of(a.get(name, 0), b.get(name, 0)) for name in a | b}


def by_call(of: Callable[[int, int], int], a: _Calls, b: _Calls) -> _Calls:
    """Each number of the collectives of two steps, as `of` has it of theirs."""
    none, found = Tally(), {}
    for call in a | b:
        x, y = a.get(call, none), b.get(call, none)
        found[call] = Tally(of(x.calls, y.calls), of(x.elements, y.elements), of(x.bytes, y.bytes))
    return found


def _of_ranks(config: Config, way: _Way) -> Callable[[], Drawn]:
    """A step with the config's number of blocks; of many ranks drawn out from few. Traces are asked for at once."""
    config, runs = _with_chunks(config, way.ranks_per_node)
    cp, few = config.parallel.cp, _few_ranks(config, way.ranks_per_node)
    assert isinstance(cp, int)
    tokens, steps = -(-config.data.seq_len // cp), []
    for n in few:
        fewer = replace(config, parallel=replace(config.parallel, cp=n), data=replace(config.data, seq_len=n * tokens))
        fewer = config if n == cp else fewer
        steps.append(_of_length(fewer, replace(way, ranks_per_node=way.ranks_per_node and min(way.ranks_per_node, n))))
    if len(few) == 2:
        return lambda: _line(steps[0](), steps[1](), (cp - few[0]) / (few[1] - few[0]), way.logits)
    return lambda: _more_keys(steps[0](), cp / few[0], runs, config.parallel.regather is True)


def _few_ranks(config: Config, ranks_per_node: int | None) -> tuple[int] | tuple[int, int]:
    """The number or the two numbers of ranks that stand for the config's, where those are too many to trace; else itself."""
    parallel, cp = config.parallel, config.parallel.cp
    assert isinstance(cp, int)
    if parallel.fsdp:  # each rank's share of the weights shrinks
        return (cp,)
    if parallel.strategy == "ring":
        return RINGS if cp > MANY_IN_RING else (cp,)
    if not ranks_per_node or cp % ranks_per_node:
        return (cp,)
    if parallel.strategy == "lss" and parallel.token_chunks != 1:
        return (min(cp, IN_RUNS * ranks_per_node),)
    few = HOSTS[0] * ranks_per_node, HOSTS[1] * ranks_per_node
    uneven = isinstance(parallel.inner, int) and any(n % parallel.inner for n in few)
    return (cp,) if uneven or cp <= MANY_HOSTS * ranks_per_node else few


def count_chunks(config: Config, ranks_per_node: int | None) -> int:
    """How many gathers, one after another, bring a layer's keys: groups of heads by runs of tokens; else 1."""
    model, parallel = config.model, config.parallel
    if not parallel.strategy.startswith("lss"):
        return 1
    config, runs = _with_chunks(config, ranks_per_node)
    heads, traced, cp = config.parallel.head_chunks, config.parallel.token_chunks, parallel.cp
    assert isinstance(heads, int)
    assert isinstance(traced, int)
    assert isinstance(cp, int)
    inner = count_inner(parallel.inner, parallel.strategy, model.n_kv_heads, cp, ranks_per_node or cp)
    return min(heads, -(-model.n_kv_heads // inner)) * round(traced * runs)


def _with_chunks(config: Config, ranks_per_node: int | None) -> tuple[Config, float]:
    """With the head and token chunks that "auto" is at the run's own length, which a short trace would not choose.

    Returns:
        the config, and how many times as many runs of tokens as it says there are, where those are too many to trace.
    """
    parallel, model, cp = config.parallel, config.model, config.parallel.cp
    assert isinstance(cp, int)
    if not parallel.strategy.startswith("lss"):
        return config, 1.0
    keys = _keys_of(config)
    inner = count_inner(parallel.inner, parallel.strategy, model.n_kv_heads, cp, ranks_per_node or cp)
    gathering = cp > 1 and not model.windows and model.kind != "encoder_decoder"
    heads = count_head_chunks(parallel.head_chunks, parallel.strategy, keys, cp, inner, model.n_heads)
    runs = count_token_chunks(parallel.token_chunks, parallel.strategy, keys, cp, gathering)
    traced = min(runs, RUNS)
    return replace(config, parallel=replace(parallel, head_chunks=heads, token_chunks=traced)), runs / traced


def _regathers(config: Config, kernel: str) -> bool:
    """Whether a run of this config gathers keys twice, which a short trace might not choose."""
    parallel = config.parallel
    assert isinstance(parallel.cp, int)
    return pick_regather(parallel.regather, _keys_of(config), parallel.cp, on_gpu=kernel == "traced")


def _keys_of(config: Config) -> torch.Tensor:
    """A tensor without data like the keys of a rank."""
    model, parallel, cp = config.model, config.parallel, config.parallel.cp
    assert isinstance(cp, int)
    rows = config.train.batch_size // config.train.accumulate // parallel.dp
    half = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
    shape = rows, -(-config.data.seq_len // cp), model.n_kv_heads, model.d_model // model.n_heads
    return torch.empty(shape, dtype=half, device="meta")


def _more_keys(step: Drawn, ranks: float, runs: float, regather: bool) -> Drawn:
    """With so many times as many ranks, whose keys are gathered in so many times as many runs of tokens, or kept."""
    held = ranks / runs if regather else ranks
    if ranks == runs == 1.0:
        return step

    def of(tally: Tally) -> Tally:
        return Tally(round(runs * tally.calls), round(ranks * tally.elements), round(ranks * tally.bytes))

    calls = {call: of(tally) if call[1] in _KEYS else tally for call, tally in step.collectives.items()}
    if step.ledger is None:
        classes = dict(step.peak.classes)
        classes[_GATHERED] = round(classes.get(_GATHERED, 0) * held)
        return replace(step, peak=replace(step.peak, bytes=sum(classes.values()), classes=classes), collectives=calls)
    ledger = stretch(step.ledger, step.ledger, 0.0, sys.maxsize)
    ledger.shrink(_GATHERED, held)
    return replace(step, peak=ledger.peak(), ledger=ledger, collectives=calls)


def _of_length(config: Config, way: _Way) -> Callable[[], Drawn]:
    """A step of ranks that are all traced; of a long sequence drawn out from two short ones."""
    cp, length = config.parallel.cp, config.data.seq_len
    assert isinstance(cp, int)
    rows = config.train.batch_size // config.train.accumulate // config.parallel.dp
    short = SHORT
    if config.memory.offload != "none":  # which leaves small tensors where they are
        key_width = config.model.d_model // config.model.n_heads * config.model.n_kv_heads
        short = max(short, -(-LEAST_BYTES // (2 * rows * key_width)))
    # of the products' own dtype, that of them and that of their gradient
    half = 2 if config.train.dtype == "bfloat16" else 4
    most = 2 * min(way.logits, rows * -(-length // cp) * config.model.vocab_size * half) if config.train.compile else 0
    if length <= 2 * short * cp:
        return way.traces.ask(config, way.granularity, way.ranks_per_node, most)
    local, steps = -(-length // cp), []
    tiles, before = _tiles(config, rows, local, way.logits)
    for tokens in (short, 2 * short):
        shorter = replace(
            config,
            data=replace(config.data, seq_len=tokens * cp),
            memory=replace(config.memory, tiles=-(-rows * tokens // tiles)),
        )
        stands_for = -(-tokens // before), _layer_bytes(config, rows * local)
        steps.append(way.traces.ask(shorter, way.granularity, way.ranks_per_node, most, stands_for))
    return lambda: _line(steps[0](), steps[1](), (length / cp - short) / short, way.logits)


def _layer_bytes(config: Config, tokens: int) -> int:
    """What a block keeps in host memory, or the bound below which it comes back as such a block does; 0 for nothing there.

    By bounds and not by bytes, traces serve many lengths.
    """
    model, memory = config.model, config.memory
    if memory.offload == "none":
        return 0
    wide = parameter_dtype(config.train.dtype).itemsize
    half = 2 if config.train.dtype == "bfloat16" else wide
    stream = half if model.residual == "compute" else wide
    of_attention = model.d_model * half + model.n_heads * max(4, half) if memory.checkpointing == "attention" else 0
    kept = tokens * (model.d_model * stream + of_attention)
    return next((bound for bound in (EARLY_BYTES, LATE_BYTES) if kept <= bound), LATE_BYTES + 1)


def _tiles(config: Config, rows: int, tokens: int, logits: int) -> tuple[int, int]:
    """Tiles of the piece after attention and of the loss, and of that before, of a rank with so many tokens.

    Powers of 2, at most as many as there will be but for the logits, whose bytes are bounded apart.
    """
    model, given = config.model, config.memory.tiles
    half = 2 if config.train.dtype == "bfloat16" else parameter_dtype(config.train.dtype).itemsize
    wide = max(4, half)

    def below(number: float, most: int) -> int:
        return 1 << max(0, min(int(number), most)).bit_length() - 1 if number >= 1 else 1

    if isinstance(given, int):
        after = before = tokens / given
    else:
        after = rows * tokens * model.d_mlp * half / min(HIDDEN_BYTES, logits)
        before = rows * tokens * model.d_model * wide / min(PROJECTED_BYTES, logits)
    of_logits = 1
    while of_logits < TILES and rows * tokens * model.vocab_size * 4 > of_logits * logits:
        of_logits *= 2
    return max(of_logits, below(after, MOST_TILES)), below(before, MOST_TILES)


def _line(less: Drawn, more: Drawn, factor: float, logits: int) -> Drawn:
    """The step that lies on the line through two others: at factor 0 the one, at 1 the other."""

    def drawn(a: float, b: float) -> int:
        return round(a + factor * (b - a))

    ledger = None
    try:
        if less.ledger is not None and more.ledger is not None:
            ledger = stretch(less.ledger, more.ledger, factor, logits)
    except ValueError:  # other allocations at one length than at the other
        pass
    if ledger is not None:
        peak = ledger.peak()
    else:  # the peaks themselves are drawn out
        classes = {name: drawn(n, more.peak.classes.get(name, n)) for name, n in less.peak.classes.items()}
        peak = replace(more.peak, bytes=sum(classes.values()), classes=classes, host=drawn(less.peak.host, more.peak.host))
    products = less.products + factor * (more.products - less.products)
    return Drawn(peak, products, by_call(drawn, less.collectives, more.collectives), ledger)
