"""An infinity on one rank: all ranks skip the same step, and stop together after too many."""

from __future__ import annotations

import json

import pytest

from lss.train.metrics import read_metrics
from tests.faults.plants import poison
from tests.faults.ranks import Run


def digests(out, rank):
    lines = (out.parent / f"{out.name}.{rank}.digests").read_text().splitlines()
    return dict(line.split() for line in lines)


@pytest.mark.parametrize("at", ["gradient", "loss"])
def test_one_ranks_infinity_skips_the_step_everywhere(tmp_path, at):
    out = tmp_path / "run"
    environ = {"POISON": json.dumps([2, 4, 5]), "POISON_AT": at}
    options = ["train.steps=7", "train.max_bad_steps=3", "checkpoint.every=5"]
    run = Run(out, 2, options, hook=poison, environ=environ)
    assert run.wait(90) == [0, 0], run.said()
    first, second = digests(out, 0), digests(out, 1)
    assert first == second
    assert first["1"] == first["2"]
    assert first["3"] == first["4"] == first["5"]
    assert len(set(first.values())) == 4
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 2, 3, 3, 3]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False, True, True, False, False]
    # counted in all, through resumes
    (out / "checkpoints" / "step_7").rename(tmp_path / "gone")
    again = Run(out, 2, options, hook=poison, environ=environ)
    assert again.wait(90) == [0, 0], again.said()
    assert [row["skipped"] for row in read_metrics(out / "metrics.jsonl")] == [0, 1, 1, 2, 3, 3, 3]


def test_too_many_in_a_row_end_the_run(tmp_path):
    environ = {"POISON": json.dumps([2, 3, 4, 5, 6]), "POISON_AT": "gradient"}
    run = Run(tmp_path / "run", 2, ["train.steps=9", "train.max_bad_steps=3"], hook=poison, environ=environ)
    assert run.wait(90) == [1, 1], run.said()
    assert run.steps() == 3
    said = run.said()
    assert "not finite in 3 steps in a row, up to step 4" in said
    assert said.count("lss: ") == 1, said  # all ranks know it, and one says it
    assert "train.max_bad_steps" in said
    assert "Traceback" not in said
