"""Ranks that are killed, stopped, stuck or broken: all others end in time, and say which it was and what they waited in."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass

import pytest

from tests.faults.plants import plant
from tests.faults.ranks import Run
from tests.faults.together import Together


@dataclass(frozen=True)
class Case:
    """One fault: the ranks, the one it befalls, what, where; `limit`: seconds until the others are gone."""

    nproc: int
    rank: int
    do: str
    place: str
    later: bool = False
    limit: float = 10.0
    how: str = ""

    def __str__(self) -> str:
        where = f"{self.place}{'-inside' if self.later else ''}{f'-{self.how}' if self.how else ''}"
        return f"{self.do}-{where}-{self.rank}of{self.nproc}"

    @property
    def overrides(self) -> list[str]:
        """Calls that come to an end before they return are named as well: sharded parameters', and peers' memory's."""
        return {"": [], "sharded": ["parallel.fsdp=true"], "peers": ["parallel.transport=symmetric"]}[self.how]


# every rank of 2 and of 4, killed and stopped, in compute, inside a collective and before step 1
CASES = [
    Case(2, 0, "SIGKILL", "forward"), Case(2, 1, "SIGSTOP", "forward"), Case(4, 0, "SIGSTOP", "forward", how="sharded"),
    Case(4, 1, "SIGKILL", "forward", how="peers"), Case(2, 1, "SIGKILL", "forward", later=True),
    Case(2, 0, "SIGSTOP", "forward", later=True), Case(4, 2, "SIGSTOP", "forward", later=True),
    Case(4, 3, "SIGKILL", "forward", later=True), Case(2, 0, "SIGSTOP", "build"), Case(2, 1, "SIGKILL", "build"),
    Case(4, 2, "SIGKILL", "build"), Case(4, 3, "SIGSTOP", "build"), Case(4, 0, "SIGKILL", "save"),
    Case(2, 1, "SIGKILL", "save"), Case(2, 1, "raise", "forward"), Case(2, 0, "raise", "forward"),
    Case(2, 0, "sleep", "forward", limit=13.0), Case(2, 1, "sleep", "clip", limit=13.0),
    Case(4, 3, "sleep", "forward", limit=13.0),
]  # fmt: skip
STEP, TIMEOUT = 3, 3


def befall(case: Case, folder):
    """Run into the fault; returns (seconds until the others were gone, exit codes, what each rank said)."""
    wanted = {"rank": case.rank, "place": case.place, "step": 0 if case.place == "build" else STEP, "do": case.do}
    if case.later:
        wanted |= {"later": True, "others_sleep": 1.9}
    if case.do == "sleep":
        wanted |= {"seconds": 100}
    timeout = TIMEOUT if case.do == "sleep" else 60
    options = ["train.steps=1000", f"checkpoint.every={STEP - 1}", f"train.timeout={timeout}", *case.overrides]
    run = Run(folder / "run", case.nproc, options, hook=plant, environ={"PLANT": json.dumps(wanted)})
    try:
        others = [process for rank, process in enumerate(run.processes) if rank != case.rank]
        run.wait_for(lambda: _struck(run, case), 120)
        struck = time.monotonic()
        while any(process.is_alive() for process in others) and time.monotonic() - struck < 40:
            time.sleep(0.02)
        return time.monotonic() - struck, run.codes(), [log.read_text() for log in run.logs]
    finally:
        run.end()


def _struck(run: Run, case: Case) -> bool:
    """Whether the fault is there."""
    if case.do in ("SIGKILL", "raise"):
        return not run.processes[case.rank].is_alive() or "Traceback" in run.said()
    if case.do == "SIGSTOP":
        return open(f"/proc/{run.processes[case.rank].pid}/stat").read().rpartition(")")[2].split()[0] == "T"
    return run.steps() >= STEP - 1


@pytest.fixture(scope="module")
def together(request, tmp_path_factory):
    cases = Together(request, tmp_path_factory.mktemp("watch"), befall, at_once=4)
    yield cases
    cases.end()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_are_gone_in_time_and_say_why(together, case):
    seconds, codes, texts = together(case)
    said = "\n".join(texts)
    others = [code for rank, code in enumerate(codes) if rank != case.rank]
    assert others == [1] * (case.nproc - 1), said
    assert seconds <= case.limit, said
    sentences = [line for line in said.splitlines() if line.startswith("lss: ")]
    # one for the one host; the victim of a mere sleep may live to say the same
    assert len(set(sentences)) == 1, said
    sentence = sentences[0]
    assert f"rank {case.rank} " in sentence
    words = {"SIGKILL": "killed", "SIGSTOP": "stopped", "raise": "failed", "sleep": f"is stuck: for {TIMEOUT} s"}
    assert words[case.do] in sentence
    for rank, text in enumerate(texts):
        assert rank == case.rank or "Traceback" not in text, said
    if case.place == "build":
        assert "before step 1" in sentence
        assert sentence.endswith("nothing was saved yet.")
        return
    # saves are due after every other step
    assert f"step {STEP + 1 if case.place == 'save' else STEP}" in sentence
    if case.do == "raise":
        assert "ValueError: planted" in sentence
    else:
        assert re.search(r"the newest save is step_\d+\.$", sentence)
        # what comes next there: a gather in the forward pass, the ranks' agreement, or whether the save went well
        first = "all_gather of parameters" if case.how == "sharded" else "all_gather of kv"
        collective = {"forward": first, "clip": "all_reduce of gradient norm", "save": ""}[case.place]
        assert collective in sentence
        waiting = [rank for rank in range(case.nproc) if rank != case.rank]
        named = re.search(r"that ranks? ([\d, ]+) waits? in", sentence)
        if case.place == "save":  # the others' waiting may be over, or not yet told: a thread of theirs writes meanwhile
            assert "before the all_reduce of control" in sentence or named is not None, sentence
            return
        assert named is not None, sentence
        assert {int(rank) for rank in named[1].split(",")} <= set(waiting)


@pytest.mark.parametrize("do, seconds", [("sleep", 8), ("hold", 7)])
def test_the_slow_are_not_dead(tmp_path, do, seconds):
    """Nor is a rank whose process keeps Python's lock for longer than a dead one's silence."""
    wanted = {"rank": 1, "place": "forward", "step": 2, "do": do, "seconds": seconds}
    run = Run(tmp_path / "run", 2, ["train.steps=3", "train.timeout=30"], hook=plant, environ={"PLANT": json.dumps(wanted)})
    assert run.wait(90) == [0, 0], run.said()
    assert "lss:" not in run.said()
