"""A full disk: the run ends or goes on as configured, what was saved before still verifies, and nothing holds the space."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from lss.checkpoint import saved_steps, verify
from tests.checkpoint.jobs import failing_saves
from tests.distributed.pool import pool
from tests.faults.ranks import Run


def saves(out):
    return saved_steps(out / "checkpoints")


def fail(tmp_path, full, *overrides):
    options = ["train.steps=6", "checkpoint.every=2", "checkpoint.keep=9", *overrides]
    return pool(2).run(failing_saves, 2, str(tmp_path / "run"), options, full)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_failed_save_ends_the_run(tmp_path, background):
    results = fail(tmp_path, [4], f"checkpoint.background={background}")
    assert len(set(results)) == 1, "one verdict, one sentence"
    reason, failed = results[0]
    assert failed == 1
    assert "step_4" in reason
    assert "No space left on device" in reason
    assert re.search(r"it needs [\d,]+ bytes and [\d,]+ were free", reason)
    assert reason.endswith(".")
    assert saves(tmp_path / "run") == [2]
    assert verify(tmp_path / "run" / "checkpoints" / "step_2").step == 2
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_2"]


@pytest.mark.parametrize("background", ["false", "true"])
def test_training_goes_on_where_it_is_to(tmp_path, background):
    results = fail(tmp_path, [4], "checkpoint.on_error=continue", f"checkpoint.background={background}")
    assert results == [("", 1)] * 2
    assert saves(tmp_path / "run") == [6, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"]["failed_saves"] == 1


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_failed_last_save_always_ends_in_failure(tmp_path, background):
    results = fail(tmp_path, [2, 6], "checkpoint.on_error=continue", f"checkpoint.background={background}")
    assert {failed for _, failed in results} == {2}
    assert all("step_6" in reason for reason, _ in results)
    assert saves(tmp_path / "run") == [4]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small disk needs root")
    command = [mount, "-t", "tmpfs", "-o", "size=3m", "tmpfs", place]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_is_really_full(small_disk, on_error):
    """Somebody fills the disk between two saves; the command says what was needed and free, and exits with 1."""
    out = small_disk / "run"
    options = ["checkpoint.every=3", f"checkpoint.on_error={on_error}", "checkpoint.keep=1"]
    first = Run(out, 2, ["train.steps=3", *options])
    assert first.wait() == [0, 0], first.said()
    size = sum(p.stat().st_size for p in (out / "checkpoints" / "step_3").iterdir())
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(small_disk).free - size // 2))
    second = Run(out, 2, ["train.steps=9", *options])
    assert second.wait() == [1, 1], second.said()
    said = second.said()
    assert said.count("lss: ") == 1, said
    assert "No space left on device" in said
    assert "it needs" in said
    assert "were free" in said
    assert "Traceback" not in said
    assert second.steps() == (6 if on_error == "stop" else 9)
    assert said.count("saves that failed so far") == (0 if on_error == "stop" else 2)
    assert verify(out / "checkpoints" / "step_3").step == 3
    assert shutil.disk_usage(small_disk).free > size // 2 - (1 << 16), "the failed save's leftovers hold space"
    filler.unlink()
    third = Run(out, 2, ["train.steps=9", *options])
    assert third.wait() == [0, 0], third.said()
    assert saves(out) == [9]
    assert verify(out / "checkpoints" / "step_9").step == 9
