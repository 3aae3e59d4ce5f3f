"""What is refused before step 1: 200 mutated configs, contradictions, options, folders, the environment; in one process."""

from __future__ import annotations

import random
import socket
import time

import pytest

from lss.cli import main
from lss.config import Config
from lss.config.sections import keys_of, known_keys

NUMBERS = ["-1", str(2**70), "1e400", "nan", "inf", "-inf", "'text'", "[]", "{}", "''", "2000-01-01"]
NONSENSE = {
    int: [*NUMBERS, "1.5", "true"],
    float: [*NUMBERS, "true"],
    bool: ["1", "0", "-1", "nan", "'text'", "''", "[]", "{}", str(2**70)],
    str: ["1", "true", "nan", "1e400", "[]", "{}", "-1", "'/no/such/thing'"],
    list: ["-1", "[1.5]", "['text']", "true", "nan", "inf", str(2**70), f"[{2**70}]", "{}", "''"],
}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def refusal(capsys, arguments):
    """The one sentence that a command is refused with."""
    started = time.monotonic()
    status = main([str(argument) for argument in arguments])
    seconds = time.monotonic() - started
    told = capsys.readouterr()
    assert status == 2, (arguments, status, told.err)
    assert told.out == ""
    assert told.err.startswith("lss: "), told.err
    assert told.err.endswith(".\n"), told.err
    assert told.err.count("\n") == 1, told.err
    assert "Traceback" not in told.err
    assert len(told.err) < 500
    assert seconds < 10
    return told.err


def misspelt(key, draw):
    """The key with a letter of its own lost, doubled, or changed places with the next."""
    section, name = key.split(".")
    while True:
        at = draw.randrange(len(name))
        wrong = draw.choice([name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:],
                             name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :]])  # fmt: skip
        if wrong and wrong not in keys_of(section):
            return f"{section}.{wrong}"


def mutations(count):
    """`count` mutations of the default config, (key as written, key meant, value), which hit every key."""
    draw, keys, found = random.Random(7), known_keys(), []
    while len(found) < count:
        key = keys[len(found) % len(keys)]
        section, name = key.split(".")
        kind = keys_of(section)[name].kind
        if draw.random() < 0.25:
            value = getattr(getattr(Config(), section), name)
            found.append((misspelt(key, draw), key, "[]" if isinstance(value, tuple) else repr(value).lower()))
        else:
            # a folder for offload is looked at where there is offload to disk
            wrong = [text for text in NONSENSE[kind] if key != "memory.offload_path" or not text.startswith("'/")]
            found.append((key, key, draw.choice(wrong)))
    return found


def test_200_mutated_configs_are_refused_by_key_in_one_sentence(tmp_path, capsys):
    cases = mutations(200)
    assert {meant for _, meant, _ in cases} == set(known_keys())
    for number, (key, meant, value) in enumerate(cases):
        section, name = key.split(".")
        if number % 2:
            (tmp_path / "my.toml").write_text(f"[{section}]\n{name} = {value}\n")
            told = refusal(capsys, ["train", "my.toml"])
        else:
            told = refusal(capsys, ["check" if number % 4 else "train", f"{key}={value}"])
        assert key in told, (key, value, told)
        assert meant.split(".")[0] in told
    (tmp_path / "my.toml").unlink()
    assert list(tmp_path.iterdir()) == []


CONTRADICTIONS = [
    ("model.d_model=100 model.n_heads=8", "model.n_heads=8"),
    ("model.n_heads=8 model.n_kv_heads=3", "model.n_kv_heads=3"),
    ("train.batch_size=3 train.accumulate=2", "train.batch_size=3"),
    ("data.prefix=512", "data.prefix=512"),
    ("data.prefix=4 model.kind=encoder model.vocab_size=300", "data.prefix=4"),
    ("model.kind=encoder", "model.vocab_size=256"),
    ("data.packing=true", "train.batch_size=8"),
    ("parallel.cp=2", "needs 2 ranks"),
    ("parallel.dp=2", "parallel.dp=2"),
    ("parallel.head_chunks=8", "parallel.head_chunks=8"),
    ("parallel.inner=2", "parallel.inner=2"),
    ("train.compile=true model.dropout=0.5", "train.compile=true"),
    ("parallel.kernel=sdpa model.softcap=3.0", "parallel.kernel"),
    ("parallel.kernel=flash4", "kernel=flash4"),
    ("data.source=tokens", "data.path=''"),
    ("data.source=tokens data.path=absent", "data.path='absent'"),
    ("data.token_bytes=3", "data.token_bytes=3"),
    ("data.path=small data.seq_len=100", "data.seq_len=100"),
    # what no machine can hold
    ("model.d_model=1099511627776", "model.d_model=1099511627776"),
    ("model.n_layers=1099511627776", "model.n_layers=1099511627776"),
    ("model.vocab_size=1099511627776", "model.vocab_size=1099511627776"),
    ("model.d_mlp=1099511627776", "model.d_mlp=1099511627776"),
    ("data.seq_len=1099511627776", "data.seq_len=1099511627776"),
    ("data.seq_len=1099511627776 data.packing=true train.batch_size=1", "data.seq_len=1099511627776"),
    ("train.batch_size=1099511627776", "train.batch_size=1099511627776"),
    ("train.batch_size=1099511627776 train.accumulate=1099511627776", "train.batch_size=1099511627776"),
    ("data.seq_len=8589934592 model.positions=learned train.batch_size=1", "data.seq_len=8589934592"),
]


@pytest.mark.parametrize("overrides, words", CONTRADICTIONS, ids=[overrides for overrides, _ in CONTRADICTIONS])
def test_what_does_not_fit_together_or_into_memory(tmp_path, capsys, overrides, words):
    (tmp_path / "small").write_bytes(b"a few bytes")
    assert words in refusal(capsys, ["train", *overrides.split()])
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


OPTIONS = [
    (["train", "--nproc", 2**70], "--nproc"),
    (["train", "--nproc", "-1"], "--nproc=-1"),
    (["train", "--rendezvous-timeout", "nan"], "--rendezvous-timeout=nan"),
    (["train", "--rendezvous-timeout", "0"], "--rendezvous-timeout=0"),
    (["check", "--rendezvous-timeout", "1e400"], "--rendezvous-timeout=inf"),
    (["train", "--rendezvous-timeout", "soon"], "--rendezvous-timeout"),
    (["train", "."], "CONFIG=."),
    (["train", "large.toml"], "too large"),
    (["train", "binary.toml"], "not UTF-8"),
    (["check", "data.path=absent"], "data.path='absent'"),
    (["data", "info", "small", "--seq-len", "-1"], "--seq-len=-1"),
    (["data", "info", "small", "--seq-len", 2**70], "--seq-len"),
    (["data", "info", "absent"], "absent"),
    (["data", "fetch", "enwik8", "--to", "small"], "--to=small"),
    (["export", "absent", "-o", "w"], "absent"),
    (["report", "small"], "small"),
    (["bench", "attention", "--lengths", 2**70], "--lengths"),
    (["bench", "attention", "--lengths", 2**40], "--lengths"),
    (["bench", "attention", "--batch", "-1"], "--batch=-1"),
    (["bench", "attention", "--batch", 2**40], "--lengths"),
    (["bench", "attention", "--seconds", "nan"], "--seconds=nan"),
    (["bench", "attention", "--check-upto", "-1"], "--check-upto=-1"),
    (["bench", "attention", "--repeat", "0"], "--repeat=0"),
    (["bench", "attention", "--dtype", "int8"], "int8"),
    (["bench", "train", "model.d_model=1099511627776"], "model.d_model"),
    (["bench", "train", "optim.lrr=1"], "nearest is optim.lr"),
    (["bench", "table", "absent.jsonl"], "absent.jsonl"),
    (["bench", "plot", "absent.jsonl"], "absent.jsonl"),
]


@pytest.mark.parametrize("arguments, words", OPTIONS, ids=[" ".join(map(str, a)) for a, _ in OPTIONS])
def test_options_and_files_of_every_command(tmp_path, capsys, arguments, words):
    (tmp_path / "small").write_bytes(b"a few bytes")
    (tmp_path / "binary.toml").write_bytes(b"\xff\x00")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(1 << 21)
    assert words in refusal(capsys, arguments)


FOLDERS = ["", "taken", "taken/below/it", "x" * 300, "/proc/run", "/sys/run/below"]


@pytest.mark.parametrize("out", FOLDERS)
def test_folders_that_cannot_be_written(tmp_path, capsys, out):
    (tmp_path / "taken").write_text("")
    assert "--out=" in refusal(capsys, ["train", "--out", out])
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


RANK = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
ENVIRONMENTS = [
    ({"RANK": None}, "RANK is not set"),
    ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
    ({"RANK": "first"}, "RANK='first'"),
    ({"RANK": "1"}, "RANK=1"),
    ({"RANK": "-1"}, "RANK=-1"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE='1.5'"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1"),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, "LOCAL_RANK=1"),
    ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE=2"),
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT=0"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR=no-such-host.invalid"),
    ({"MASTER_ADDR": "a" * 100}, "MASTER_ADDR="),
    ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS='many'"),
    ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS='0'"),
    ({"OMP_NUM_THREADS": ""}, "OMP_NUM_THREADS=''"),
]


@pytest.mark.parametrize("changes, words", ENVIRONMENTS, ids=[str(changes) for changes, _ in ENVIRONMENTS])
def test_environments(tmp_path, capsys, monkeypatch, changes, words):
    # LOCAL_RANK is there where RANK is missing, as it would be
    given = RANK | ({"LOCAL_RANK": "0"} if changes == {"RANK": None} else {}) | changes
    for name, value in given.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert words in refusal(capsys, ["train", "train.steps=1"])
    assert list(tmp_path.iterdir()) == []


def test_a_busy_port_is_named_at_once(tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in (RANK | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        assert f"MASTER_PORT={port}: rank 0 cannot listen at it" in refusal(capsys, ["train", "train.steps=1"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank, words", [(0, "1 of these ranks met"), (1, "found nobody there within 0.5 s")])
def test_ranks_that_do_not_come_are_named(tmp_path, capsys, monkeypatch, rank, words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (RANK | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    told = refusal(capsys, ["train", "train.steps=1", "--rendezvous-timeout", "0.5"])
    assert words in told
    assert "without 1" in told or rank == 1
    assert list(tmp_path.iterdir()) == []
