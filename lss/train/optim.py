"""Optimizers and the learning rate schedule, torch's own."""

from __future__ import annotations

import math

import torch
from torch import nn

from lss.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or plain SGD over the model's parameters, made after `parallelize`, which may have cut some.

    Weight decay acts on matrices (weights of two dimensions and more), not on norms' scales and shifts.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = []
    # sharded parameters are tensors of another type than whole ones, and one fused update takes one type
    for kind in dict.fromkeys(map(type, parameters)):
        mine = [p for p in parameters if type(p) is kind]
        groups += [
            {"params": [p for p in mine if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in mine if p.dim() < 2], "weight_decay": 0.0},
        ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


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
        group["lr"] = lr
