"""Fake tensors that repeat what they have seen are those that torch makes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lss.config import load_config
from lss.planner import Ledger, trace_step
from lss.planner.fakes import QuickFakes
from tests.planner.test_trace import RUNS, SMALL

KINDS = [RUNS["attention"], [*RUNS["hybrid-full"], "parallel.fsdp=true"],
         ["memory.offload=host", "memory.checkpointing=full", *RUNS["chunks"]], RUNS["learned"]]  # fmt: skip


@pytest.mark.parametrize("overrides", KINDS)
def test_a_trace_is_the_same(overrides):
    config, quick = load_config(None, [*SMALL, *overrides]).resolved(2), QuickFakes()
    trace_step(config)  # what a first step keeps in caches
    found = []
    for fakes in (FakeTensorMode(allow_non_fake_inputs=True), quick, quick):
        ledger = Ledger()
        found.append((trace_step(config, ledger=ledger, fakes=fakes), ledger._events, ledger._pieces))
    assert found[0] == found[1] == found[2]


def test_operations_are_asked_of_torch_once(monkeypatch):
    """Once for each set of shapes; but each time where tensors have data."""
    asked = []
    real = FakeTensorMode.dispatch

    def noted(self, func, *more):
        asked.append(str(func))
        return real(self, func, *more)

    monkeypatch.setattr(FakeTensorMode, "dispatch", noted)
    with QuickFakes():
        x = torch.zeros(4, 6)
        for _ in range(3):
            y = x.t() @ x + 1
            y.mul_(2)
            first, second = x.split(2)
        names = "t.default", "mm.default", "mul_.Tensor", "split.Tensor"
        assert [asked.count(f"aten.{name}") for name in names] == [1] * 4
        assert (first.shape, second.storage_offset(), y.stride()) == ((2, 6), 12, (6, 1))
        assert first.untyped_storage()._cdata == second.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert isinstance(y, FakeTensor)
        asked.clear()
        x.double() + torch.zeros(4, 6)
        assert x.double().dtype == torch.float64
        assert (x[:2] + 1).shape == (2, 6)  # other shapes
        assert (x + True).dtype != (x.bool() + True).dtype
    known = torch.zeros(4, 6)
    with QuickFakes():
        x = torch.zeros(4, 6)
        asked.clear()
        for _ in range(2):
            assert isinstance(x + known, FakeTensor)
        assert asked.count("aten.add.Tensor") == 2


def test_an_operand_that_changes_its_shape_is_not_repeated():
    with QuickFakes():
        for _ in range(2):
            x = torch.zeros(4, 6)
            x.t_()
            assert x.shape == (6, 4)
            x.resize_(3, 5)
            assert x.shape == (3, 5)
