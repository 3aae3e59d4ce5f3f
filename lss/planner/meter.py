"""Where a run's peak of memory comes from, measured on its own first steps; and what was short where memory was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lss.comm import Control
from lss.config import Config
from lss.planner.ledger import CLASSES, Ledger, Peak
from lss.planner.remedies import parts, remedies, size
from lss.planner.trace import noted
from lss.train.metrics import reserved_memory_bytes

# The first step makes the optimizer's state, and what is short is short in it already; the second is like all others.
STEPS = 2


class Meter:
    """Takes notes of the first two steps that a process trains, and tells once of the second; see `lss.train.memory`.

    Nothing that is computed changes by it. Compiled code does not tell of its allocations: with train.compile nothing is
    measured.

    Args:
        config: resolved.
        device: that trains.
        control: on which the ranks tell one another their peaks; the one of the rank that takes most is shown.
    """

    def __init__(self, config: Config, device: torch.device, control: Control) -> None:
        self._config, self._device, self._control = config, device, control
        self._step, self._measured, self._told = 0, 0, False
        self._ledger: Ledger | None = None
        self._last: tuple[int, Peak, int] | None = None  # step, peak, what the process held then

    @contextmanager
    def step(self, number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around a step."""
        self._step = number
        if self._measured == STEPS or self._config.train.compile:
            self._ledger = None
            yield
            return
        granularity = 512 if self._device.type == "cuda" else 1  # of CUDA's caching allocator
        self._ledger = ledger = Ledger(granularity, self._config.model.vocab_size)
        with noted(ledger, model, optimizer):
            yield
        self._measured += 1
        self._last = number, ledger.peak(), reserved_memory_bytes(self._device)

    def facts(self, last: bool) -> dict[str, Any] | None:
        """Once, after the second step or the `last`: the peak of the rank that takes most, by class; else None.

        Returns:
            {"rank", "step", "phase", "operation", "bytes", "host", "classes": {class: bytes}}; the class "other" is what
            the process holds beside all tensors. The same on every rank.

        Collectives: one gather of a text, host to host.
        """
        if self._told or self._last is None or not (last or self._measured == STEPS):
            return None
        self._told = True
        step, peak, held = self._last
        beside = held - peak.bytes - (0 if self._device.type == "cuda" else peak.host)
        mine = asdict(peak) | {"step": step, "rank": self._control.rank}
        mine["classes"] = {name: peak.classes[name] for name in CLASSES if name in peak.classes} | {"other": max(0, beside)}
        told = [json.loads(text) for text in self._control.gather(json.dumps(mine))]
        return max(told, key=lambda one: one["bytes"])

    def table(self, facts: dict[str, Any]) -> list[str]:
        """Lines that show `facts`."""
        total = sum(facts["classes"].values())
        head = (f"peak memory of step {facts['step']}, rank {facts['rank']}: {size(total)}, in {facts['phase']} "
                f"({facts['operation'].removesuffix('.default')})")  # fmt: skip
        rows = [*facts["classes"].items(), *([("host", facts["host"])] if facts["host"] else [])]
        meaning = CLASSES | {"other": "what the process holds beside: libraries, caches, kernels' own"}
        return [head, *(f"  {name:<14} {size(count):>12}  {meaning[name]}" for name, count in rows if count)]

    def sentence(self, error: BaseException) -> str:
        """What an out-of-memory error of this rank says: where, what took most, and what would lessen it."""
        shortage = self._ledger.shortage if self._ledger is not None else None
        where = f"in step {self._step}" if self._step else "before step 1"
        if shortage is not None:
            classes, label, where = shortage.classes, shortage.label, f"{where} ({shortage.phase})"
        elif self._last is not None:
            classes, label = self._last[1].classes, ""
        else:
            classes, label = {}, ""
        label = label or max(classes, key=classes.__getitem__, default="activations")
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        held = f", where tensors took {size(sum(classes.values()))} ({parts(classes)})" if classes else ""
        return (f"rank {self._control.rank} ran out of memory {where}{held}; of {label} less is needed with "
                f"{remedies(label, self._config)} ({why}).")  # fmt: skip
