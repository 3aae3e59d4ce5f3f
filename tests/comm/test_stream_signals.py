"""Barriers of streams: the operations that each rank issues, carried out in any order that streams allow."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

from lss.comm.stream_signals import WAIT_32, WRITE_32, Operation, StreamSignals, barrier_operations


def test_operations_are_laid_out_as_the_driver_reads_them():
    """CUstreamBatchMemOpParams: 48 bytes, the address at 8, the value at 16, flags at 24."""
    assert ctypes.sizeof(Operation) == 48
    assert (Operation.address.offset, Operation.value.offset, Operation.flags.offset) == (8, 16, 24)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(20))
def test_nobody_passes_a_barrier_before_all_have_come(size, seed):
    """Streams run in any interleaving: each does its own operations in order, and waits where it must."""
    dice, steps, rounds = random.Random(seed), 3, 4
    flags = [(ctypes.c_uint32 * (steps * size))() for _ in range(size)]
    starts = [ctypes.addressof(own) for own in flags]
    # free, arrived0 and sometimes arrived1, the same on all ranks
    order = [step for _ in range(rounds) for step in ([0, 1, 2] if dice.random() < 0.5 else [0, 1])]
    queues = [
        [(number, op) for number, step in enumerate(order) for op in barrier_operations(starts, rank, step)]
        for rank in range(size)
    ]
    begun = [0] * size  # barriers that each rank has come to, and those that it has passed
    at = [0] * size
    while any(at[rank] < len(queues[rank]) for rank in range(size)):
        able = [rank for rank in range(size) if at[rank] < len(queues[rank]) and _may_run(queues[rank][at[rank]][1])]
        assert able, "all streams wait"
        rank = dice.choice(able)
        number, op = queues[rank][at[rank]]
        begun[rank] = max(begun[rank], number + 1)
        if op.kind == WRITE_32:
            ctypes.c_uint32.from_address(op.address).value = op.value
        at[rank] += 1
        passed = at[rank] == len(queues[rank]) or queues[rank][at[rank]][0] > number
        if passed:
            assert min(begun) > number, "a rank passed before another had come"
    assert not any(flag for own in flags for flag in own)


def _may_run(op) -> bool:
    return op.kind != WAIT_32 or ctypes.c_uint32.from_address(op.address).value == op.value


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_there_are_none():
    assert StreamSignals.opened([torch.zeros(64, dtype=torch.uint8)] * 2, 0, ("free", "arrived0"), None) is None
