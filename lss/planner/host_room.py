"""A bounded room in host memory: what a step computes again for want of it, and what stays on the device.

As a run has it (`lss.parallel.activation`): the inputs of all blocks come first, then attention's outputs, from the first
block on; the blocks behind compute their attention again. What has no room even so stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from lss.config import Config
from lss.offload import host_limit
from lss.parallel.activation import stack_of
from lss.planner.drawn import Drawn, by_call
from lss.train.memory import host_state_bytes
from lss.train.steps import parameter_dtype

AUTO_SHARE = 0.5  # of a device's part of the host's memory: of what is free, as of `lss.offload.host_limit`


def room_of(config: Config, host: float = math.inf) -> int | None:
    """Bytes of host memory that a rank's activations may take; None for no bound: nothing goes there, or the disk is next.

    Args:
        host: bytes of host memory for each device, of which `memory.offload_gib="auto"` is a part.
    """
    if config.memory.offload != "host":
        return None
    gib = config.memory.offload_gib
    if gib != "auto":
        return host_limit(gib, 1)
    return None if math.isinf(host) else int(AUTO_SHARE * host)


def again_share(config: Config, room: int | None) -> float:
    """The part of all blocks that compute their attention again, though `memory.checkpointing` keeps its output."""
    parallel, model = config.parallel, config.model
    if room is None or config.memory.checkpointing != "attention":
        return 0.0
    stack = stack_of(model, parallel.strategy, parallel.regather)
    if stack is None:
        return 0.0
    assert isinstance(parallel.cp, int)
    rows = config.train.batch_size // config.train.accumulate // parallel.dp
    wide = parameter_dtype(config.train.dtype)
    half = torch.bfloat16 if config.train.dtype == "bfloat16" else wide
    shape = rows, -(-config.data.seq_len // parallel.cp), model.d_model
    x = torch.empty(shape, dtype=half if model.residual == "compute" else wide, device="meta")
    return 1.0 - min(stack.outputs_kept(x, room, half), stack.blocks) / stack.blocks


def with_all_room(config: Config) -> Config:
    """As it is traced: "auto" is enough in a trace."""
    return replace(config, memory=replace(config.memory, offload_gib="auto"))


def within(config: Config, room: int | None, draw: Callable[[Config], Drawn]) -> Drawn:
    """The step that `draw` draws with room for all, as it is with this much.

    Collectives, products and what the host holds lie between those of a step that keeps attention's outputs and of one that
    computes all again; the peak is the larger one's.
    """
    step = draw(with_all_room(config))
    share = again_share(config, room)
    if share:
        full = replace(config, memory=replace(config.memory, checkpointing="full"))
        step = _between(step, draw(with_all_room(full)), share)
    stays = without_room(config, room, step)
    if not stays:
        return step
    peak = step.peak
    classes = peak.classes | {"activations": peak.classes.get("activations", 0) + stays}
    classes = dict(sorted(classes.items(), key=lambda one: -one[1]))
    return replace(step, peak=replace(peak, bytes=peak.bytes + stays, host=peak.host - stays, classes=classes), ledger=None)


def without_room(config: Config, room: int | None, step: Drawn) -> int:
    """Bytes of activations that a step would hold in host memory beyond the room."""
    return 0 if room is None else max(0, step.peak.host - host_state_bytes(config) - room)


def _between(a: Drawn, b: Drawn, share: float) -> Drawn:
    """A step of which some blocks are as in `a` and a `share` of them as in `b`; its peak is the larger of theirs."""

    def mixed(x: float, y: float) -> int:
        return round(x + share * (y - x))

    higher = max(a, b, key=lambda one: one.peak.bytes)
    products = a.products + share * (b.products - a.products)
    return Drawn(replace(higher.peak, host=mixed(a.peak.host, b.peak.host)), products,
                 by_call(mixed, a.collectives, b.collectives))  # fmt: skip
