"""The memory of a run's own steps: what is told is what is there, and telling changes nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import lss
from lss.comm import control
from lss.config import load_config
from lss.model import Transformer
from lss.parallel import full_state_dict
from lss.planner import CLASSES, Meter, trace_step
from lss.planner.ledger import Ledger
from lss.planner.remedies import REMEDIES, remedies
from lss.planner.trace import noted
from lss.train.trainer import Trainer
from tests.distributed.model_cases import model_config
from tests.distributed.pool import mesh, pool
from tests.train.jobs import config_of

RUNS = {
    "plain": ["train.accumulate=2"],
    "sharded": ["parallel.fsdp=true", "memory.checkpointing=attention", "memory.offload=host", "train.dtype=float32"],
}


def trained(ranks: int, out: str, overrides: list[str], measured: bool):
    """(digest of all weights, what was measured, what was shown) after three steps."""
    config = config_of(ranks, "train.steps=3", "optim.warmup=0", *overrides)
    here = mesh(config.parallel.cp, config.parallel.dp)
    meter = Meter(config, torch.device("cpu"), control(here, "memory")) if measured else None
    trainer = Trainer(config, here, Path(out), meter=meter)
    trainer.train()
    digest = hashlib.sha256()
    for name, tensor in sorted(full_state_dict(trainer.model).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest(), trainer.memory, meter.table(trainer.memory) if meter else []


@pytest.mark.parametrize("name", RUNS)
def test_the_second_step_is_told_and_no_bit_changes(tmp_path, name):
    (with_it, facts, lines), (_, other, _) = pool(2).run(trained, 2, str(tmp_path / "a"), RUNS[name], True)
    (without, nothing, _), _ = pool(2).run(trained, 2, str(tmp_path / "b"), RUNS[name], False)
    assert with_it == without
    assert nothing == {}
    assert facts == other
    assert facts["step"] == 2
    assert {"weights", "optimizer", "activations"} <= facts["classes"].keys() <= CLASSES.keys() | {"other"}
    assert sum(facts["classes"].values()) - facts["classes"]["other"] == facts["bytes"]
    assert facts["classes"]["other"] > 20 << 20  # Python and torch themselves
    predicted = trace_step(config_of(2, *RUNS[name])).peak
    assert facts["bytes"] == pytest.approx(predicted.bytes, rel=0.15)
    assert facts["host"] == predicted.host
    assert f"peak memory of step 2, rank {facts['rank']}" in lines[0]
    assert len(lines) == 1 + sum(1 for n in (*facts["classes"].values(), facts["host"]) if n)


def short_of(operation):
    """What a meter says of an operation that no host has the memory for."""
    config = load_config(None, ["model.vocab_size=300"]).resolved(1)
    meter = Meter(config, torch.device("cpu"), control(mesh(1, 1), "memory"))
    from lss.train.models import build_model
    from lss.train.optim import build_optimizer

    model = build_model(config, mesh(1, 1))
    optimizer = build_optimizer(model, config.optim)
    with pytest.raises(RuntimeError) as caught, meter.step(1, model, optimizer):
        operation(model)
    return meter.sentence(caught.value)


def wide(model):
    """Logits of 2**45 tokens."""
    model.register_forward_pre_hook(lambda *_: None)
    torch.zeros(1, 128).expand(1 << 45, 128) @ model.embedding.weight.detach().t()


def update(model):
    model.embedding.weight.grad = torch.zeros_like(model.embedding.weight)
    held = torch.zeros(1 << 20)
    torch.empty(1 << 50)
    del held


def test_what_was_short_is_named():
    (said,) = pool(1).run(short_of, wide)
    assert "of logits less is needed with a smaller memory.tiles" in said
    (said,) = pool(1).run(short_of, update)
    assert said.startswith("rank 0 ran out of memory in step 1 (before)")
    assert "temporary 4.10 MiB" in said or "temporary 4.15 MiB" in said
    assert "can't allocate memory" in said


def test_remedies_leave_out_what_is_on():
    assert set(REMEDIES) == set(CLASSES) - {"host"}
    plain = load_config(None).resolved(2)
    assert remedies("optimizer", plain).startswith("parallel.fsdp=true")
    tight = load_config(None, ["parallel.fsdp=true", "memory.checkpointing=full", "memory.offload=disk"]).resolved(2)
    assert "fsdp" not in remedies("optimizer", tight)
    assert remedies("activations", tight) == "a larger train.accumulate, a larger parallel.cp or a shorter data.seq_len"


def frozen():
    """The classes that a ledger has noted of a step whose embedding is not trained, and the bytes of what is."""
    model = lss.parallelize(Transformer(model_config(), 8), mesh(1))
    model.embedding.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    ledger, ids = Ledger(), torch.zeros(1, 8, dtype=torch.int64)
    with noted(ledger, model, torch.optim.SGD(trained)):
        model(ids, ids).loss.backward()
    return ledger.peak().classes, sum(p.numel() * p.element_size() for p in trained)


def test_weights_that_are_not_trained_are_noted_without_gradients():
    """As of a model with adapters, whose other weights take no hook for a gradient."""
    ((classes, size),) = pool(1).run(frozen)
    assert 0 < classes["gradients"] <= size
