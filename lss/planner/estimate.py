"""Whether a step will fit, before it is taken."""

from __future__ import annotations

import math

import torch

from lss.config import Config
from lss.config.errors import refuse
from lss.planner.curve import Curve, curve_of
from lss.planner.drawn import SHORT, Drawn, Traces, by_depth, draw, drawn_out
from lss.planner.host_room import again_share, room_of, with_all_room, within, without_room
from lss.planner.ledger import Peak
from lss.planner.remedies import parts, remedies, size
from lss.tiled import LOGITS_BYTES, PART_OF_GPU, tile_budget
from lss.train.memory import host_state_bytes, sequence_bytes, state_bytes


def step_drawn(
    config: Config, *, device: torch.device | None = None, granularity: int = 1, memory: int | None = None,
    ranks_per_node: int | None = None, traces: Traces | None = None, host: float = math.inf,
) -> Drawn:
    """A step of rank 0, drawn out from short traces of two and three blocks.

    Tensors are those of a CPU, whose attention kernel's own buffers are counted where the device is another. Packed
    documents are taken for one text. No process group may be there.

    Args:
        config: resolved.
        device: of the run, whose size bounds its tiles; by default a CPU.
        granularity: bytes that an allocation is rounded up to.
        memory: bytes of a GPU that is not here, in place of `device`.
        ranks_per_node: neighbours that share a host; all by default.
        traces: those that earlier plans took.
        host: bytes of host memory for each device that is not here; of one that is, "auto" is taken for enough.

    Raises:
        Refused: what the layout refuses.
    """
    logits, kernel = _logits(config, device, memory), _kernel(device, memory)

    def drawn(config: Config) -> Drawn:
        return draw(config, logits, granularity=granularity, ranks_per_node=ranks_per_node, kernel=kernel, traces=traces)

    return within(config, room_of(config, host), drawn)


def curve_drawn(
    config: Config, *, device: torch.device | None = None, granularity: int = 1, memory: int | None = None,
    ranks_per_node: int | None = None, traces: Traces | None = None, host: float = math.inf,
) -> Curve:  # fmt: skip
    """Memory over the moments of the step that `step_drawn` draws, by the same arguments and from the same traces.

    Raises:
        Refused: what the layout refuses; a length of which only the peak is drawn out, see `Drawn.ledger`; or host memory
            without room for all that is kept there.
    """
    logits, kernel, room = _logits(config, device, memory), _kernel(device, memory), room_of(config, host)

    steps, rounds = by_depth(
        with_all_room(config), logits, granularity=granularity, ranks_per_node=ranks_per_node, kernel=kernel, traces=traces
    )
    if room is not None and (again_share(config, room) or without_room(config, room, drawn_out(steps, rounds))):
        fit = f"host memory of {size(room)} has no room for all that is kept there, of which blocks differ"
        raise refuse("memory.offload_gib", config.memory.offload_gib, f"{fit}; plan without a picture, or give more")
    ledgers = [step.ledger for step in steps if step.ledger is not None]
    if len(ledgers) < len(steps):
        assert isinstance(config.parallel.cp, int)
        why = "two short lengths, of which its moments would be drawn out, do not make the same allocations"
        up_to = 2 * SHORT * config.parallel.cp
        raise refuse("data.seq_len", config.data.seq_len, f"{why}; up to {up_to:,} they are traced as they are")
    return curve_of(ledgers, rounds)


def _logits(config: Config, device: torch.device | None, memory: int | None) -> int:
    """Bytes of a tile's logits."""
    tiles, V = config.memory.tiles, config.model.vocab_size
    budget = tile_budget(device or torch.device("cpu"), LOGITS_BYTES)
    budget = budget if memory is None else min(LOGITS_BYTES, memory // PART_OF_GPU)
    return 4 * V * tiles if isinstance(tiles, int) else budget


def _kernel(device: torch.device | None, memory: int | None) -> str:
    return "auto" if memory is None and (device is None or device.type == "cpu") else "traced"


def estimate(config: Config, *, device: torch.device | None = None, granularity: int = 1) -> Peak:
    """The peak of `step_drawn`."""
    return step_drawn(config, device=device, granularity=granularity).peak


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
