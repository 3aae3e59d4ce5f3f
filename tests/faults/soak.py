"""`make soak`: a run of four ranks under faults, resumed after each to its last step, and held to the run without any.

Faults come at steps drawn from SEED, kinds are dealt in turn. Weights and losses at the end equal, bit for bit, those of a
run that changes its layout at the same steps and meets no fault; and losses those of a run of one layout to 1e-10.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from lss.cli import main as lss
from tests.faults.ranks import SMALL, Run

RANKS = 4
KINDS = ["kill", "kill in a save", "stop", "TERM to a rank", "TERM to the launcher", "USR1", "disk full", "layout"]
LAYOUTS = ((4, 1), (2, 2), (1, 4))  # cp x dp
GRACE = 60.0  # seconds after which ranks that have not ended by themselves are ended and counted as hung
TIMEOUT = 20.0  # train.timeout
IDLE = 240.0  # seconds without a step, start included, after which something is wrong


# -- what every rank does to itself ---------------------------------------------------------------------------------------


def pace() -> None:
    """A rank's hook: sleeps SOAK_PACE seconds a step, ends behind step SOAK_END, and spoils saves as SOAK_ORDERS says."""
    from lss.train.trainer import Trainer

    seconds, end, orders = float(os.environ["SOAK_PACE"]), int(os.environ["SOAK_END"]), Path(os.environ["SOAK_ORDERS"])
    train_step, fsync = Trainer.train_step, os.fsync

    def paced(self, step, *more):
        if step == end + 1 > 1:
            self.save(end)
            getattr(self, "finish_saves", lambda: None)()
            os._exit(0)
        time.sleep(seconds)
        return train_step(self, step, *more)

    def spoilt(descriptor):
        if (orders / "full").exists():
            raise OSError(28, "No space left on device")
        if (orders / "slow").exists():
            (orders / "saving").touch()
            time.sleep(0.5)
        return fsync(descriptor)

    Trainer.train_step = paced
    os.fsync = spoilt


# -- one start of the run -------------------------------------------------------------------------------------------------


class Launched:
    """`lss train --nproc`, with as much of `Run` as is used here."""

    def __init__(self, out: Path, overrides: list[str]) -> None:
        command = [sys.executable, "-m", "lss", "train", *SMALL, *overrides, "--out", str(out), "--nproc", str(RANKS)]
        self.out, self.log = out, out.parent / "launcher.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                             env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip

    def signal(self, rank: int, number: int) -> None:
        """To the launcher, whichever rank is asked for."""
        self._process.send_signal(number)

    def codes(self) -> list[int | None]:
        return [self._process.poll()]

    def steps(self) -> int:
        return last_step(self.out)

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def said(self) -> str:
        return self.log.read_text()[-3000:]


def last_step(out: Path) -> int:
    try:
        rows = (out / "metrics.jsonl").read_text().splitlines()
        return json.loads(rows[-1])["step"] if rows else 0
    except (OSError, ValueError, IndexError):
        return 0


def saved_step(out: Path) -> int:
    steps = [int(p.name[5:]) for p in (out / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
    return max(steps, default=0)


@dataclass
class Fault:
    """One fault and what came of it."""

    kind: str
    step: int
    codes: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    lost: int = 0
    hung: bool = False


class Soak:
    """A run, its faults and its clock.

    Args:
        folder: to work in.
        steps: of the run.
        seconds: slept in each step.
        faults: how many.
        kinds: of faults, dealt in turn in an order that the seed gives.
    """

    def __init__(self, folder: Path, *, steps: int, seconds: float, faults: int, kinds: list[str], seed: int) -> None:
        self.random = random.Random(seed)
        self.folder, self.steps, self.pace, self.out = folder, steps, seconds, folder / "run"
        self.orders = folder / "orders"
        self.orders.mkdir(parents=True)
        marks = sorted(self.random.randrange(1, steps) for _ in range(faults))
        dealt = [kinds[i % len(kinds)] for i in range(faults)]
        self.random.shuffle(dealt)
        self.todo = list(zip(marks, dealt, strict=True))
        self.layouts: list[tuple[int, tuple[int, int]]] = [(0, LAYOUTS[0])]
        self.faults: list[Fault] = []
        self.computed, self.launched = 0, 0.0

    # -- starting ---------------------------------------------------------------------------------------------------------

    def overrides(self, layout: tuple[int, int], every: int = 10) -> list[str]:
        return [f"train.steps={self.steps}", f"parallel.cp={layout[0]}", f"parallel.dp={layout[1]}",
                f"checkpoint.every={every}", f"train.timeout={TIMEOUT:g}"]  # fmt: skip

    def start(self, launcher: bool) -> Run | Launched:
        overrides = self.overrides(self.layouts[-1][1])
        if launcher:
            return Launched(self.out, overrides)
        return Run(self.out, RANKS, overrides, hook=pace, environ=self.environ(self.pace))

    def environ(self, seconds: float, end: int = 0) -> dict[str, str]:
        return {"SOAK_PACE": str(seconds), "SOAK_END": str(end), "SOAK_ORDERS": str(self.orders)}

    # -- the run ----------------------------------------------------------------------------------------------------------

    def run(self) -> float:
        """Run to the last step through all faults; returns the seconds it took."""
        began = time.monotonic()
        while saved_step(self.out) < self.steps:
            started = saved_step(self.out)
            ending = next((kind for _, kind in self.todo if kind != "USR1"), "")  # what this start will end by
            self.launched = time.time()
            run = self.start(ending == "TERM to the launcher")
            try:
                before = len(self.faults)
                while (fault := self.next_fault(run)) is not None and not self.strike(run, fault):
                    pass
                if len(self.faults) == before or self.faults[-1].kind == "USR1":
                    self.wait_all(run, 100.0 + self.steps * (self.pace + 1))
                    assert set(run.codes()) == {0}, f"{run.codes()}\n{run.said()}"
                reached = max(last_step(self.out), saved_step(self.out))
            finally:
                run.end()
            self.computed += max(0, reached - started)
            if self.faults and (fault := self.faults[-1]).codes and len(self.faults) > before:
                self.tell(fault)
        return time.monotonic() - began

    def next_fault(self, run: Run | Launched) -> Fault | None:
        """Wait until the next fault is due; None where the run ends before."""
        if not self.todo:
            return None
        mark, kind = self.todo[0]
        seen, since = -1, time.monotonic()
        while (now := run.steps()) < mark or (kind == "USR1" and not self.trains()):
            if all(code is not None for code in run.codes()):
                return None
            if now != seen:
                seen, since = now, time.monotonic()
            assert time.monotonic() - since < IDLE, f"no step in {IDLE:g} s after step {now}\n{run.said()}"
            time.sleep(0.01)
        self.todo.pop(0)
        time.sleep(self.random.random() * self.pace)  # anywhere in a step
        fault = Fault(kind, run.steps())
        self.faults.append(fault)
        return fault

    def trains(self) -> bool:
        """Whether this start has written a step: SIGUSR1 ends a process that has not begun to read its program."""
        metrics = self.out / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_mtime > self.launched

    def strike(self, run: Run | Launched, fault: Fault) -> bool:
        """Do it; whether the run has ended by it."""
        rank = self.random.randrange(RANKS)
        began = time.monotonic()
        if fault.kind == "USR1":
            run.signal(rank, signal.SIGUSR1)
            while saved_step(self.out) < fault.step and time.monotonic() - began < GRACE:
                time.sleep(0.02)
            fault.seconds, fault.hung = time.monotonic() - began, saved_step(self.out) < fault.step
            self.tell(fault)
            return False
        stopped: list[int] = []
        if fault.kind == "kill":
            run.signal(rank, signal.SIGKILL)
        elif fault.kind == "kill in a save":
            self.in_save(run)
            began = time.monotonic()
            run.signal(rank, signal.SIGKILL)
        elif fault.kind == "stop":
            stopped = [rank]
            run.signal(rank, signal.SIGSTOP)
        elif fault.kind == "TERM to a rank":
            run.signal(rank, signal.SIGTERM)
        elif fault.kind == "TERM to the launcher":
            run.signal(0, signal.SIGTERM)
        elif fault.kind == "disk full":
            (self.orders / "full").touch()
        elif fault.kind == "layout":
            for each in range(RANKS):
                run.signal(each, signal.SIGKILL)
        fault.hung = not self.wait_all(run, GRACE + 10 * (self.pace + 1), besides=stopped)
        fault.seconds = time.monotonic() - began
        run.end()
        fault.codes = run.codes()
        for order in self.orders.iterdir():
            order.unlink()
        fault.lost = max(0, max(fault.step, last_step(self.out)) - saved_step(self.out))
        if fault.kind == "layout":
            at, now = saved_step(self.out), self.layouts[-1][1]
            self.layouts.append((at, self.random.choice([layout for layout in LAYOUTS if layout != now])))
        return True

    def in_save(self, run: Run) -> None:
        """Wait until a save is under way."""
        (self.orders / "slow").touch()
        while not (self.orders / "saving").exists() and not all(code is not None for code in run.codes()):
            time.sleep(0.005)
        time.sleep(self.random.random())

    def wait_all(self, run: Run | Launched, timeout: float, besides: list[int] | None = None) -> bool:
        deadline = time.monotonic() + timeout
        while any(code is None for rank, code in enumerate(run.codes()) if rank not in (besides or [])):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def tell(self, fault: Fault) -> None:
        print(f"step {fault.step:5}  {fault.kind:20}  {fault.seconds:5.1f} s  {fault.lost:3} steps lost  "
              f"exit {' '.join(map(str, fault.codes)) or '-'}{'  HUNG' if fault.hung else ''}", flush=True)  # fmt: skip

    # -- what it is held to -----------------------------------------------------------------------------------------------

    def reference(self, name: str, layouts: list[tuple[int, tuple[int, int]]]) -> Path:
        """The same run without faults, in these layouts from these steps on."""
        out = self.folder / name
        ends = [at for at, _ in layouts[1:]] + [self.steps]
        for (at, layout), end in zip(layouts, ends, strict=True):
            if at == end:  # two changes without a save between them
                continue
            run = Run(out, RANKS, self.overrides(layout, every=0), hook=pace, environ=self.environ(0.0, end % self.steps))
            assert run.wait(60.0 + self.steps) == [0] * RANKS, run.said()
            assert saved_step(out) == end, run.said()
        return out

    def references(self) -> tuple[Path, Path]:
        """The runs without faults: in the same layouts, and in one."""
        return self.reference("same layouts", self.layouts), self.reference("one layout", self.layouts[:1])

    def compare(self, same: Path, one: Path) -> None:
        """Hold the run to those without faults."""
        rows, weights = zip(*(outcome(out) for out in (self.out, same, one)), strict=True)
        assert [row["step"] for row in rows[0]] == list(range(1, self.steps + 1)), "a step is missing, or twice there"
        keys = ("step", "loss", "grad_norm", "lr", "tokens_counted")
        for found, expected in zip(rows[0], rows[1], strict=True):
            assert [found[key] for key in keys] == [expected[key] for key in keys], f"step {found['step']} differs"
        for name, tensor in weights[1].items():
            assert torch.equal(weights[0][name], tensor), f"{name} is not the same bits"
        worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows[0], rows[2], strict=True))
        print(f"weights and losses: the same bits as without faults, in {len(self.layouts)} layouts; "
              f"losses within {worst:.1e} of one layout")  # fmt: skip
        assert worst < 1e-10

    def table(self, wall: float) -> str:
        """Faults by kind, and effective time."""
        kinds: dict[str, list[Fault]] = defaultdict(list)
        for fault in self.faults:
            kinds[fault.kind].append(fault)
        lines = ["| fault | times | ended with | seconds until all were gone, mean / most | steps lost, mean / most |",
                 "|---|---|---|---|---|"]  # fmt: skip
        for kind, found in sorted(kinds.items()):
            codes = defaultdict(int)
            for fault in found:
                codes["hung" if fault.hung else " ".join(sorted({str(c) for c in fault.codes})) or "went on"] += 1
            ended = ", ".join(f"{codes[c]} x {c}" for c in sorted(codes))
            seconds, lost = [f.seconds for f in found], [f.lost for f in found]
            lines.append(f"| {kind} | {len(found)} | {ended} | {sum(seconds) / len(found):.1f} / {max(seconds):.1f} "
                         f"| {sum(lost) / len(found):.1f} / {max(lost)} |")  # fmt: skip
        times = [json.loads(line)["step_time_s"] for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        training = sum(times) + self.pace * self.steps
        lines.append(f"\n{self.steps} steps kept of {self.computed} computed ({self.steps / self.computed:.0%}); "
                     f"{training:.0f} s of training in {wall:.0f} s ({training / wall:.0%})")  # fmt: skip
        return "\n".join(lines)


def outcome(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A run's metrics and exported weights."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    exported = out.parent / f"{out.name}.safetensors"
    assert lss(["export", str(out / "checkpoints" / f"step_{saved_step(out)}"), "-o", str(exported)]) == 0
    return rows, load_file(exported)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="about how long the run takes, one fault a minute")
    parser.add_argument("--faults", type=int, default=0, help="so many faults instead, one after another")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--kinds", default="", help="only these kinds, with commas between them")
    options = parser.parse_args(arguments)
    # with time to spare for what is lost and started again
    steps, seconds, faults = int(100 * options.minutes), 0.3, max(1, round(options.minutes))
    if options.faults:
        steps, seconds, faults = 15 * options.faults, 0.03, options.faults
    chosen = options.kinds.split(",") if options.kinds else KINDS
    folder = Path(tempfile.mkdtemp(prefix="lss-soak-"))
    print(f"{steps} steps, {faults} faults, seed {options.seed}, in {folder}", flush=True)
    soak = Soak(folder, steps=steps, seconds=seconds, faults=faults, kinds=chosen, seed=options.seed)
    wall = soak.run()
    print(soak.table(wall), flush=True)
    soak.compare(*soak.references())
    hung = [fault for fault in soak.faults if fault.hung]
    if hung:
        print(f"{len(hung)} faults left ranks that did not end by themselves")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
