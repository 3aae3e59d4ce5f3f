"""Shared by all tests."""

from __future__ import annotations

import compileall
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import lss
from tests.distributed.pool import stop_pools

# the same draws at every run, so that a failure is one of the change before it; `make fuzz` draws others
settings.register_profile("suite", derandomize=True, print_blob=True)
settings.register_profile("fuzz", derandomize=False, print_blob=True)
settings.load_profile("suite")

torch.set_num_threads(1)  # the ranks of the pools share these cores

# tests start hundreds of processes; where Python is told to keep no compiled files each would compile the library anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if sys.dont_write_bytecode:
    compileall.compile_dir(Path(lss.__file__).parent, quiet=2)


# the files that take longest, longest first: begun first, so that workers of `pytest -n` end together
LONGEST = (
    "tests/distributed/test_parity.py", "tests/faults/test_hosts.py", "tests/distributed/test_fsdp.py",
    "tests/train/test_trainer.py", "tests/docs/test_blocks.py", "tests/faults/test_kills.py", "tests/planner/test_trace.py",
    "tests/faults/test_restarts.py", "tests/check/test_check.py", "tests/test_examples.py", "tests/faults/test_watch.py",
    "tests/faults/test_signals.py", "tests/distributed/test_masks.py", "tests/checkpoint/test_bits.py",
    "tests/checkpoint/test_layouts.py", "tests/cli/test_cli.py",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """A worker's files in the order in which they are begun; one process keeps that of the folders."""
    if hasattr(config, "workerinput"):
        order = {file: number for number, file in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files go to workers whole, in order: what a file's tests share is made once; the GPU's tests are one worker's."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "tests/gpu" if nodeid.startswith("tests/gpu/") else super()._split_scope(nodeid)

    config.option.loadscopereorder = False  # which would begin with the files of most tests
    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _end_pools():
    yield
    stop_pools()
