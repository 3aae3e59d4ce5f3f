"""AdamW's state in host memory: the values of the device's, to the bit where both are a CPU, and its bytes told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lss.checkpoint.layout import home_of, local_of
from lss.comm import control
from lss.config import OptimConfig, Refused, load_config
from lss.planner import Meter, make_plan, trace_step
from lss.planner.hardware import find_hardware
from lss.planner.remedies import remedies
from lss.train.host_optim import HostAdamW
from lss.train.memory import host_state_bytes, refuse_too_large, state_bytes
from lss.train.optim import build_optimizer
from lss.train.trainer import Trainer
from tests.distributed.pool import mesh, pool
from tests.train.jobs import config_of

HOST = "memory.optimizer=host"
# the norm of every gradient is above the bound, so that clipping changes each
OPTIONS = ["train.steps=5", "train.dtype=float32", "optim.clip=0.05", "optim.lr=1e-2", "optim.warmup=0"]
CASES = {
    "cp1": (1, []),
    "cp2-learned-background": (2, ["model.positions=learned", "checkpoint.background=true"]),
    # four sinks on three ranks: the last has none of them
    "cp3-fsdp-empty-shards": (3, ["parallel.fsdp=true", "model.sinks=true"]),
    "cp2-dp2-accumulate": (4, ["parallel.dp=2", "train.accumulate=2"]),
    "cp2-dp2-fsdp-bfloat16": (4, ["parallel.dp=2", "parallel.fsdp=true", "train.dtype=bfloat16"]),
    "tp2": (2, ["parallel.strategy=tp"]),
}


def run(ranks: int, out: str, overrides: list[str], save_at: int, until: int):
    """(step begun at, losses, norms, this rank's parts of all weights and states) of a run up to step `until`."""
    config = config_of(ranks, *OPTIONS, *overrides)
    trainer = Trainer(config, mesh(config.parallel.cp, config.parallel.dp), Path(out))
    losses, norms = [], []
    for step in range(trainer.done_steps + 1, until + 1):
        row = trainer.train_step(step)
        losses.append(row["loss"])
        norms.append(row["grad_norm"])
        if step == save_at:
            trainer.save(step)
    trainer.finish_saves()
    parts = {}
    for name, parameter in trainer.model.named_parameters():
        parts[name] = local_of(parameter).clone()
        state = trainer.optimizer.state[home_of(trainer.optimizer, parameter)]
        parts |= {f"{name}/{key}": local_of(value).clone() for key, value in state.items()}
    return trainer.done_steps, losses, norms, parts


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_the_devices_and_runs_go_on_in_either_place(tmp_path, case):
    ranks, overrides = CASES[case]
    device = pool(ranks).run(run, ranks, str(tmp_path / "device"), overrides, 3, 5)
    host = pool(ranks).run(run, ranks, str(tmp_path / "host"), [*overrides, HOST], 3, 3)
    resumed = pool(ranks).run(run, ranks, str(tmp_path / "host"), [*overrides, HOST], 0, 5)
    moved = pool(ranks).run(run, ranks, str(tmp_path / "device"), [*overrides, HOST], 0, 5)
    for (_, losses, norms, whole), (_, before, _, _), again, other in zip(device, host, resumed, moved, strict=True):
        assert min(norms) > 0.05
        assert before + again[1] == losses
        assert other[1] == losses[3:]
        for start, _, _, parts in (again, other):
            assert start == 3
            assert parts.keys() == whole.keys()
            assert [name for name, value in whole.items() if not torch.equal(value, parts[name])] == []


def pair():
    """The same small model twice, with parameters of odd sizes."""
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 11), nn.Linear(11, 1)))
    return models


def test_buckets_missing_gradients_and_changed_weights():
    config = OptimConfig(lr=0.1)
    (plain, other), batch = pair(), torch.randn(8, 37)
    device = build_optimizer(plain, config)
    groups = [{"params": list(other.parameters())[:3], "weight_decay": 0.1}, {"params": list(other.parameters())[3:],
              "weight_decay": 0.0}]  # fmt: skip
    for group, like in zip(groups, device.param_groups, strict=True):
        group["params"] = [q for p, q in zip(plain.parameters(), other.parameters(), strict=True)
                           if any(p is one for one in like["params"])]  # fmt: skip
        group["weight_decay"] = like["weight_decay"]
    host = HostAdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, bucket_bytes=600)
    assert len(host.param_groups) > 3
    for step in range(6):
        for model, optimizer in ((plain, device), (other, host)):
            optimizer.zero_grad()
            # in steps 2 and 3 the last layer has no gradient, and so neither decay nor state's step
            (model if step not in (2, 3) else model[:3])(batch).square().sum().backward()
            if step == 4:
                with torch.no_grad():
                    model[0].weight.mul_(0.5)
            optimizer.step()
        for p, q in zip(plain.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
    assert int(host.state[host.home(other[3].weight)]["step"]) == 4
    host.zero_grad()
    assert all(p.grad is None for p in other.parameters())


def measured(out: str, overrides: list[str]):
    config = config_of(2, "train.steps=2", "train.dtype=float32", *overrides)
    here = mesh(config.parallel.cp, config.parallel.dp)
    trainer = Trainer(config, here, Path(out), meter=Meter(config, torch.device("cpu"), control(here, "memory")))
    trainer.train()
    return trainer.memory, trainer.meter.table(trainer.memory), sum(p.numel() for p in trainer.model.parameters())


def test_its_bytes_are_the_hosts(tmp_path):
    facts, lines, count = pool(2).run(measured, str(tmp_path / "run"), [HOST])[0]
    config = config_of(2, "train.dtype=float32", HOST)
    traced, device = trace_step(config).peak, trace_step(config_of(2, "train.dtype=float32")).peak
    assert "optimizer" not in facts["classes"].keys() | traced.classes.keys()
    assert facts["host"] == traced.host
    largest = 4 * count  # of two buckets, matrices and norms; all but the norms' are in the first
    assert host_state_bytes(config) == 12 * count
    assert 12 * count + largest < facts["host"] < 12 * count + 2 * largest + 4096
    assert any(line.startswith("  host") for line in lines)
    assert traced.bytes == device.bytes - device.classes["optimizer"]


def test_plans_and_warnings_know_it():
    shape = ["model.preset=llama-3.2-1b", "model.n_layers=3", "data.seq_len=8192", "train.batch_size=1", "train.dtype=bf16"]
    plain, host = (load_config(None, [*shape, *more]).resolved(1) for more in ([], [HOST]))
    plans = [make_plan(c, find_hardware("h100")) for c in (plain, host)]
    without, with_it = (p.peak for p in plans)
    assert "optimizer" not in with_it.classes
    assert with_it.bytes < without.bytes
    # weights once more, two moments and gradients of two buckets, of which the largest is the embedding
    assert host_state_bytes(host) < with_it.host < host_state_bytes(host) * 5 / 3
    assert plans[1].seconds["update"] > plans[0].seconds["update"]
    assert state_bytes(plain) - state_bytes(host) == host_state_bytes(host) * 2 // 3
    assert HOST in remedies("optimizer", plain).replace('"', "")
    assert HOST not in remedies("optimizer", host).replace('"', "")


def test_refusals(monkeypatch):
    for name, why in (("sgd", "keeps no state"), ("adamw8bit", "compiled for the device")):
        with pytest.raises(Refused, match=f'memory.optimizer="host": optim.name="{name}": .*{why}'):
            load_config(None, [HOST, f"optim.name={name}"])
    config = load_config(None, [HOST]).resolved(1)
    monkeypatch.setattr("lss.train.memory.all_memory", lambda: host_state_bytes(config) * 2 - 1)
    with pytest.raises(Refused, match=r'memory.optimizer="host": 2 ranks take .* GiB of this host'):
        refuse_too_large(config, "cpu", 2)
