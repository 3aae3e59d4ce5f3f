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


@pytest.fixture(scope="session", autouse=True)
def _end_pools():
    yield
    stop_pools()
