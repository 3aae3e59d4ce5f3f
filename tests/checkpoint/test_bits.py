"""A run that stops and goes on gives the bits of the run that does not."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.checkpoint.jobs import steps
from tests.distributed.pool import pool

CASES = {
    "cp2": (2, []),
    "cp3-learned-bfloat16-dropout": (3, ["model.positions=learned", "train.dtype=bfloat16", "model.dropout=0.1"]),
    "cp2-dp2-accumulate": (4, ["parallel.dp=2", "train.accumulate=2", "checkpoint.background=true"]),
    "tp2-float32": (2, ["parallel.strategy=tp", "train.dtype=float32"]),
    "sgd": (2, ["optim.name=sgd", "model.positions=learned"]),
}


def halves(tmp_path, ranks, overrides, count):
    """`count` steps at once, and as two halves: each (losses, state) of every rank."""
    overrides = [f"train.steps={count}", "train.deterministic=true", *overrides]
    straight = pool(ranks).run(steps, ranks, str(tmp_path / "one"), overrides, 0, count)
    first = pool(ranks).run(steps, ranks, str(tmp_path / "two"), overrides, count // 2, count // 2)
    # other runs have used these processes since, as a start anew would have
    second = pool(ranks).run(steps, ranks, str(tmp_path / "two"), overrides, 0, count)
    return straight, first, second


@pytest.mark.parametrize("count, case", [(100, "cp2"), *((20, case) for case in CASES if case != "cp2")])
def test_two_halves_are_the_whole_to_the_bit(tmp_path, count, case):
    """Losses, weights and optimizer states."""
    ranks, overrides = CASES[case]
    straight, first, second = halves(tmp_path, ranks, overrides, count)
    for (_, losses, whole), (_, before, _), (start, after, state) in zip(straight, first, second, strict=True):
        assert start == count // 2
        assert before + after == losses
        assert state.keys() == whole.keys()
        assert [name for name, value in whole.items() if not torch.equal(value, state[name])] == []


def test_random_states_come_back_where_the_layout_is_the_same(tmp_path):
    assert pool(2).run(_draws, 2, str(tmp_path / "a"), [])[0] is True
    assert pool(2).run(_draws, 2, str(tmp_path / "b"), ["parallel.dp=2"])[0] is False


def _draws(ranks, out, changes):
    from tests.checkpoint.jobs import trainer_of

    trainer = trainer_of(ranks, out, [])
    torch.manual_seed(3 + trainer.mesh.get_rank())
    trainer.save(1)
    trainer.finish_saves()
    expected = torch.rand(3)
    torch.manual_seed(99)
    trainer_of(ranks, out, changes)
    return torch.equal(torch.rand(3), expected)


def test_a_save_of_few_parameters_has_files_of_those_who_wrote(tmp_path):
    """SGD has no state, so no optimizer file; it loads all the same."""
    pool(2).run(steps, 2, str(tmp_path / "run"), ["optim.name=sgd", "train.steps=2"], 1, 1)
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "step_1").iterdir())
    assert names == ["manifest.json", "state.json", *(f"weights-0000{r}-of-00002.safetensors" for r in (0, 1))]
    shutil.rmtree(tmp_path / "run")
