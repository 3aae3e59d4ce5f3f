"""The command line as people use it: whole processes, launchers, exit statuses, one sentence for a refusal."""

from __future__ import annotations

import importlib
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.ranks import Command, Run

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs" / "tiny.toml")
SMALL = ["model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.d_mlp=48", "data.seq_len=64",
         "train.batch_size=4", "train.eval_samples=4"]  # fmt: skip
ONE_SGD_STEP = ["train.steps=1", "train.dtype=float64", "optim.name=sgd", "optim.lr=1.0", "optim.warmup=0",
                "optim.weight_decay=0", "optim.clip=0"]  # fmt: skip


def variables_of(more=None):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (more or {})


def lss(*arguments, cwd, env=None, timeout=120):
    """Run `lss` in a folder; returns the finished process. It is forked from one that has imported torch."""
    return Command(arguments, cwd, variables_of(env)).wait(timeout)


def python_m_lss(*arguments, cwd, timeout=120):
    """The same by `python -m lss`, which imports all that it needs."""
    return Command(arguments, cwd, variables_of(), fork=False).wait(timeout)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_one_step_gives_the_same_weights_for_any_cp(tmp_path, positions):
    """The gradient seen from outside: one SGD step at rate 1, exported; cp 1 to 4 agree to 1e-12."""
    exported = {}
    for cp in (1, 2, 3, 4):
        out = tmp_path / f"a{cp}"
        overrides = [*SMALL, *ONE_SGD_STEP, f"model.positions={positions}", "model.n_kv_heads=2", f"parallel.cp={cp}"]
        if (positions, cp) == ("learned", 2):
            # ranks of the real launcher; the others are started as torchrun would
            done = python_m_lss("train", TINY, *overrides, "--nproc", cp, "--out", out, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        else:
            run = Run(out, cp, overrides, arguments=[TINY], report=True)
            assert run.wait(120) == [0] * cp, run.said()
        assert (out / "report.html").is_file()
        done = lss("export", out / "checkpoints" / "step_1", "-o", out / "w.safetensors", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        exported[cp] = load_file(out / "w.safetensors")
        row = json.loads((out / "metrics.jsonl").read_text())
        assert row["step"] == 1
        assert row["tokens_counted"] == 4 * 64
    for cp in (2, 3, 4):
        assert exported[cp].keys() == exported[1].keys()
        for name, weight in exported[1].items():
            assert weight.dtype == torch.float64
            assert (exported[cp][name] - weight).norm() <= 1e-12 * weight.norm(), name


def test_check_proves_and_prints(tmp_path):
    done = lss("check", TINY, *SMALL, "model.n_kv_heads=2", "train.dtype=float64", "--nproc", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    for words in ("worst gradient", "all_gather of kv", "reduce_scatter of dkv", "tokens a rank", "kept for backward",
                  "check: equal to one process"):  # fmt: skip
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


def average_dkv():
    """Plant a fault: dK and dV averaged instead of summed."""
    import lss.comm.transport as transport

    whole = transport.LocalTransport.scatter
    transport.LocalTransport.scatter = lambda self, rooms: whole(self, [room / 2 for room in rooms])


def test_check_exits_1_where_gradients_differ(tmp_path):
    done = Command(["check", TINY, "model.n_layers=1"], tmp_path, variables_of(), hook=average_dkv).wait()
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout
    assert "check: NOT equal to one process" in done.stdout


def launchers(port):
    """What each launcher sets for ranks 0 and 1 of 2 on this machine."""
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE"),
        "mpirun": tuple(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    }
    for launcher, keys in names.items():
        meet = {"MASTER_PORT": str(port)} | ({"MASTER_ADDR": "127.0.0.1"} if launcher == "torchrun" else {})
        yield launcher, [meet | dict(zip(keys, (str(rank), "2", str(rank), "2"), strict=True)) for rank in (0, 1)]


@pytest.mark.parametrize("launcher", ["torchrun", "srun", "mpirun"])
def test_ranks_of_any_launcher_meet(tmp_path, launcher):
    variables = dict(launchers(free_port()))[launcher]
    arguments = ["train", TINY, *SMALL, "train.steps=2", "train.eval_every=0", "--out", str(tmp_path / "run")]
    ranks = [Command(arguments, tmp_path, variables_of(variables[rank])) for rank in (0, 1)]
    ended = [rank.wait() for rank in ranks]
    assert [rank.returncode for rank in ended] == [0, 0], ended
    assert "cp 2" in ended[0].stdout
    assert ended[1].stdout == ""
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


REFUSALS = [
    (["train", TINY, "optim.lrr=1"], "nearest is optim.lr"),
    (["train", TINY, "parallel.cp=3", "--nproc", "4"], "needs 3 ranks and 4 are planned"),
    (["train", "absent.toml"], "absent.toml"),
    (["train", TINY, "other.toml"], "one config file"),
    (["train", TINY, "--nproc", "0"], "--nproc=0"),
    (["train", TINY, "--nproc", "two"], "--nproc"),
    (["train", TINY, "--bogus"], "--bogus"),
    (["train", TINY, "data.path=absent"], "data.path='absent'"),
    (["train", TINY, "data.seq_len=100000000"], "data.seq_len=100000000"),
    (["train", TINY, "parallel.strategy=tp", "--nproc", "3"], "model.n_heads=8"),
    (["train", TINY, "--out", TINY], "give a folder"),
    (["trian", TINY], "nearest is train"),
    (["check", TINY, "train.steps=x"], "train.steps='x'"),
    (["export", "absent", "-o", "w.safetensors"], "not a checkpoint"),
    (["export", "absent"], "-o"),
    (["report", "absent"], "no metrics.jsonl"),
    (["data", "fetch", "enwik9"], "known: enwik8"),
    (["data", "info", "absent"], "no such file"),
    ([], "VERB"),
]


@pytest.mark.parametrize("arguments, words", REFUSALS, ids=lambda x: " ".join(x)[-40:] if isinstance(x, list) else None)
def test_refusals_are_one_sentence_and_status_2(tmp_path, arguments, words):
    # as people run it where what is refused needs no torch; `main` decides the same in a process that has it
    done = (python_m_lss if "VERB" in words or "--bogus" in arguments else lss)(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


ENVIRONMENTS = [
    ({"RANK": "0"}, "WORLD_SIZE is not set"),
    ({"RANK": "zero", "WORLD_SIZE": "1"}, "RANK='zero'"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "no-such.invalid", "MASTER_PORT": "29511"}, "MASTER_ADDR=no-such"),
]


@pytest.mark.parametrize("variables, words", ENVIRONMENTS, ids=[words for _, words in ENVIRONMENTS])
def test_wrong_environments_are_refused(tmp_path, variables, words):
    done = lss("train", TINY, *SMALL, "train.steps=1", cwd=tmp_path, env=variables)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_busy_port_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = lss("train", TINY, *SMALL, "train.steps=1", cwd=tmp_path, env=variables)
    assert done.returncode == 2, done.stderr
    assert "MASTER_PORT=" in done.stderr
    assert "Traceback" not in done.stderr


def test_data_info_and_report(tmp_path):
    (tmp_path / "text").write_text("to be or not to be " * 200)
    done = lss("data", "info", "text", "--seq-len", "10", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3,800" in done.stdout
    command = ["train", TINY, *SMALL, "data.path=text", "data.seq_len=32", "train.steps=3", "train.eval_every=3"]
    done = lss(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2].startswith("held-out: ")
    assert done.stdout.splitlines()[-1] == "report: runs/tiny/report.html"
    done = lss("report", "runs/tiny", "-o", "page.html", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "report: page.html"
    # a finished run says so and changes nothing
    done = lss(*command, cwd=tmp_path)
    assert done.returncode == 0
    assert "is finished" in done.stdout


def test_a_run_that_diverges_ends_with_1_and_says_what_to_do(tmp_path):
    settings = ["optim.name=sgd", "optim.lr=1e12", "optim.clip=0", "train.eval_every=0", "train.steps=50"]
    done = lss("train", TINY, *SMALL, *settings, "--nproc", 2, "--out", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert "not finite in 10 steps in a row" in done.stderr
    assert "Traceback" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["grad_norm"] is None
    assert len(rows) < 20


def test_another_run_in_the_folder_is_refused_once(tmp_path):
    arguments = ["train", TINY, *SMALL, "train.eval_every=0", "--out", "run"]
    assert lss(*arguments, "train.steps=1", cwd=tmp_path).returncode == 0
    done = lss(*arguments, "train.steps=2", "model.d_mlp=64", "--nproc", 2, cwd=tmp_path)
    assert done.returncode == 2
    assert "holds a run made with 48" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_reader_that_goes_ends_the_command_quietly(capfd, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    module = importlib.import_module("lss.cli.main")  # the package's `main` is its function
    monkeypatch.setattr(module, "_run", gone)
    assert module.main(["verify", "anything"]) == 141
    assert capfd.readouterr().err == ""
