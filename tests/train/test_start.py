"""A new run that starts with the weights of another one."""

from __future__ import annotations

import pytest

from lss.cli import main
from tests.distributed.pool import pool
from tests.train.jobs import TINY, train_run


def run(ranks, out, *overrides):
    return pool(ranks).run(train_run, ranks, str(out), list(overrides))


@pytest.fixture
def first(tmp_path):
    """A run of two steps, and its weights."""
    return tmp_path / "first", run(2, tmp_path / "first", "train.steps=2", "optim.warmup=0")[0]["weights"]


@pytest.mark.parametrize(
    "ranks, overrides",
    [(1, ["data.seq_len=96"]), (3, ["data.seq_len=40", "model.windows=[16,0]"]), (2, ["parallel.fsdp=true"]),
     (1, ["memory.optimizer=host", "train.seed=3"])],
)  # fmt: skip
def test_a_run_starts_with_the_weights_of_another_at_any_length(tmp_path, first, ranks, overrides):
    """With a rate of 0 the weights stay; a save by its own name is as good as its run's."""
    folder, weights = first
    starts = (folder, folder / "checkpoints" / "step_2")
    still = ["train.steps=1", "optim.lr=0", f"checkpoint.start={starts[ranks % 2]}", *overrides]
    for result in run(ranks, tmp_path / "second", *still):
        assert result["from"] == 0
        assert len(result["losses"]) == 1
        for name, weight in weights.items():
            assert (result["weights"][name] == weight).all(), name


def test_a_run_goes_on_with_its_own_weights(tmp_path, first):
    """Those that it started with are needed no longer."""
    folder, _ = first
    options = [f"checkpoint.start={folder}", "checkpoint.every=2", "data.seq_len=40"]
    straight = run(2, tmp_path / "second", *options, "train.steps=4")[0]
    (tmp_path / "second" / "checkpoints" / "step_4").rename(tmp_path / "gone")
    folder.rename(tmp_path / "elsewhere")
    resumed = run(2, tmp_path / "second", *options, "train.steps=4")[0]
    assert resumed["from"] == 2
    assert resumed["digest"] == straight["digest"]


@pytest.mark.parametrize(
    "overrides, words",
    [(["checkpoint.start=nowhere"], "checkpoint.start=nowhere"), (["model.d_mlp=64"], "model.d_mlp=64"),
     (["model.n_heads=2"], "model.n_heads=2"), (["checkpoint.start={}/checkpoints"], "not a checkpoint")],
)  # fmt: skip
def test_what_cannot_be_started_with_is_refused_in_a_sentence_before_ranks_start(tmp_path, first, capsys, overrides, words):
    folder, _ = first
    settings = [*TINY, f"checkpoint.start={folder}", *(text.format(folder) for text in overrides)]
    assert main(["train", *settings, "--out", str(tmp_path / "second"), "--nproc", "2"]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_damaged_weights_and_a_table_of_another_length_are_refused_on_all_ranks(tmp_path):
    learned, folder = "model.positions=learned", tmp_path / "first"
    run(2, folder, "train.steps=1", learned)
    start = f"checkpoint.start={folder}"
    shorter = pool(2).outcomes(train_run, 2, str(tmp_path / "second"), [start, learned, "data.seq_len=40"])
    victim = next((folder / "checkpoints" / "step_1").glob("weights*"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    damaged = pool(2).outcomes(train_run, 2, str(tmp_path / "third"), [start, learned])
    for outcomes, words in ((shorter, "position_table"), (damaged, victim.name)):
        for ok, error in outcomes:
            assert not ok
            assert error[0] == "Refused"
            assert words in error[1]
