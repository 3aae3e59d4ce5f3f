"""What a config will take on a kind of device, before there is one: memory by class, seconds a step, and what they are of.

Memory, collectives and the FLOPs of matrix products are read from short traces of the product's own code and drawn out to
the run's length and depth, along which they grow linearly. Scores of attention are counted as `lss.flops` counts them, for
the rank that has most. Rates are the device's (`lss.planner.hardware`). What is not modelled: evaluation, saves, reading
data, a network that others use, and clocks that fall under load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from lss.config import Config
from lss.config.hybrid import attention_layers, state_numbers
from lss.flops import model_flops
from lss.planner.curve import Curve
from lss.planner.drawn import Traces, count_chunks
from lss.planner.estimate import curve_drawn, step_drawn
from lss.planner.exchange import Collectives, seconds_of
from lss.planner.hardware import HOST_BANDWIDTH, Hardware, attention_rate
from lss.planner.host_room import again_share, room_of
from lss.planner.ledger import Peak
from lss.segment import make_segment
from lss.segment.documents import scores_seen
from lss.train.memory import host_state_bytes
from lss.train.models import find_model

# A part of a gather that is not hidden behind attention where transfers are staged: the keys that the first call waits for.
FIRST_STAGE = 0.25
GRANULARITY = 512  # of CUDA's caching allocator
_SUMMED = ("gradients", "parameters")
_WAITED = ("loss", "gradient norm")  # numbers of a few bytes, that all ranks wait for
_KEYS = ("kv", "dkv")


@dataclass(frozen=True)
class Plan:
    """What one rank does in a step.

    Attributes:
        peak: memory, as of `estimate`; `room`: bytes of the device.
        seconds: by part: "attention" (of the mean rank), "bubbles" (in which others wait for the rank that has most of it),
            "matrices", "exchange" (what attention does not hide), "gradients" (summing that backward does not hide),
            "offload" (copies to the host and back that nothing hides), "update".
        payload: bytes of collectives by purpose.
        calls: how many they are, by purpose.
        flat: seconds of the exchange of keys, had it been in one stage over all hosts.
        staged: seconds of that exchange as it is, hidden or not.
        flops: model FLOPs of the whole step, all ranks, by which MFU is told.
        tokens: of a step, all ranks.
        ranks: of the run.
    """

    peak: Peak
    room: int
    seconds: dict[str, float]
    payload: dict[str, int]
    flops: float
    tokens: int
    ranks: int
    hardware: Hardware
    calls: dict[str, int] = field(default_factory=dict)
    flat: float = 0.0
    staged: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory, and its part of the host's."""
        return self.peak.bytes <= self.room and self.peak.host <= self.hardware.host

    @property
    def step(self) -> float:
        """Seconds a step."""
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak of all devices."""
        return self.flops / self.step / self.ranks / self.hardware.peak


def make_plan(config: Config, hardware: Hardware, traces: Traces | None = None) -> Plan:
    """The plan of a config, resolved for its number of ranks, on this hardware.

    Args:
        traces: those that earlier plans took, for this one's to be kept with.

    Raises:
        Refused: what the layout refuses.
    """
    config = replace(config, data=replace(config.data, packing=False))
    per_host = min(hardware.per_host, _ranks(config))
    step = step_drawn(
        config, granularity=1 if hardware.cpu else GRANULARITY, memory=None if hardware.cpu else int(hardware.memory),
        ranks_per_node=per_host, traces=traces, host=_host(hardware),
    )
    peak, calls, cp = step.peak, step.collectives, config.parallel.cp
    assert isinstance(cp, int)
    attention = attention_seconds(config, hardware)
    mean = attention / cp / _largest_share(config)
    seconds = {"attention": mean, "matrices": step.products / hardware.matrices, "bubbles": max(0.0, attention - mean)}
    seconds["exchange"] = _exposed(config, hardware, calls, attention)
    seconds["gradients"] = _summing(config, hardware, calls, sum(seconds.values()))
    seconds["offload"] = max(0.0, _copied(config, peak) / hardware.host_link - sum(seconds.values()))
    seconds["update"] = _update(config, hardware, peak, per_host)
    tokens = config.train.batch_size * config.data.seq_len
    flat, staged = (seconds_of(hardware, calls, cp, _KEYS.__contains__, flat=flat) for flat in (True, False))
    return Plan(peak, int(hardware.memory), seconds, step.payload, _model_flops(config), tokens, _ranks(config), hardware,
                step.calls, flat, staged)  # fmt: skip


def plan_curve(config: Config, hardware: Hardware, traces: Traces | None = None) -> Curve:
    """Memory over the moments of the step that `make_plan` plans, which takes the same arguments.

    Raises:
        Refused: as of `lss.planner.estimate.curve_drawn`.
    """
    config = replace(config, data=replace(config.data, packing=False))
    per_host = min(hardware.per_host, _ranks(config))
    return curve_drawn(
        config, granularity=GRANULARITY, memory=int(hardware.memory), ranks_per_node=per_host, traces=traces,
        host=_host(hardware),
    )


def attention_seconds(config: Config, hardware: Hardware) -> float:
    """Seconds of a step's scores and values of the rank that has most; no trace is needed."""
    again = 1.0 if config.memory.checkpointing == "full" else again_share(config, room_of(config, _host(hardware)))
    return _attention_flops(config, again) / attention_rate(hardware, _head_size(config), config.data.seq_len)


def _ranks(config: Config) -> int:
    assert isinstance(config.parallel.cp, int)
    return config.parallel.cp * config.parallel.dp


def _host(hardware: Hardware) -> float:
    """Bytes of host memory beside a device's own: a CPU, which has none, is given what is asked for, and does not fit."""
    return math.inf if hardware.cpu else hardware.host


def _head_size(config: Config) -> int:
    return config.model.d_model // config.model.n_heads


def _rows(config: Config) -> int:
    return config.train.batch_size // config.parallel.dp


def _model_flops(config: Config) -> float:
    rows, matrices = config.train.batch_size, find_model(config).matrix_parameters
    states = state_numbers(config.model)
    return model_flops(matrices, config.model.d_model, config.data.seq_len, rows, rows * _scores(config), states)


def _scores(config: Config) -> float:
    """Visible scores of one head of a sequence, all layers, a causal square as half of one."""
    model, S = config.model, config.data.seq_len
    causal = model.kind != "encoder"
    attending = attention_layers(model)
    scores = scores_seen((0, S), causal, model.windows, attending)
    return scores - (len(attending) * S / 2 if causal and not model.windows else 0)


def _attention_flops(config: Config, again: float) -> float:
    """Forward and backward of the rank that has most, and once more forward of the part of blocks that computes it again."""
    units = 3.5 + again
    # a score of one head is 2 H in Q K^T and 2 H in P V
    return units * 4 * config.model.d_model * _scores(config) * _largest_share(config) * _rows(config)


def _largest_share(config: Config) -> float:
    """The part of a sequence's scores that the rank with most of them computes; 1 / cp where all have as many."""
    cp, S = config.parallel.cp, config.data.seq_len
    assert isinstance(cp, int)
    share = 1.0 / cp
    if config.parallel.strategy == "ulysses":  # a head is computed whole
        share = math.ceil(config.model.n_heads / cp) / config.model.n_heads
    if config.parallel.order == "contiguous" and config.parallel.strategy.startswith("lss") and not config.model.windows:
        last = make_segment(S, cp=cp, rank=cp - 1, order="contiguous").positions
        share = float((last.clamp(max=S - 1) + 1).sum()) / (S * (S + 1) / 2)
    return share


def _exposed(config: Config, hardware: Hardware, calls: Collectives, attention: float) -> float:
    """Seconds of the exchange of keys that attention does not hide, and of all else that is exchanged for attention."""
    cp, strategy = config.parallel.cp, config.parallel.strategy
    assert isinstance(cp, int)
    if strategy == "tp" or strategy == "ulysses":  # what waits for it is computed next
        return seconds_of(hardware, calls, cp, lambda purpose: purpose not in (*_SUMMED, *_WAITED))
    other = seconds_of(hardware, calls, cp, lambda purpose: purpose not in (*_SUMMED, *_WAITED, *_KEYS))
    seconds = seconds_of(hardware, calls, cp, _KEYS.__contains__)
    if strategy == "ring":  # the first segment is the rank's own; of gradients the last hop is home, with nothing beside it
        first = seconds_of(hardware, calls, cp, "dkv".__eq__) / cp
    else:
        chunks = count_chunks(config, min(hardware.per_host, _ranks(config)))
        first = seconds * (FIRST_STAGE if cp <= hardware.per_host else 1.0) / chunks
    return other + first + max(0.0, seconds - first - attention)


def _copied(config: Config, peak: Peak) -> int:
    """Bytes of activations that go to the host and come back, twice those that it holds."""
    return 2 * max(0, peak.host - host_state_bytes(config)) if config.memory.offload != "none" else 0


def _update(config: Config, hardware: Hardware, peak: Peak, per_host: int) -> float:
    """Seconds of the update: weights, gradients and both moments are read, and all but the gradients written."""
    if config.memory.optimizer == "device":
        state = sum(peak.classes.get(name, 0) for name in ("weights", "optimizer", "gradients"))
        return 2 * state / hardware.bandwidth
    # gradients go one way while weights come the other, and both while the host, which its ranks share, updates
    weights = peak.classes.get("weights", 0)
    return max(weights / hardware.host_link, 7 * weights * per_host / HOST_BANDWIDTH)


def _summing(config: Config, hardware: Hardware, calls: Collectives, computing: float) -> float:
    """Seconds in which gradients are summed and backward, two thirds of a step, does not hide it."""
    ranks = _ranks(config)
    summed = seconds_of(hardware, calls, ranks, _SUMMED.__contains__)
    return max(0.0, summed - computing * 2 / 3) + seconds_of(hardware, calls, ranks, _WAITED.__contains__)
