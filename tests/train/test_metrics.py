"""metrics.jsonl: one object a step, whatever stopped the run before."""

from __future__ import annotations

import json
import math
import sys

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


DAMAGE = [b"[1]", b"{}", b'{"step": "1"}', b'{"step": true}', b"nonsense", b"", b'{"step": 1, "x": "\xff"}', b"[" * 100_000]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_refused_by_line_and_left_as_it_is(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    data = json.dumps(row(1)).encode() + b"\n" + damage + b'\n{"step": 3, "lo'
    path.write_bytes(data)
    with pytest.raises(Refused, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    with pytest.raises(Refused, match=r"/metrics\.jsonl, line 2"):
        MetricsWriter(tmp_path, last_step=5)
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_kept_rows_are_kept_to_the_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = b'{"step":1,  "loss": 0.10000000000000000001, "note": "caf\xc3\xa9"}\n'
    path.write_bytes(line + b'{"step": 2}\n{"step": 3, "note": "caf\xc3')
    MetricsWriter(tmp_path, last_step=1).close()
    assert path.read_bytes() == line


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be written"):
        MetricsWriter(tmp_path / "none")
    with pytest.raises(Refused, match="cannot be read"):
        read_metrics(tmp_path / "none")


def test_the_same_numbers_reach_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path) as metrics:
        for step in (1, 2):
            metrics.write(row(step, loss=step / 4, eval_loss=1.5))
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 0.25), (2, 0.5)]
    assert board.Scalars("eval_loss")[0].value == 1.5


def test_a_resumed_run_hides_what_it_writes_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last_step, loss in ((1, 0, 0.25), (2, 1, 0.5)):
        with MetricsWriter(tmp_path, last_step=last_step) as metrics:
            for step in range(first, 4):
                metrics.write(row(step, loss=loss))
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 0.5)]


def test_tensorboard_can_be_off_or_missing(tmp_path, monkeypatch, capsys):
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
        metrics.write(row(1))
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricsWriter(tmp_path, last_step=1) as metrics:
        metrics.write(row(2))
    assert "lss-transformer[tensorboard]" in capsys.readouterr().err
    assert not (tmp_path / "tensorboard").exists()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_peak_memory_is_in_bytes():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = peak_memory_bytes(torch.device("cpu"))
    assert 16 << 20 < before < 64 << 30
    assert after >= before
    assert len(held) == 64 << 20
