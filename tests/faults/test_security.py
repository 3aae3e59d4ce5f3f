"""What a run listens on, what it writes of its environment, and how often it says one thing."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lss.hosts import is_loopback
from lss.meeting import host_store, listen, timedelta
from tests.faults.ranks import SMALL, Run

ROOT = Path(__file__).resolve().parents[2]
LONG = ["train.steps=1000000", "checkpoint.every=0"]


def listening(pids):
    """(address, port) of every TCP socket that these processes listen on, from the kernel's tables."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except OSError:  # closed since
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                number, port = fields[1].split(":")
                words = [bytes.fromhex(number[i : i + 8])[::-1] for i in range(0, len(number), 8)]
                found.add((ipaddress.ip_address(b"".join(words)), int(port, 16)))
    return found


def loopback_only(found):
    return all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address, _ in found)


def test_the_kernel_s_tables_are_read_right():
    """The test below would see a store of torch's own."""
    with socket.socket() as open_to_all:
        open_to_all.bind(("", 0))
        open_to_all.listen()
        found = listening([os.getpid()])
        assert (ipaddress.ip_address("0.0.0.0"), open_to_all.getsockname()[1]) in found
        assert not loopback_only(found)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_loopback_is_listened_on_where_it_is_given(address):
    assert is_loopback(address)
    try:
        listener = listen(address, 0)
    except OSError:
        pytest.skip("this host has no such loopback")
    assert ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    port = listener.getsockname()[1]
    store = host_store(listener, timedelta(seconds=5))
    assert (store.port, store.check(["x"])) == (port, False)


def test_a_host_s_name_opens_its_interfaces():
    for address in ("node1", "192.0.2.1"):  # one that is translated to this host's
        assert not is_loopback(address)
        with listen(address, 0) as listener:
            assert listener.getsockname()[0] in ("::", "0.0.0.0")


def test_ranks_of_one_host_listen_on_loopback_only(tmp_path):
    run = Run(tmp_path / "run", 2, LONG)
    try:
        run.wait_for(lambda: run.steps() >= 2)
        found = listening([process.pid for process in run.processes])
        assert len(found) >= 2  # the store's, and gloo's of each rank
        assert loopback_only(found), found
    finally:
        run.end()


def test_ranks_that_lss_starts_listen_on_loopback_only(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, "-m", "lss", "train", *SMALL, *LONG, "--nproc", "2", "--out", "run"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        rows, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
        while not (rows.exists() and rows.stat().st_size):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        found = listening([process.pid, *children])
        assert len(children) >= 2
        assert len(found) >= 3  # the launcher's store, and gloo's of each rank
        assert loopback_only(found), found
    finally:
        process.terminate()
        process.wait(30)
        process.stderr.close()


def test_no_variable_of_the_environment_is_written_down(tmp_path):
    """Neither by the ranks nor into what they leave: metrics, run.json, report, TensorBoard, checkpoints."""
    secret = "canary-7d1f0c6a"
    run = Run(
        tmp_path / "run", 2, ["train.steps=2", "train.eval_every=1"], environ={"MY_TOKEN": secret, secret: "x"}, report=True
    )
    assert run.wait() == [0, 0], run.said()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "run.json", "report.html"} <= {path.name for path in files}
    assert sum(path.suffix == ".safetensors" for path in files) >= 1
    for path in files:
        assert secret.encode() not in path.read_bytes(), path
        assert b"MY_TOKEN" not in path.read_bytes(), path


def sentences(run):
    return [line for log in run.logs for line in log.read_text().splitlines() if line.startswith("lss:")]


def refuse_in_the_trainer():
    """Plant a refusal that comes after the ranks have met."""
    from lss.config import refuse
    from lss.train.trainer import Trainer

    def refusing(self, *args, **kwargs):
        raise refuse("planted", 1, "all ranks say so")

    Trainer.__init__ = refusing


def fail_in_the_trainer():
    """Plant a failure that one rank alone meets with."""
    from lss.config.errors import Failed
    from lss.train.trainer import Trainer

    whole = Trainer.train_step

    def failing(self, step):
        if step == 2 and self.mesh.get_rank() == 1:
            raise Failed("planted, on one rank.")
        return whole(self, step)

    Trainer.train_step = failing


def test_what_ends_one_rank_alone_is_said_by_it_and_its_rank_named_by_the_others(tmp_path):
    run = Run(tmp_path / "run", 3, ["train.steps=9"], hook=fail_in_the_trainer)
    assert run.wait(60) == [1, 1, 1], run.said()
    assert "lss: planted, on one rank.\n" in run.logs[1].read_text()
    rest = [line for line in sentences(run) if line != "lss: planted, on one rank."]
    assert len(rest) == 1, run.said()
    assert re.match("lss: rank 1 failed in step [12]: planted, on one rank", rest[0])
    assert "Traceback" not in run.said()


@pytest.mark.parametrize(
    "overrides, hook, words",
    [(["optim.lrr=1"], None, "nearest is optim.lr"), ([], refuse_in_the_trainer, "planted=1")],
    ids=["before they meet", "after"],
)
def test_what_all_ranks_refuse_is_said_once(tmp_path, overrides, hook, words):
    run = Run(tmp_path / "run", 3, overrides, hook=hook)
    assert run.wait(60) == [2, 2, 2], run.said()
    assert len(sentences(run)) == 1, run.said()
    assert words in run.said()
    assert "Traceback" not in run.said()
    assert not (tmp_path / "run").exists()


def test_what_one_rank_refuses_is_said_by_it_and_ends_all(tmp_path):
    """Ranks whose hosts have other files: the one that cannot go on says why, the others do not wait for it."""
    np.zeros(4000, "<u2").tofile(tmp_path / "x.bin")
    overrides = ["data.source=tokens", "data.path=~/x.bin", "train.steps=2"]
    run = Run(tmp_path / "run", 3, overrides, environ={"HOME": str(tmp_path)}, of_rank={1: {"HOME": "/nowhere"}})
    started = time.monotonic()
    assert run.wait(60) == [2, 2, 2], run.said()
    assert time.monotonic() - started < 40  # and not the rendezvous' minute
    assert len(sentences(run)) == 1, run.said()
    assert "data.path='~/x.bin': no such file" in run.logs[1].read_text()


def test_ids_beyond_the_vocabulary_are_found_by_the_rank_that_reads_them(tmp_path):
    ids = np.zeros(3_000_000, "<u2")
    ids[1_100_000] = 999
    ids.tofile(tmp_path / "x.bin")
    run = Run(tmp_path / "run", 2, ["data.source=tokens", f"data.path={tmp_path}/x.bin", "train.steps=2"])
    assert run.wait(60) == [2, 2], run.said()
    assert len(sentences(run)) == 1
    assert "id 999 at token 1,100,000 (byte 2,200,000)" in run.logs[1].read_text()
    assert not (tmp_path / "run").exists()


def test_training_on_tokens_is_training_on_the_same_bytes(tmp_path):
    text = np.random.default_rng(0).integers(97, 123, 6000)
    (tmp_path / "text").write_bytes(text.astype(np.uint8).tobytes())
    np.save(tmp_path / "text.npy", text.astype(np.int32))
    rows = {}
    for name, more in (("text", []), ("text.npy", ["data.source=tokens"])):
        overrides = [*more, f"data.path={tmp_path / name}", "train.steps=3", "train.eval_every=3"]
        run = Run(tmp_path / f"run-{name}", 2, overrides)
        assert run.wait() == [0, 0], run.said()
        rows[name] = [line.split('"tokens_per_s"')[0] for line in (run.out / "metrics.jsonl").read_text().splitlines()]
        item = "token" if more else "byte"
        assert f"bits per {item}" in run.said()
        assert f'"bits_per_{item}"' in (run.out / "run.json").read_text()
    assert rows["text"] == rows["text.npy"]
