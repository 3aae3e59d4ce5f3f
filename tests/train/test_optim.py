"""The schedule's formula, and what the optimizers are told."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lss.config import OptimConfig
from lss.train.optim import build_optimizer, learning_rate


def test_warm_up_then_cosine_to_a_tenth():
    config = OptimConfig(lr=2.0, warmup=10)
    rates = [learning_rate(step, 110, config) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[9] == 2.0
    assert rates[59] == pytest.approx(2.0 * 0.55)  # half way through the cosine
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[9:]))


def test_without_warm_up_and_with_sgd():
    assert learning_rate(1, 1, OptimConfig(lr=1.0, warmup=0)) == pytest.approx(0.1)
    sgd = OptimConfig(name="sgd", lr=1.0, warmup=0)
    assert [learning_rate(step, 5, sgd) for step in (1, 3, 5)] == [1.0] * 3
    assert learning_rate(1, 5, OptimConfig(name="sgd", lr=1.0, warmup=4)) == 0.25


def test_one_step_of_sgd_is_the_gradient():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=1.0, weight_decay=0.0))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.allclose(before - model.weight, model.weight.grad, rtol=0, atol=1e-6)


def test_decay_acts_on_matrices_only():
    groups = build_optimizer(torch.nn.Linear(3, 2), OptimConfig(weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], [p.dim() for p in group["params"]]) for group in groups] == [(0.3, [2]), (0.0, [1])]
