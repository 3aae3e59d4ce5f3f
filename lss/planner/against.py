"""A plan beside the run that was planned: what a step was to take, and what it took."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lss.config import Config
from lss.planner.hardware import HARDWARE, Hardware
from lss.planner.plan import Plan, make_plan
from lss.planner.remedies import size

# Steps of a process before one is typical: the first compiles and makes the optimizer's state, two are taken notes of.
TYPICAL = 3
# How far a plan may be off before it is worth a warning.
OFF = 0.15


def known_hardware(name: str, memory: int, per_host: int) -> Hardware | None:
    """The hardware of a device of this name, with the memory and neighbours that it has; None where no rates are known."""
    for key, hardware in HARDWARE.items():
        if key in name.lower().replace(" ", ""):
            return replace(hardware, memory=float(memory), per_host=per_host)
    return None


def plan_of_run(config: Config, hardware: Hardware | None) -> Plan | None:
    """The plan of a run on this hardware; None for what is not planned: other devices, models of transformers, packed
    documents, two attentions.

    No process group may be there.
    """
    if hardware is None or config.model.hf or config.data.packing or config.model.kind == "encoder_decoder":
        return None
    return make_plan(config, hardware)


class Against:
    """Tells once, of the third step that a process trains, what was planned and what came."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._steps = plan, 0

    def __call__(self, row: dict[str, Any]) -> list[str]:
        """Lines to print after a step, of whose row of metrics `step_time_s` and `peak_memory_bytes` are read."""
        self._steps += 1
        if self._steps != TYPICAL:
            return []
        plan, took, peak = self._plan, row["step_time_s"], row["peak_memory_bytes"]
        time_off, memory_off = took / plan.step - 1, peak / plan.peak.bytes - 1
        lines = [f"plan: {plan.step:.3g} s a step, took {took:.3g} ({time_off:+.0%}); {size(plan.peak.bytes)} at the peak, "
                 f"took {size(peak)} ({memory_off:+.0%})"]  # fmt: skip
        if abs(time_off) > OFF:
            part = max(plan.seconds, key=plan.seconds.__getitem__)
            lines.append(f"warning: the step's time is {time_off:+.0%} off its plan, whose largest part is {part} "
                         f"({plan.seconds[part]:.3g} s); rates are of {plan.hardware.name}, "
                         f"{'measured' if plan.hardware.measured else 'by its data sheet'}")  # fmt: skip
        if abs(memory_off) > OFF:
            label = max(plan.peak.classes, key=plan.peak.classes.__getitem__)
            lines.append(f"warning: the peak of memory is {memory_off:+.0%} off its plan, whose largest class is {label} "
                         f"({size(plan.peak.classes[label])})")  # fmt: skip
        return lines
