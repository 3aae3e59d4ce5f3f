"""metrics.jsonl: one object a step, whatever stopped the run before."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lss.config import Refused
from lss.train.metrics import KEYS, MetricsWriter, peak_memory_bytes, read_metrics


def row(step, **more):
    return {key: step if key == "step" else 0.5 for key in KEYS} | more


def test_rows_in_order_with_the_fixed_keys_first(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(row(1, eval_loss=2.0))
        # each row is in the file as soon as it is written
        assert read_metrics(tmp_path / "metrics.jsonl")[0]["eval_loss"] == 2.0
        metrics.write(dict(reversed(row(2).items())))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [list(r) for r in rows] == [[*KEYS, "eval_loss"], list(KEYS)]


def test_resume_keeps_rows_up_to_its_step_and_drops_a_torn_line(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(row(step))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    with MetricsWriter(tmp_path, last_step=3) as metrics:
        metrics.write(row(4))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    with MetricsWriter(tmp_path):
        assert read_metrics(path) == []
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(row(1, loss=math.nan, grad_norm=math.inf, mfu=None))
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert json.loads(line)["grad_norm"] is None


@pytest.mark.parametrize("damage", ["[1]", "{}", '{"step": "1"}', "nonsense"])
def test_damage_is_refused_by_line(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n" + damage + "\n")
    with pytest.raises(Refused, match="line 2"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_the_same_numbers_reach_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path) as metrics:
        for step in (1, 2):
            metrics.write(row(step, loss=step / 4, eval_loss=1.5))
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 0.25), (2, 0.5)]
    assert board.Scalars("eval_loss")[0].value == 1.5


def test_peak_memory_is_in_bytes():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = peak_memory_bytes(torch.device("cpu"))
    assert 16 << 20 < before < 64 << 30
    assert after >= before
    assert len(held) == 64 << 20
