"""Which save a run goes on from, which saves stay, and folders that not all ranks see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from lss.checkpoint import probe_shared, saved_steps, verify
from lss.comm import control
from tests.checkpoint.jobs import steps, trainer_of
from tests.distributed.pool import mesh, pool
from tests.faults.ranks import Run
from tests.train.jobs import train_run


def damage(folder: Path) -> str:
    path = folder / "weights-00001-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 4
    path.write_bytes(raw)
    return str(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 2 ranks with saves 1 to 4."""
    out = tmp_path_factory.mktemp("find") / "run"
    pool(2).run(train_run, 2, str(out), ["train.steps=4", "checkpoint.every=1", "checkpoint.keep=9"])
    return out


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def go_on(run, *overrides):
    return pool(2).outcomes(train_run, 2, str(run), ["train.steps=6", "checkpoint.keep=9", *overrides])


def test_a_damaged_newest_save_is_refused_by_name_on_every_rank(run):
    path = damage(run / "checkpoints" / "step_4")
    before = sorted(run.rglob("*"))
    outcomes = go_on(run)
    assert [ok for ok, _ in outcomes] == [False, False]
    assert len({what[:2] for _, what in outcomes}) == 1
    name, sentence, _ = outcomes[0][1]
    assert name == "Refused"
    assert sentence.startswith(path)
    assert sentence.endswith("checkpoint.fallback=true takes the next older good one.")
    assert sorted(run.rglob("*")) == before


def test_the_next_older_good_one_is_taken_when_told(run):
    """Two damaged ones are passed over, kept under another name, and their steps saved again."""
    damage(run / "checkpoints" / "step_4")
    (run / "checkpoints" / "step_3" / "manifest.json").unlink()
    again = Run(run, 2, ["train.steps=6", "checkpoint.keep=9", "checkpoint.fallback=true", "checkpoint.every=1"])
    assert again.wait() == [0, 0], again.said()
    assert again.said().count("going on from step 2") == 2
    assert "from step 3" in again.said()
    assert saved_steps(run / "checkpoints") == [6, 5, 4, 3, 2, 1]
    assert verify(run / "checkpoints" / "step_4").step == 4
    assert (run / "checkpoints" / "step_4.damaged").is_dir()
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6]


def test_where_none_is_good_all_is_refused(run):
    for step in (1, 2, 3, 4):
        damage(run / "checkpoints" / f"step_{step}")
    outcomes = go_on(run, "checkpoint.fallback=true")
    assert all(not ok and "no older checkpoint of the run is good" in what[1] for ok, what in outcomes), outcomes
    assert saved_steps(run / "checkpoints") == [4, 3, 2, 1]


def test_what_a_stopped_save_left_is_no_save_and_goes_at_the_next(run):
    left = run / "checkpoints" / ".step_5.writing"
    shutil.copytree(run / "checkpoints" / "step_4", left)
    (run / "checkpoints" / ".step_1.removing").mkdir()
    results = go_on(run)
    assert all(ok and result["from"] == 4 for ok, result in results)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", *(f"step_{n}" for n in (1, 2, 3, 4, 6))]


def test_a_link_is_no_save(run):
    (run / "checkpoints" / "step_4").rename(run / "elsewhere")
    (run / "checkpoints" / "step_4").symlink_to(run / "elsewhere")
    assert saved_steps(run / "checkpoints") == [3, 2, 1]


def test_the_newest_and_every_nth_stay(tmp_path):
    options = ["train.steps=9", "checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=3"]
    pool(1).run(train_run, 1, str(tmp_path), options)
    assert saved_steps(tmp_path / "checkpoints") == [9, 8, 6, 3]


def test_a_saved_step_is_not_saved_again(tmp_path):
    pool(2).run(steps, 2, str(tmp_path), ["train.steps=3"], 1, 1)
    before = (tmp_path / "checkpoints" / "step_1" / "manifest.json").stat().st_ino
    assert pool(2).run(_save_again, 2, str(tmp_path), 1) == [1, 1]
    assert (tmp_path / "checkpoints" / "step_1" / "manifest.json").stat().st_ino == before


def test_a_run_can_be_saved_before_its_first_step(tmp_path):
    assert pool(2).run(_save_again, 2, str(tmp_path), 0) == [0, 0]
    assert verify(tmp_path / "checkpoints" / "step_0").step == 0
    start, losses, _ = pool(2).run(steps, 2, str(tmp_path), ["train.steps=3"], 9, 2)[0]
    assert start == 0
    assert losses == pool(2).run(steps, 2, str(tmp_path / "other"), ["train.steps=3"], 9, 2)[0][1]


def _save_again(ranks, out, step):
    trainer = trainer_of(ranks, out, ["train.steps=3"])
    trainer.save(step)
    trainer.save(step)
    trainer.finish_saves()
    return trainer.done_steps


def _probe(ranks, folder):
    # as on hosts without a common file system: every rank has a folder of its own
    probe_shared(Path(folder) / str(dist.get_rank()), control(mesh(ranks), "checkpoints"))


def test_ranks_that_do_not_see_one_folder_are_refused(tmp_path):
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    outcomes = pool(3).outcomes(_probe, 3, str(tmp_path))
    assert [ok for ok, _ in outcomes] == [False] * 3
    assert all("rank 1 does not see what rank 0 writes there" in what[1] for _, what in outcomes)
    assert list(tmp_path.rglob(".probe")) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "0").write_text("a file where the folder should be")
    outcomes = pool(2).outcomes(_probe, 2, str(tmp_path))
    assert all(not ok and what[0] == "Refused" and "cannot be written" in what[1] for ok, what in outcomes), outcomes


@pytest.mark.parametrize("change", ["train.dtype=float32", "train.seed=5"])
def test_what_would_not_go_on_is_refused(run, change):
    outcomes = go_on(run, change)
    assert all(not ok and what[0] == "Refused" and change.split("=")[0] in what[1] for ok, what in outcomes), outcomes
