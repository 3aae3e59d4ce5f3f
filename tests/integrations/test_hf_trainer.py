"""transformers' Trainer with the mixin gives one process's losses, norms and weights; what would not is refused."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from lss.config import Refused
from tests.distributed.pool import pool
from tests.integrations import trainer_jobs as jobs

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("accelerate") is None, reason="transformers and accelerate are needed"
)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("world, cp", [(2, 2), (2, 1), (4, 2)])
def test_trainer_is_that_of_one_process(tmp_path, world, cp):
    # the same sequences a step: dp groups take two each, one process all of them
    losses, norms, weights, _ = pool(1).run(jobs.plain, 2 * (world // cp), str(tmp_path / "one"))[0]
    for rank_losses, rank_norms, rank_weights, _ in pool(world).run(jobs.cut, str(tmp_path / "cut"), cp, 2):
        assert len(rank_losses) == jobs.STEPS
        assert rank_losses == pytest.approx(losses, rel=2e-6)
        assert rank_norms == pytest.approx(norms, rel=2e-6)
        assert max(relative(rank_weights[name], weight) for name, weight in weights.items()) < 2e-6
    assert (tmp_path / "cut" / "saved" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "world, cp, held_out", [(2, 2, 8), (2, 2, 7), (2, 1, 8), (2, 1, 7), (2, 1, 5), (4, 2, 6), (4, 2, 9)]
)
def test_evaluation_inside_training_is_that_of_one_process(tmp_path, world, cp, held_out):
    """Where the sequences do not fill the last batch too: those that fill it up are not counted."""
    others = {"held_out": held_out}
    *_, expected = pool(1).run(jobs.plain, 2 * (world // cp), str(tmp_path / "one"), others)[0]
    assert len(set(expected)) == jobs.STEPS
    for *_, found in pool(world).run(jobs.cut, str(tmp_path / "cut"), cp, 2, others):
        assert found == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("world, cp", [(2, 2), (4, 2)])
def test_a_run_goes_on_from_a_checkpoint_of_trainer(tmp_path, world, cp):
    """Three steps, and one more from the save of the second, with AdamW's state, to the bit."""
    others = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    straight = pool(world).run(jobs.cut, str(tmp_path), cp, 2, others)
    resumed = pool(world).run(jobs.cut, str(tmp_path), cp, 2, others | {"resume": 2})
    for (losses, norms, weights, _), (again, norms_again, weights_again, _) in zip(straight, resumed, strict=True):
        assert len(losses) == jobs.STEPS
        assert (again, norms_again) == (losses, norms)  # those before the save are told by it
        assert all((weights_again[name] == weight).all() for name, weight in weights.items())


@pytest.mark.parametrize("world, cp", [(2, 2), (4, 2)])
def test_bfloat16_is_as_near_to_float32_as_on_one_process(tmp_path, world, cp):
    rows, steps = 2 * (world // cp), {"max_steps": 1, "max_grad_norm": 1e9}
    *_, start, _ = pool(1).run(jobs.plain, rows, str(tmp_path / "none"), steps | {"learning_rate": 0.0})[0]
    (exact,), _, to, _ = pool(1).run(jobs.plain, rows, str(tmp_path / "one"), steps)[0]
    *_, half_to, _ = pool(1).run(jobs.plain, rows, str(tmp_path / "half"), steps | {"bf16": True})[0]

    def far(weights):
        """How far the whole update is from that of float32."""
        apart = sum(float((weights[name] - to[name]).double().square().sum()) for name in to)
        return (apart / sum(float((to[name] - start[name]).double().square().sum()) for name in to)) ** 0.5

    assert 1e-4 < far(half_to) < 0.1
    for (loss,), _, weights, _ in pool(world).run(jobs.cut, str(tmp_path / "cut"), cp, 2, steps | {"bf16": True}):
        assert 1e-4 < far(weights) < 1.25 * far(half_to)
        assert loss == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("world, cp", [(2, 2), (4, 2)])
def test_a_plain_loop_gathers_the_numbers_of_each_sequence_once(world, cp):
    """Seven sequences, two a group and batch: in their order, without what fills up the last batch; objects are refused."""
    for tensors, told in pool(world).run(jobs.gathered, cp, 7):
        assert tensors == list(range(7))
        assert len(told) == 2
        assert all("give tensors" in words for words in told)


def test_what_would_be_wrong_is_refused(tmp_path):
    from transformers import Trainer

    from lss.integrations.hf.trainer import LSSTrainerMixin, _refuse_arguments
    from tests.integrations.hf_cases import build

    class Mixed(LSSTrainerMixin, Trainer):
        pass

    import torch

    with pytest.raises(Refused, match="not laid out over ranks yet"):
        Mixed(model=build("llama", torch.float32), args=jobs.arguments(tmp_path, 2))
    args = jobs.arguments(tmp_path, 2)
    args.label_smoothing_factor = 0.1
    with pytest.raises(Refused, match=r"label_smoothing_factor=0\.1"):
        _refuse_arguments(args, {})
    with pytest.raises(Refused, match="compute_metrics"):
        _refuse_arguments(None, {"compute_metrics": print})
