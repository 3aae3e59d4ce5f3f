"""Whether a step will fit, before it is taken: traces of a model of two and of three blocks, drawn out to the whole one.

A trace at full length would take as many operations as there are tiles. So two short lengths are traced, and each allocation
is drawn out to the run's own length, along which allocations grow linearly; then the moment of most bytes is looked for.
What blocks add is the difference of the two models.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lss.config import Config
from lss.offload.saved import LEAST_BYTES
from lss.planner.ledger import Ledger, Peak, stretch
from lss.planner.remedies import parts, remedies, size
from lss.planner.trace import trace_step
from lss.tiled import LOGITS_BYTES, PART_OF_GPU, tile_budget
from lss.train.memory import host_state_bytes, sequence_bytes, state_bytes

# Tokens a rank of the shorter trace; the longer one has twice as many.
SHORT = 1024
# Tiles of a trace at most; their number does not grow with the length, and so nor does the trace.
TILES = 8


def estimate(
    config: Config, *, device: torch.device | None = None, granularity: int = 1, memory: int | None = None
) -> Peak:
    """The peak of a step of rank 0, drawn out from short traces of two and three blocks.

    Tensors are those of a CPU, whose attention kernel's own buffers are counted where the device is another. Packed
    documents are taken for one text. No process group may be there.

    Args:
        config: resolved.
        device: of the run, whose size bounds its tiles; by default a CPU.
        granularity: bytes that an allocation is rounded up to.
        memory: bytes of a GPU that is not here, in place of `device`.

    Raises:
        Refused: what the layout refuses.
    """
    blocks = config.model.n_layers
    config = replace(
        config,
        data=replace(config.data, packing=False),
        parallel=replace(config.parallel, kernel="auto", transport="auto"),
    )
    tiles, V = config.memory.tiles, config.model.vocab_size
    budget = tile_budget(device or torch.device("cpu"), LOGITS_BYTES)
    budget = budget if memory is None else min(LOGITS_BYTES, memory // PART_OF_GPU)
    logits = 4 * V * tiles if isinstance(tiles, int) else budget
    # of one block alone the peak is elsewhere: nothing of another one is kept while it is computed again
    few = _of_blocks(config, min(2, blocks), logits, granularity)
    if blocks <= 2:
        return few
    more = _of_blocks(config, 3, logits, granularity)

    def whole(a: int, b: int) -> int:
        return a + max(0, b - a) * (blocks - 2)

    classes = {name: whole(few.classes.get(name, 0), more.classes.get(name, 0)) for name in few.classes | more.classes}
    return Peak(whole(few.bytes, more.bytes), more.phase, more.operation, classes, whole(few.host, more.host))


def _of_blocks(config: Config, blocks: int, logits: int, granularity: int) -> Peak:
    """The same of a model of so many blocks; `logits`: bytes of those of a tile."""
    config = replace(config, model=replace(config.model, n_layers=blocks))
    cp, length = config.parallel.cp, config.data.seq_len
    assert isinstance(cp, int)
    rows = config.train.batch_size // config.train.accumulate // config.parallel.dp
    short = SHORT
    if config.memory.offload != "none":  # which leaves small tensors where they are
        key_width = config.model.d_model // config.model.n_heads * config.model.n_kv_heads
        short = max(short, -(-LEAST_BYTES // (2 * rows * key_width)))
    if length <= 2 * short * cp:
        return trace_step(config, granularity=granularity).peak
    tiles = 1
    while tiles < TILES and rows * length // cp * config.model.vocab_size * 4 > tiles * logits:
        tiles *= 2
    found: list[Ledger] = []
    for tokens in (short, 2 * short):
        ledger = Ledger(granularity, config.model.vocab_size)
        shorter = replace(
            config,
            data=replace(config.data, seq_len=tokens * cp),
            parallel=replace(config.parallel, token_chunks=1 if config.parallel.strategy == "lss" else "auto"),
            memory=replace(config.memory, tiles=-(-rows * tokens // tiles)),
        )
        trace_step(shorter, granularity=granularity, ledger=ledger)
        found.append(ledger)
    factor = (length / cp - short) / short
    try:
        return stretch(found[0], found[1], factor, logits).peak()
    except ValueError:  # chosen otherwise by length: the peaks themselves are drawn out
        less, long = (ledger.peak() for ledger in found)
        classes = {name: round(n + factor * (long.classes.get(name, n) - n)) for name, n in less.classes.items()}
        host = round(less.host + factor * (long.host - less.host))
        return replace(long, bytes=sum(classes.values()), classes=classes, host=host)


def warning(config: Config, there: int, device: torch.device) -> str | None:
    """A sentence where the estimate says that a step will not fit; None where it fits.

    Nothing is traced where far more is there than any such step could take.

    Args:
        there: bytes that the rank may take.
        device: that trains.
    """
    if 2 * _far_above(config) <= there:
        return None
    cuda = device.type == "cuda"
    peak = estimate(config, device=device, granularity=512 if cuda else 1)
    needed = peak.bytes + (0 if cuda else peak.host)
    if needed <= there:
        return None
    label = max(peak.classes, key=peak.classes.__getitem__)
    return (f"a step will hardly fit: by an estimate a rank needs {size(needed)} ({parts(peak.classes)}) and {size(there)} "
            f"are free; of {label} less is needed with {remedies(label, config)}.")  # fmt: skip


def _far_above(config: Config) -> int:
    """Bytes beyond what a step's tensors could come to, by a rough count."""
    model, train = config.model, config.train
    assert isinstance(config.parallel.cp, int)
    tokens = train.batch_size // train.accumulate // config.parallel.dp * -(-config.data.seq_len // config.parallel.cp)
    block = 24 * model.d_model + 8 * model.d_mlp
    wide = min(tokens * model.vocab_size * 8, 2 * LOGITS_BYTES)
    width = 8 if train.dtype == "float64" else 4
    gathered = 8 * config.parallel.cp * model.d_model
    state = state_bytes(config) + host_state_bytes(config)
    return 2 * state + sequence_bytes(config) + tokens * (model.n_layers * block + gathered) * width + 2 * wide
