"""AdamW with its state in 8 bits: torchao's, sharded or not, and saved so that a resumed run is the same to the bit."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lss.checkpoint import verify
from lss.comm import control
from lss.config import Refused, load_config
from lss.parallel import full_state_dict
from lss.planner import Meter, trace_step
from lss.train.memory import state_bytes
from lss.train.optim import build_optimizer, check_optimizer
from lss.train.trainer import Trainer
from tests.distributed.pool import mesh, pool
from tests.train.jobs import config_of

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
# the embedding (256 x 32) and the MLP's (128 x 32) have states of 8 bits, also in halves; norms have not
LOW = ["optim.name=adamw8bit", "train.dtype=float32", "model.d_mlp=256", "optim.lr=1e-2", "optim.warmup=0"]


def run(ranks: int, out: str, steps: int, overrides: list[str]):
    """(step begun at, loss, digest of weights and of all states of this rank, kinds of states, memory by class)."""
    config = config_of(ranks, f"train.steps={steps}", *LOW, *overrides)
    here = mesh(config.parallel.cp, config.parallel.dp)
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes, and is torchao's to test
        trainer = Trainer(config, here, Path(out), meter=Meter(config, torch.device("cpu"), control(here, "memory")))
        begun, digest, kinds = trainer.done_steps, hashlib.sha256(), set()
        loss = trainer.train()["loss"]
    for name, tensor in sorted(full_state_dict(trainer.model).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for _, parameter in sorted(trainer.model.named_parameters()):
        for key, state in sorted(trainer.optimizer.state[parameter].items()):  # a resumed run has them in another order
            state = getattr(state, "_local_tensor", state)
            kinds.add((key, hasattr(state, "codes")))
            for x in (state.codes, state.scale) if hasattr(state, "codes") else (state,):
                digest.update(key.encode() + x.contiguous().numpy().tobytes())
    return begun, loss, digest.hexdigest(), kinds, trainer.memory


@needs_torchao
@pytest.mark.parametrize("overrides", [[], ["parallel.fsdp=true"]], ids=["whole", "sharded"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, overrides):
    options = ["checkpoint.every=3", *overrides]
    whole = pool(2).run(run, 2, str(tmp_path / "run"), 5, options)
    verify(tmp_path / "run" / "checkpoints" / "step_3")
    (tmp_path / "run" / "checkpoints" / "step_5").rename(tmp_path / "gone")
    resumed = pool(2).run(run, 2, str(tmp_path / "run"), 5, options)
    for a, b in zip(whole, resumed, strict=True):
        assert (a[0], b[0]) == (0, 3)
        assert a[2] == b[2]
        assert {("exp_avg", True), ("exp_avg", False), ("exp_avg_sq", True)} <= a[3]


@needs_torchao
def test_it_trains_as_adamw_does_in_a_quarter_of_the_state(tmp_path):
    low = pool(1).run(run, 1, str(tmp_path / "low"), 20, [])[0]
    full = pool(1).run(run, 1, str(tmp_path / "full"), 20, ["optim.name=adamw"])[0]
    assert low[1] == pytest.approx(full[1], rel=0.02)
    taken, whole = (one[4]["classes"]["optimizer"] for one in (low, full))
    # a map of 256 values stands with each state, and small states are whole
    assert 0.25 * whole < taken < 0.6 * whole
    assert trace_step(config_of(1, *LOW)).peak.classes["optimizer"] < 0.3 * whole


@needs_torchao
def test_another_layout_goes_on(tmp_path):
    straight = pool(2).run(run, 2, str(tmp_path / "run"), 6, ["parallel.fsdp=true", "checkpoint.every=3"])[0]
    (tmp_path / "run" / "checkpoints" / "step_6").rename(tmp_path / "gone")
    ((begun, loss, *_),) = pool(1).run(run, 1, str(tmp_path / "run"), 6, ["checkpoint.every=3"])
    assert begun == 3
    assert loss == pytest.approx(straight[1], rel=2e-3)


def test_refusals(monkeypatch):
    with pytest.raises(Refused, match="computes in float32"):
        load_config(None, ["optim.name=adamw8bit", "train.dtype=float64"])
    config = load_config(None, ["optim.name=adamw8bit"])
    monkeypatch.setattr("lss.train.optim.find_spec", lambda name: None)
    with pytest.raises(Refused, match="torchao is not installed"):
        check_optimizer(config.optim)
    with pytest.raises(Refused, match="torchao is not installed"):
        build_optimizer(torch.nn.Linear(2, 2), config.optim)
    plain = load_config(None)
    assert state_bytes(config.resolved(1)) / state_bytes(plain.resolved(1)) == pytest.approx(2.508 / 4, rel=1e-3)
