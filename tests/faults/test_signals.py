"""SIGTERM, SIGINT, SIGUSR1 to a rank or to the launcher, at any moment: saved, the right exit status, all gone."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lss.checkpoint import find_checkpoint, read_weights, verify
from tests.faults.plants import plant
from tests.faults.ranks import SMALL, Command, Run
from tests.faults.together import Together

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 20.0


@dataclass(frozen=True)
class Case:
    """A signal, whom it hits (a rank, or the launcher), and when."""

    number: signal.Signals
    target: int | str
    moment: str

    def __str__(self) -> str:
        return f"{self.number.name}-{self.target}-{self.moment}"


CASES = [
    *(Case(number, target, moment) for number in (signal.SIGTERM, signal.SIGINT)
      for target in (0, 1, "launcher") for moment in ("startup", "step", "eval", "save")),
    *(Case(signal.SIGUSR1, target, moment) for target, moment in
      ((0, "step"), (1, "step"), (0, "eval"), (1, "save"), ("launcher", "step"), ("launcher", "save"))),
]  # fmt: skip
PLACES = {"startup": "build", "step": "forward", "eval": "eval", "save": "save"}
STEPS = {True: 20, False: 100_000}


@dataclass
class Outcome:
    """What came of it."""

    codes: list[int | None]
    seconds: float
    said: str
    out: Path


def hit(case: Case, folder: Path) -> Outcome:
    return _hit_launcher(case, folder) if case.target == "launcher" else _hit_rank(case, folder)


def options(case: Case) -> list[str]:
    ends = case.number == signal.SIGUSR1
    moments = {"eval": ["train.eval_every=1", "train.eval_samples=64"], "save": ["checkpoint.every=4"]}
    return [f"train.steps={STEPS[ends]}", *moments.get(case.moment, [])]


def hears(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal; SIGINT has Python's own from the start."""
    try:
        caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    except (OSError, IndexError):
        return False
    return bool(int(caught, 16) >> (number - 1) & 1)


def _hit_rank(case: Case, folder: Path) -> Outcome:
    """Every rank tarries at the moment, and says so by a file."""
    mark = folder / "mark"
    wanted = {"place": PLACES[case.moment], "step": 0 if case.moment == "startup" else 3, "do": "sleep", "seconds": 0.7,
              "mark": str(mark)}  # fmt: skip
    run = Run(folder / "run", 2, options(case), hook=plant, environ={"PLANT": json.dumps(wanted)})
    try:
        run.wait_for(mark.exists, 120)
        time.sleep(0.1)
        run.signal(case.target, case.number)
        run.signal(case.target, case.number)  # two in a row are one
        started = time.monotonic()
        codes = run.wait(60)
        return Outcome(codes, time.monotonic() - started, run.said(), run.out)
    finally:
        run.end()


def _hit_launcher(case: Case, folder: Path) -> Outcome:
    """The real command: its ranks write their steps, and saves are seen while they are written.

    Where it is hit while it imports what it needs it does import it; later it makes no difference, which one case shows.
    """
    out = folder / "run"
    folder.mkdir(parents=True)
    typed = ["train", *SMALL, *options(case), "--nproc", "2", "--out", str(out)]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    whole = case.moment == "startup" or (case.number, case.moment) == (signal.SIGTERM, "step")
    process = Command(typed, folder, environ, fork=not whole)

    def ready() -> bool:
        if case.moment == "startup":
            # from when it hears signals at all, a moment after Python's own start; the other one when ranks are on their way
            return hears(process.pid, case.number) and time.monotonic() - started > 3.0 * (case.number == signal.SIGINT)
        written = (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n")
        return written >= 2 and (case.moment != "save" or any((out / "checkpoints").glob(".step_*")))

    started = time.monotonic()
    while not ready():
        assert process.poll() is None, process.said()
        assert time.monotonic() - started < 120
        time.sleep(0.001)
    os.kill(process.pid, case.number)
    started = time.monotonic()
    ended = process.wait(60)
    return Outcome([ended.returncode], time.monotonic() - started, ended.stdout + ended.stderr, out)


@pytest.fixture(scope="module")
def together(request, tmp_path_factory):
    cases = Together(request, tmp_path_factory.mktemp("signals"), hit, at_once=2)
    yield cases
    cases.end()


def saved_steps(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step_*"))


def assert_whole(path: Path) -> None:
    assert all(weight.isfinite().all() for weight in read_weights(verify(path)).values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_done_is_saved(together, case):
    got = together(case)
    said = got.said
    assert "Traceback" not in said, said
    assert not list((got.out / "checkpoints").glob(".*")) or case.moment == "startup"
    rows = (got.out / "metrics.jsonl").read_bytes().count(b"\n") if (got.out / "metrics.jsonl").exists() else 0
    if case.number == signal.SIGUSR1:
        assert got.codes == [0] * len(got.codes), said
        assert rows == STEPS[True]
        assert said.count("as asked by SIGUSR1") == 1, said
        assert saved_steps(got.out)[-1] == STEPS[True]
        assert_whole(find_checkpoint(got.out / "checkpoints").path)
        return
    code = 128 + case.number
    assert got.codes == [code] * len(got.codes), said
    assert got.seconds < LIMIT
    sentences = {line for line in said.splitlines() if line.startswith("lss: ")}
    assert len(sentences) == 1 or case.moment == "startup", said
    name = case.number.name
    if case.moment == "startup":
        assert sentences
        assert all(name in sentence and "step" in sentence for sentence in sentences), said
        assert rows == 0
        assert not (got.out / "checkpoints").exists()
        return
    newest = find_checkpoint(got.out / "checkpoints").path
    assert_whole(newest)
    assert saved_steps(got.out)[-1] == rows  # the step under way was ended and saved
    assert f"stopped by {name} after step {rows}, saved as {newest}; resume with the same command" in sentences.pop()


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path):
    """Stopped by a signal and resumed, a run writes what it would have written without."""
    straight = Run(tmp_path / "straight", 2, ["train.steps=8"])
    assert straight.wait(90) == [0, 0], straight.said()
    mark = tmp_path / "mark"
    wanted = {"place": "forward", "step": 3, "do": "sleep", "seconds": 0.5, "mark": str(mark)}
    first = Run(tmp_path / "run", 2, ["train.steps=8"], hook=plant, environ={"PLANT": json.dumps(wanted)})
    first.wait_for(mark.exists, 90)
    first.signal(1, signal.SIGTERM)
    assert first.wait(60) == [143, 143], first.said()
    second = Run(tmp_path / "run", 2, ["train.steps=8"])
    assert second.wait(90) == [0, 0], second.said()
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
              for name in ("straight", "run")]  # fmt: skip
    assert losses[0] == losses[1]
    weights = [read_weights(verify(tmp_path / name / "checkpoints" / "step_8")) for name in ("straight", "run")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
