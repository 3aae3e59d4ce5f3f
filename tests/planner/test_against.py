"""A plan beside its run: told once, at the third step, with a warning where it is far off."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lss.cli.early import plan_beside
from lss.config import load_config
from lss.planner import HARDWARE, Against, Plan, known_hardware, plan_of_run
from lss.planner.ledger import Peak

GIB = 2**30
PLAN = Plan(
    Peak(10 * GIB, "forward", "", {"activations": 8 * GIB, "weights": 2 * GIB}, 0), 80 * GIB,
    {"attention": 3.0, "matrices": 1.0}, {}, 1e15, 1000, 2, HARDWARE["h100"],
)  # fmt: skip


def row(step: int, seconds: float = 4.0, gib: float = 10.0) -> dict:
    return {"step": step, "step_time_s": seconds, "peak_memory_bytes": int(gib * GIB)}


def test_it_is_told_once_of_the_third_step_of_this_process():
    against = Against(PLAN)
    told = [against(row(step, 4.2)) for step in range(51, 56)]
    assert [len(lines) for lines in told] == [0, 0, 1, 0, 0]
    assert told[2] == ["plan: 4 s a step, took 4.2 (+5%); 10.00 GiB at the peak, took 10.00 GiB (+0%)"]


@pytest.mark.parametrize("seconds, gib, said", [
    (4.61, 10, ["+15% off its plan, whose largest part is attention (3 s)"]),
    (3.3, 10, ["-18% off its plan"]),
    (4.0, 12, ["+20% off its plan, whose largest class is activations (8.00 GiB)"]),
    (8.0, 5, ["+100% off its plan, whose largest part", "-50% off its plan, whose largest class"]),
    (4.59, 11.4, []),
])  # fmt: skip
def test_beyond_fifteen_per_cent_it_warns(seconds, gib, said):
    against = Against(PLAN)
    lines = [against(row(step, seconds, gib)) for step in (1, 2, 3)][2][1:]
    assert len(lines) == len(said)
    for line, words in zip(lines, said, strict=True):
        assert line.startswith("warning: ")
        assert words in line


def test_hardware_is_known_by_the_name_that_the_device_has():
    found = known_hardware("NVIDIA H100 80GB HBM3", 79 * GIB, 2)
    assert found == replace(HARDWARE["h100"], memory=79.0 * GIB, per_host=2)
    assert known_hardware("AMD Instinct MI300X", 1, 8).name == HARDWARE["mi300x"].name
    assert known_hardware("NVIDIA GeForce RTX 3090", 1, 1) is None


SMALL = ["model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.d_mlp=48", "data.seq_len=512"]


def test_what_is_not_planned_is_passed_over():
    config = load_config(None, SMALL).resolved(1)
    assert plan_of_run(config, None) is None
    assert plan_of_run(replace(config, model=replace(config.model, hf="some/model")), HARDWARE["h100"]) is None
    assert plan_of_run(replace(config, data=replace(config.data, packing=True)), HARDWARE["h100"]) is None
    assert plan_of_run(config, HARDWARE["h100"]).step > 0


def test_on_a_cpu_nothing_is_told():
    told = plan_beside(load_config(None, SMALL).resolved(1))
    assert [told(row(step, 400.0)) for step in (1, 2, 3)] == [[], [], []]
