"""Shared by all tests."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.pool import stop_pools

torch.set_num_threads(1)  # the ranks of the pools share these cores


@pytest.fixture(scope="session", autouse=True)
def _end_pools():
    yield
    stop_pools()
