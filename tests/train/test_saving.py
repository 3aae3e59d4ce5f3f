"""Samples are neither repeated nor missed, whatever changes between two starts of a run."""

from __future__ import annotations

import json

import pytest

from lss.checkpoint import verify
from tests.distributed.pool import pool
from tests.train.jobs import train_run

# a text of 37 samples of 48 bytes in its training part, so that a run of a few steps passes the end of an epoch
SAMPLES = 37


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(i * 7 % 251 for i in range(2000)))
    return [f"data.path={path}", "data.held_out=0.1", "train.log_samples=true", "checkpoint.every=1", "checkpoint.keep=99"]


def read(out):
    """The samples of each step."""
    return [json.loads(line)["ids"] for line in (out / "samples.jsonl").read_text().splitlines()]


def test_each_epoch_is_a_permutation_through_changes_of_layout_and_batch(tmp_path, text):
    """Starts of 2, 4 and 1 ranks with batches of 4, 6 and 5; what the ranks read is told by themselves."""
    out, steps = tmp_path / "run", 0
    starts = [(2, 4, ["train.accumulate=2"]), (4, 6, ["parallel.dp=2", "train.accumulate=3"]), (1, 5, []),
              (2, 4, ["optim.lr=0.1"])]  # fmt: skip
    for ranks, batch, changes in starts:
        steps += 6
        options = [*text, f"train.steps={steps}", f"train.batch_size={batch}", *changes]
        results = pool(ranks).run(train_run, ranks, str(out), options)
        assert results[0]["from"] == steps - 6
    rows = read(out)
    assert [len(row) for row in rows] == [4] * 6 + [6] * 6 + [5] * 6 + [4] * 6
    order = [sample for row in rows for sample in row]
    epochs = [order[i : i + SAMPLES] for i in range(0, len(order), SAMPLES)]
    assert len(epochs) == 4
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(SAMPLES))
    assert len(set(epochs[-1])) == len(epochs[-1])
    assert epochs[0] != epochs[1]
    state = verify(out / "checkpoints" / f"step_{steps}").read_state()["loader"]
    assert state == {"seed": 0, "epoch": 3, "sample": len(order) - 3 * SAMPLES}


def test_the_log_of_samples_is_cut_back_to_the_step_resumed(tmp_path, text):
    out = tmp_path / "run"
    options = [*text, "train.steps=4"]
    pool(2).run(train_run, 2, str(out), options)
    whole = read(out)
    for step in (3, 4):
        (out / "checkpoints" / f"step_{step}").rename(tmp_path / f"gone_{step}")
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"step": 5, "i')  # a torn line
    pool(2).run(train_run, 2, str(out), options)
    assert read(out) == whole
