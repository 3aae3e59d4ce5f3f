"""The ranks of the fault tests are the real command."""

from __future__ import annotations

from tests.faults.ranks import Run


def test_a_run_trains_and_resumes(tmp_path):
    first = Run(tmp_path / "run", 2, ["train.steps=3"])
    assert first.wait() == [0, 0], first.said()
    assert first.steps() == 3
    second = Run(tmp_path / "run", 2, ["train.steps=3"])
    assert second.wait() == [0, 0]
    assert "is finished" in second.said()
