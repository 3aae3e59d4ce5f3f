"""Runs that are killed at random instants, again and again, end in the bits of the run that is not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from lss.checkpoint import saved_steps, verify
from tests.faults.ranks import Run

KILLS, STEPS, EVERY = 10, 60, 3  # of each run
PATIENCE = 200.0  # seconds, on a machine that does much else
COMMON = [f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=2", "train.log_samples=true",
          "model.dropout=0.1"]  # fmt: skip
RUNS = {
    "cp2": (2, []),
    "cp2-background": (2, ["checkpoint.background=true", "train.dtype=bfloat16"]),
    "cp2-learned": (2, ["model.positions=learned", "train.accumulate=2"]),
}


def slow_saves() -> None:
    """Every write, flush and change of a name takes longer, so that kills find saves in all their states."""
    import lss.checkpoint.files as files

    write, flush, rename, replace = files.write_bytes, os.fsync, Path.rename, os.replace

    def slowly(function, seconds):
        def late(*args):
            time.sleep(seconds)
            return function(*args)

        return late

    files.write_bytes, os.fsync = slowly(write, 0.003), slowly(flush, 0.01)
    Path.rename, os.replace = slowly(rename, 0.03), slowly(replace, 0.03)


def in_a_save(out: Path) -> bool:
    folder = out / "checkpoints"
    return any(folder.glob(".step_*")) or any(folder.glob(".latest.*"))


def kill_once(run: Run, draw: random.Random, aimed: bool) -> bool:
    """Kill one rank or all at a random instant; returns whether a save was under way."""
    out, began = run.out, run.steps()
    if aimed:
        # the second save of this start, or the first
        for _ in range(draw.choice([1, 1, 2])):
            run.wait_for(lambda: not in_a_save(out), PATIENCE)
            run.wait_for(lambda: in_a_save(out), PATIENCE)
        time.sleep(draw.uniform(0, 0.2))
    elif draw.random() < 0.7:
        run.wait_for(lambda: run.steps() not in (0, began), PATIENCE)
        time.sleep(draw.uniform(0, 0.3))
    else:
        time.sleep(draw.uniform(0, 1.5))  # at its start, as it may be
    ranks = range(len(run.processes)) if draw.random() < 0.5 else [draw.randrange(len(run.processes))]
    assert any(process.is_alive() for process in run.processes), run.said()
    for rank in ranks:
        run.signal(rank, signal.SIGKILL)
    during = in_a_save(out)
    run.wait(0.5)  # ranks that live must not make a save of it
    return during


def results(out: Path):
    """(losses, samples, digests of weights and optimizer states) of a run that is complete."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = verify(out / "checkpoints" / f"step_{STEPS}").files
    digests = {name: facts["sha256"] for name, facts in files.items() if name != "state.json"}
    return [(row["step"], row["loss"]) for row in rows], (out / "samples.jsonl").read_text(), digests


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_end_in_the_same_bits(tmp_path, name):
    """Ten kills, four and more of them in saves; after each the newest save verifies and the next start goes on from it."""
    ranks, overrides = RUNS[name]
    straight = Run(tmp_path / "straight", ranks, [*COMMON, *overrides])
    assert straight.wait(PATIENCE) == [0] * ranks, straight.said()
    out, draw, during = tmp_path / "killed", random.Random(name), 0
    for number in range(KILLS):
        run = Run(out, ranks, [*COMMON, *overrides], hook=slow_saves)
        try:
            during += kill_once(run, draw, aimed=number % 2 == 0)
        finally:
            run.end()
        steps = saved_steps(out / "checkpoints")
        for step in steps:
            assert verify(out / "checkpoints" / f"step_{step}").step == step
        assert max(steps, default=0) < STEPS, "the run came to its end before it was killed often enough"
    assert during >= 4, "too few kills fell into saves"
    last = Run(out, ranks, [*COMMON, *overrides])
    assert last.wait(PATIENCE) == [0] * ranks, last.said()
    assert f"from step {max(steps) + 1}" in last.said()
    expected, found = results(tmp_path / "straight"), results(out)
    assert [step for step, _ in found[0]] == list(range(1, STEPS + 1))
    assert found == expected
