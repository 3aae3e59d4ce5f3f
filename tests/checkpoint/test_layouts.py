"""What is saved in one layout goes on in any other as if there had been no stop."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.checkpoint.jobs import steps
from tests.distributed.pool import pool

# name -> (ranks, overrides); the matrix is of all pairs
LAYOUTS = {
    "cp1": (1, []),
    "cp4": (4, []),
    "cp2-dp2": (4, ["parallel.dp=2"]),
    "tp2": (2, ["parallel.strategy=tp"]),
    "fsdp-cp3": (3, ["parallel.fsdp=true"]),
    "fsdp-cp2-dp2": (4, ["parallel.fsdp=true", "parallel.dp=2"]),
}
COMMON = ["model.positions=learned", "data.seq_len=42", "train.steps=4", "optim.warmup=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """In each layout: (folder with the save of step 3, loss and state of step 4 without a stop)."""
    found = {}
    for name, (ranks, overrides) in LAYOUTS.items():
        out = tmp_path_factory.mktemp(name) / "run"
        (_, losses, state), *_ = pool(ranks).run(steps, ranks, str(out), [*COMMON, *overrides], 3, 4)
        found[name] = out, losses[-1], state
    return found


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_a_step_after_loading_is_that_without_a_stop(tmp_path, runs, source, to):
    """Loss, weights and optimizer states of step 4, to 1e-12 in float64; the loader's place with them."""
    folder, loss, expected = runs[source]
    shutil.copytree(folder, tmp_path / "run")
    ranks, overrides = LAYOUTS[to]
    for start, losses, found in pool(ranks).run(steps, ranks, str(tmp_path / "run"), [*COMMON, *overrides], 0, 4):
        assert start == 3
        assert losses == pytest.approx([loss], rel=1e-12)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if source == to:
                assert torch.equal(found[name], value), name
            else:
                assert (found[name] - value).norm() <= 1e-12 * max(value.norm(), 1e-3), name
