"""Optimizers, torch's own and torchao's, and the learning rate schedule."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lss.config import OptimConfig
from lss.config.errors import refuse
from lss.train.host_optim import HostAdamW

# torchao quantizes states of so many values or more, in blocks of so many.
LOW_BIT_FROM, LOW_BIT_BLOCK = 4096, 256
# Bytes of all states beside AdamW's: a code and a part of a scale for each float32.
STATE_PART = {"adamw": 1.0, "adamw8bit": 0.25 + 1 / LOW_BIT_BLOCK, "sgd": 0.0}


def build_optimizer(model: nn.Module, config: OptimConfig, place: str = "device") -> torch.optim.Optimizer:
    """AdamW or plain SGD over the model's parameters, made after `parallelize`, which may have cut some.

    Weight decay acts on matrices (weights of two dimensions and more), not on norms' scales and shifts. "adamw8bit" keeps
    both moments in 8 bits with a scale for each 256 values (Dettmers et al. 2021, arXiv 2110.02861; torchao's), but those of
    small parameters and of parts that 256 does not divide; its update is compiled. With place "host" AdamW's moments lie in
    host memory, where the update is computed (`lss.train.host_optim`).

    Raises:
        Refused: as `check_optimizer`; or shards of a parameter of which some would be of 8 bits and others not.
    """
    check_optimizer(config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    # sharded parameters are tensors of another type than whole ones, and one fused update takes one type
    for kind in dict.fromkeys(map(type, parameters)):
        mine = [p for p in parameters if type(p) is kind]
        groups += [
            {"params": [p for p in mine if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in mine if p.dim() < 2], "weight_decay": 0.0},
        ]
    if config.name == "adamw8bit":
        from torchao.optim import AdamW8bit

        for name, p in model.named_parameters():
            _refuse_uneven(name, p)
        return AdamW8bit(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    if place == "host":
        assert config.name == "adamw", "the config refuses others"
        return HostAdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def check_optimizer(config: OptimConfig) -> None:
    """Refuse an optimizer whose package is not there."""
    if config.name == "adamw8bit" and find_spec("torchao") is None:
        fit = 'torchao is not installed; pip install --no-deps torchao, or use "adamw"'
        raise refuse("optim.name", '"adamw8bit"', fit)


def _refuse_uneven(name: str, parameter: nn.Parameter) -> None:
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return
    each, width = -(-parameter.shape[0] // mesh.size()), parameter[:1].numel()
    rows = {min(each, max(0, parameter.shape[0] - rank * each)) for rank in range(mesh.size())} - {0}
    if len({n * width >= LOW_BIT_FROM and n * width % LOW_BIT_BLOCK == 0 for n in rows}) > 1:
        fit = (f"{mesh.size()} ranks cut the {parameter.shape[0]} rows of {name} so that some parts could be of 8 bits and "
               'others not; use another number of ranks, or "adamw"')  # fmt: skip
        raise refuse("optim.name", '"adamw8bit"', fit)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """lr at `step`, counted from 1: lr * min(1, step / warmup) * decay.

    Decay is 1 during warm-up, then a cosine from 1 to 0.1 at the last step; for SGD it stays 1.
    """
    warm = min(1.0, step / config.warmup) if config.warmup else 1.0
    if config.name == "sgd" or step <= config.warmup:
        return config.lr * warm
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # compiled code would be compiled anew for each number
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
