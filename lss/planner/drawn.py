"""A step of any length and depth, from four short traces of it: of two and of three blocks (or rounds of blocks of several
kinds), at two lengths each.

A trace at full length would take as many operations as there are tiles. So two short lengths are traced, and what grows is
drawn out to the run's own length: each allocation, after which the moment of most bytes is looked for, the FLOPs of matrix
products and the bytes of collectives. All grow linearly. What blocks add is the difference of the two models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lss.config import Config
from lss.context_parallel import count_head_chunks, count_token_chunks
from lss.offload.saved import LEAST_BYTES
from lss.planner.ledger import Ledger, Peak, stretch
from lss.planner.trace import StepTrace, trace_step

# Tokens a rank of the shorter trace; the longer one has twice as many.
SHORT = 1024
# Tiles of a trace at most; their number does not grow with the length, and so nor does the trace.
TILES = 8


@dataclass(frozen=True)
class Drawn:
    """What a rank does in a step.

    Attributes:
        peak: the moment of most memory.
        products: FLOPs of matrix products.
        payload: bytes of collectives by purpose.
    """

    peak: Peak
    products: float
    payload: dict[str, int]

    @classmethod
    def of(cls, trace: StepTrace) -> Drawn:
        """What was traced, as it is."""
        payload: Counter[str] = Counter()
        for (_, purpose, _), tally in trace.collectives.items():
            payload[purpose] += tally.bytes
        return cls(trace.peak, float(trace.products), dict(payload))


def draw(
    config: Config, logits: int, *, granularity: int = 1, ranks_per_node: int | None = None, kernel: str = "auto"
) -> Drawn:
    """A step of rank 0. Packed documents are taken for one text. No process group may be there.

    Args:
        config: resolved.
        logits: bytes of a tile's logits.
        granularity: bytes that an allocation is rounded up to.
        ranks_per_node: neighbours that share a host; all by default.
        kernel: of attention: "traced" stands for that of a GPU.

    Raises:
        Refused: what the layout refuses.
    """
    blocks = config.model.n_layers
    config = replace(
        config,
        data=replace(config.data, packing=False),
        parallel=replace(config.parallel, kernel=kernel, transport="auto"),
    )

    def of_blocks(count: int) -> Drawn:
        model = replace(config.model, n_layers=count)
        return _of_length(replace(config, model=model), logits, granularity, ranks_per_node)

    # layers of several kinds come again after so many; models of whole rounds are compared
    round_of = max(1, len(config.model.layers))
    # of one block alone the peak is elsewhere: nothing of another one is kept while it is computed again
    least = 2 * round_of
    few = of_blocks(min(least, blocks))
    if blocks <= least:
        return few
    more, rounds = of_blocks(least + round_of), (blocks - least) / round_of

    def whole(a: int, b: int) -> int:
        return round(a + max(0, b - a) * rounds)

    classes = _by_name(whole, few.peak.classes, more.peak.classes)
    peak = replace(more.peak, bytes=whole(few.peak.bytes, more.peak.bytes), classes=classes,
                   host=whole(few.peak.host, more.peak.host))  # fmt: skip
    products = few.products + (more.products - few.products) * rounds
    return Drawn(peak, products, _by_name(whole, few.payload, more.payload))


def _by_name(of: Callable[[int, int], int], a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: of(a.get(name, 0), b.get(name, 0)) for name in a | b}


def _chunks(config: Config, rows: int) -> dict[str, int | str]:
    """The groups of heads and runs of tokens that are gathered one after another at the config's own length."""
    parallel, model = config.parallel, config.model
    if parallel.strategy != "lss":
        return {"token_chunks": "auto"}
    cp = parallel.cp
    assert isinstance(cp, int)
    half = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
    shape = rows, -(-config.data.seq_len // cp), model.n_kv_heads, model.d_model // model.n_heads
    keys, gathering = torch.empty(shape, dtype=half, device="meta"), cp > 1 and not model.windows
    return {"head_chunks": count_head_chunks(parallel.head_chunks, "lss", keys, cp, n_heads=model.n_heads),
            "token_chunks": count_token_chunks(parallel.token_chunks, "lss", keys, cp, gathering)}  # fmt: skip


def _of_length(config: Config, logits: int, granularity: int, ranks_per_node: int | None) -> Drawn:
    """The same of a model that is traced with all its blocks."""
    cp, length = config.parallel.cp, config.data.seq_len
    assert isinstance(cp, int)
    rows = config.train.batch_size // config.train.accumulate // config.parallel.dp
    short = SHORT
    if config.memory.offload != "none":  # which leaves small tensors where they are
        key_width = config.model.d_model // config.model.n_heads * config.model.n_kv_heads
        short = max(short, -(-LEAST_BYTES // (2 * rows * key_width)))
    # of the products' own dtype, that of them and that of their gradient
    half = 2 if config.train.dtype == "bfloat16" else 4
    most = 2 * min(logits, rows * -(-length // cp) * config.model.vocab_size * half) if config.train.compile else 0
    if length <= 2 * short * cp:
        ledger = Ledger(granularity, config.model.vocab_size, most_logits=most)
        return Drawn.of(trace_step(config, granularity=granularity, ranks_per_node=ranks_per_node, ledger=ledger))
    tiles = 1
    while tiles < TILES and rows * length // cp * config.model.vocab_size * 4 > tiles * logits:
        tiles *= 2
    chunks = _chunks(config, rows)
    found: list[tuple[Ledger, Drawn]] = []
    for tokens in (short, 2 * short):
        ledger = Ledger(granularity, config.model.vocab_size, most_logits=most)
        shorter = replace(
            config,
            data=replace(config.data, seq_len=tokens * cp),
            parallel=replace(config.parallel, **chunks),
            memory=replace(config.memory, tiles=-(-rows * tokens // tiles)),
        )
        trace = trace_step(shorter, granularity=granularity, ranks_per_node=ranks_per_node, ledger=ledger)
        found.append((ledger, Drawn.of(trace)))
    (first, less), (second, long) = found
    factor = (length / cp - short) / short

    def drawn(a: float, b: float) -> int:
        return round(a + factor * (b - a))

    try:
        peak = stretch(first, second, factor, logits).peak()
    except ValueError:  # chosen otherwise by length: the peaks themselves are drawn out
        classes = {name: drawn(n, long.peak.classes.get(name, n)) for name, n in less.peak.classes.items()}
        host = round(less.peak.host + factor * (long.peak.host - less.peak.host))
        peak = replace(long.peak, bytes=sum(classes.values()), classes=classes, host=host)
    products = less.products + factor * (long.products - less.products)
    return Drawn(peak, products, _by_name(drawn, less.payload, long.payload))
