"""Saves that are written while training goes on hold the values of their own step."""

from __future__ import annotations

import os

import pytest
import torch

from lss.checkpoint import read_weights, verify
from tests.checkpoint.jobs import copies_under_way, helped_copies, late_copy, late_save, no_copies, policies
from tests.distributed.pool import pool


def test_a_late_save_holds_the_values_of_its_step(tmp_path):
    """The writer is slowed down until two more steps are done."""
    results = pool(2).run(late_save, 2, str(tmp_path / "run"), ["model.positions=learned"])
    assert all(unfinished for unfinished, _, _ in results), "the writer was not late: the test proves nothing"
    checkpoint = verify(tmp_path / "run" / "checkpoints" / "step_2")
    _, then, later = results[0]
    for name, weight in read_weights(checkpoint).items():
        assert torch.equal(weight, then[f"weights {name}"]), name
        assert not torch.equal(weight, later[f"weights {name}"]), name
    states = checkpoint.tensors("optimizer")
    assert len(states) == 2 * len(checkpoint.tensors("weights"))
    assert checkpoint.read_state()["loader"] == {"seed": 0, "epoch": 0, "sample": 8}


def test_the_update_waits_for_copies_that_are_late(tmp_path):
    """Copies are made beside forward and backward; weights and optimizer states are those of the save all the same."""
    results = pool(2).run(late_copy, 2, str(tmp_path / "run"))
    assert all(late for late, _, _ in results), "the copies were not late: the test proves nothing"
    checkpoint = verify(tmp_path / "run" / "checkpoints" / "step_1")
    _, then, later = results[0]
    for name, weight in read_weights(checkpoint).items():
        assert torch.equal(weight, then[f"weights {name}"]), name
        assert not torch.equal(weight, later[f"weights {name}"]), name


def test_what_the_saving_thread_has_had_no_time_to_copy_the_update_copies(tmp_path):
    results = pool(2).run(helped_copies, 2, str(tmp_path / "run"))
    assert [(helped, given) for helped, given, _ in results] == [(True, False)] * 2
    weights = dict(read_weights(verify(tmp_path / "run" / "checkpoints" / "step_1")))
    assert weights
    assert all(torch.equal(weight, results[0][2][f"weights {name}"]) for name, weight in weights.items())


def test_nothing_is_written_while_the_update_still_copies_it(tmp_path):
    results = pool(2).run(copies_under_way, 2, str(tmp_path / "run"))
    assert all(reached for reached, _ in results), "the update copied nothing: the test proves nothing"
    checkpoint = verify(tmp_path / "run" / "checkpoints" / "step_1")
    found = {f"weights {name}": x for name, x in read_weights(checkpoint).items()}
    states = checkpoint.tensors("optimizer")
    assert found
    assert len(states) == 2 * len(found)
    for name, weight in found.items():
        assert torch.equal(weight, results[0][1][name]), name


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="a thread can be scheduled behind all others on Linux alone")
def test_a_save_in_the_background_leaves_the_cores_to_training(tmp_path):
    usual = os.sched_getscheduler(0)
    for run, (background, waited_for, policy) in enumerate((
        (False, False, usual), (True, False, os.SCHED_IDLE), (True, True, usual),
    )):  # fmt: skip
        found = pool(2).run(policies, 2, str(tmp_path / str(run)), background, waited_for)
        assert found == [({policy}, usual)] * 2


def test_a_synchronous_save_copies_nothing(tmp_path):
    assert pool(2).run(no_copies, 2, str(tmp_path / "run")) == [True, True]
