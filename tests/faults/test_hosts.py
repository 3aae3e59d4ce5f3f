"""Two hosts of two ranks each train what one host of four does, and both end, and go on, when their cable is cut."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lss.cli import main
from tests.faults.namespaces import Unavailable, torchrun, two_hosts, wait_all
from tests.faults.ranks import SMALL, Run

PORT = 29555  # in namespaces of their own
# ranks of one host, told that they are those of two: the same collectives
AS_ON_TWO = {rank: {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"} for rank in range(4)}


@pytest.fixture
def hosts():
    try:
        with two_hosts() as made:
            yield made
    except Unavailable as reason:
        pytest.skip(f"no network namespaces here: {reason}")


class TwoHostRun:
    """`lss train` under torchrun on both hosts, into one folder."""

    def __init__(self, hosts, folder: Path, overrides, *, static: bool) -> None:
        self.hosts, self.folder, self.out = hosts, folder, folder / "run"
        arguments = ["train", *SMALL, *overrides, "--out", str(self.out)]
        self.logs = [folder / f"host{host}.log" for host in range(2)]
        self.processes = [hosts.start(host, torchrun(host, PORT, arguments, static=static), self.logs[host])
                          for host in range(2)]  # fmt: skip

    def said(self) -> str:
        return "\n".join(f"-- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)

    def wait_for_step(self, step: int, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while not (self.out / "metrics.jsonl").exists() or len(rows(self.out)) < step:
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def seconds_until_gone(self, timeout: float) -> float:
        """Seconds until no process is left on either host."""
        started = time.monotonic()
        while left := [pid for host in range(2) for pid in self.hosts.pids(host)]:
            assert time.monotonic() - started < timeout, f"{left} are still there\n{self.said()}"
            time.sleep(0.1)
        return time.monotonic() - started


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def results(out):
    """Losses and gradient norms by step, and the exported weights."""
    steps = [(row["step"], row["loss"], row["grad_norm"]) for row in rows(out)]
    exported = out.parent / f"{out.name}.safetensors"
    assert main(["export", str(out / "checkpoints" / f"step_{steps[-1][0]}"), "-o", str(exported)]) == 0
    return steps, load_file(exported)


def assert_same_bits(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, weights in expected[1].items():
        assert torch.equal(found[1][name], weights), name


@pytest.mark.parametrize("strategy, static", [("lss", True), ("lss_2d", False)])
def test_two_hosts_train_what_one_host_does(hosts, tmp_path, strategy, static):
    overrides = ["train.steps=4", f"parallel.strategy={strategy}"]
    two = TwoHostRun(hosts, tmp_path, overrides, static=static)
    told, one = Run(tmp_path / "told", 4, overrides, of_rank=AS_ON_TWO), Run(tmp_path / "one", 4, overrides)
    assert wait_all(two.processes, 120) == [0, 0], two.said()
    assert told.wait() == [0] * 4, told.said()
    assert one.wait() == [0] * 4, one.said()
    found, flat = results(two.out), results(one.out)
    assert_same_bits(found, results(told.out))
    # in stages sums are taken in another order than at once
    assert found[0][0][0] == flat[0][0][0] == 1
    assert [x for row in found[0] for x in row] == pytest.approx([x for row in flat[0] for x in row], rel=1e-12)
    for name, weights in flat[1].items():
        torch.testing.assert_close(found[1][name], weights, rtol=1e-10, atol=1e-12)
    if strategy == "lss":
        # it did go in stages
        assert any(not torch.equal(found[1][name], weights) for name, weights in flat[1].items())


def test_a_cut_cable_ends_both_hosts_by_name_and_the_run_goes_on(hosts, tmp_path):
    timeout = 10.0
    overrides = ["train.steps=60", "checkpoint.every=10", f"train.timeout={timeout:g}"]
    first = TwoHostRun(hosts, tmp_path, overrides, static=True)
    first.wait_for_step(25)
    hosts.cut()
    assert first.seconds_until_gone(timeout + 40) <= timeout + 20, first.said()
    assert 25 <= len(rows(first.out)) < 60
    assert all(process.poll() not in (None, 0) for process in first.processes)
    # each names what it lost: the first host a rank of the other, the second the store, which the first keeps
    assert re.search(r"lss: rank [23] has not been heard of", first.logs[0].read_text()), first.said()
    assert re.search(r"lss: (the rendezvous store at 10\.77\.0\.1|rank [01] has not been heard of)",
                     first.logs[1].read_text()), first.said()  # fmt: skip
    assert "Traceback" not in first.logs[0].read_text().partition("ChildFailedError")[0].rpartition("lss:")[0]

    hosts.join()
    again = TwoHostRun(hosts, tmp_path, overrides, static=True)
    whole = Run(tmp_path / "whole", 4, overrides, of_rank=AS_ON_TWO)
    assert wait_all(again.processes, 120) == [0, 0], again.said()
    assert whole.wait() == [0] * 4, whole.said()
    assert_same_bits(results(again.out), results(whole.out))
