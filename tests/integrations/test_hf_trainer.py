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
    losses, norms, weights = pool(1).run(jobs.plain, 2 * (world // cp), str(tmp_path / "one"))[0]
    for rank_losses, rank_norms, rank_weights in pool(world).run(jobs.cut, str(tmp_path / "cut"), cp, 2):
        assert len(rank_losses) == jobs.STEPS
        assert rank_losses == pytest.approx(losses, rel=2e-6)
        assert rank_norms == pytest.approx(norms, rel=2e-6)
        assert max(relative(rank_weights[name], weight) for name, weight in weights.items()) < 2e-6
    assert (tmp_path / "cut" / "saved" / "model.safetensors").is_file()


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
