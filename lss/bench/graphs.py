"""A step as a CUDA graph: what is left of its time when nobody has to issue it call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

# Steps before the capture: compiled kernels, communicators and buffers are made at the first use of each.
WARM_UP = 3

R = TypeVar("R")


def captured(step: Callable[[], R]) -> Callable[[], R]:
    """The step as a graph: each call replays it, and returns the same tensors, written anew.

    Collectives: the step's own, four times; every rank must call.

    Raises:
        RuntimeError: the step does what cannot be captured, such as waiting for a number from the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # other threads, such as the one that watches NCCL, may go on calling the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step()

    def replay() -> R:
        graph.replay()
        return results

    return replay
