"""Elastic restarts, by torchrun and by the launcher itself, and what neither starts again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.ranks import SMALL

TORCHRUN = Path(sys.executable).with_name("torchrun")


def start(out: Path, *more: str, torchrun: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "lss"]
    if torchrun:
        command = [str(TORCHRUN), "--nproc-per-node=2", "--max-restarts=2", "--rdzv-backend=c10d",
                   "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "lss"]  # fmt: skip
    # in a file, not a pipe: ranks that outlive their launcher would keep a pipe open
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*command, "train", *SMALL, "--out", str(out), *more], stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def said(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def steps(out: Path) -> list[int]:
    try:
        return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def ranks_of(out: Path) -> dict[int, int]:
    """Process ids of the run's ranks, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        mine = [value for value in environ if value.startswith(b"RANK=")]
        if str(out).encode() in command and mine:
            found[int(mine[0][5:])] = int(folder.name)
    return found


def wait_for(process: subprocess.Popen, out: Path, condition, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, said(out)
        assert time.monotonic() < deadline, said(out)
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("torchrun", [True, False], ids=["torchrun", "lss"])
def test_a_killed_rank_is_started_again_and_resumes(tmp_path, torchrun):
    out = tmp_path / "run"
    more = ["train.steps=60", "checkpoint.every=10"]
    more += [] if torchrun else ["--nproc", "2", "--max-restarts", "2"]
    process = start(out, *more, torchrun=torchrun)
    try:
        wait_for(process, out, lambda: len(steps(out)) >= 15)
        os.kill(ranks_of(out)[1], signal.SIGKILL)
        assert process.wait(150) == 0, said(out)
    finally:
        process.kill()
    assert steps(out) == list(range(1, 61))
    assert "from step 1\n" in said(out)
    assert any(f"from step {10 * n + 1}\n" in said(out) for n in range(1, 6)), said(out)
    assert "rank 1 is gone" in said(out)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_rank_told_to_stop_stops_the_launcher_and_is_not_started_again(tmp_path):
    out = tmp_path / "run"
    process = start(out, "train.steps=100000", "--nproc", "2", "--max-restarts", "2")
    try:
        wait_for(process, out, lambda: len(steps(out)) >= 3)
        os.kill(ranks_of(out)[1], signal.SIGTERM)
        assert process.wait(20) == 143, said(out)
    finally:
        process.kill()
    assert said(out).count("stopped by SIGTERM after step") == 1
    assert (out / "checkpoints" / f"step_{len(steps(out))}").is_dir()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    """It hosts the store over which the ranks watch one another."""
    out = tmp_path / "run"
    process = start(out, "train.steps=100000", "checkpoint.every=2", "--nproc", "2")
    wait_for(process, out, lambda: len(steps(out)) >= 3)
    pids = list(ranks_of(out).values())
    assert len(pids) == 2
    process.kill()
    process.wait()
    killed = time.monotonic()
    while ranks_of(out) and time.monotonic() - killed < 30:
        time.sleep(0.05)
    try:
        assert time.monotonic() - killed <= 10, said(out)
    finally:
        for pid in ranks_of(out).values():
            os.kill(pid, signal.SIGKILL)
    sentences = {line for line in said(out).splitlines() if line.startswith("lss: ")}
    assert len(sentences) == 1, said(out)
    sentence = sentences.pop()
    assert "rendezvous store" in sentence
    assert "the launcher hosts" in sentence
    assert "the newest save is step_" in sentence
