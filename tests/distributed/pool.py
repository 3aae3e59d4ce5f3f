"""A pool of rank processes that tests share, so that a case costs milliseconds and not a start of N interpreters."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

from tests.forkserver import CONTEXT

TIMEOUT = 120.0  # seconds for one case; far beyond any, so that only a hang reaches it


class RanksFailed(AssertionError):
    """Some rank raised; carries each rank's traceback."""


def _serve(rank: int, world: int, backend: str, store: str, pipe) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # what was imported stays, and is not looked through again
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    while (job := pipe.recv()) is not None:
        function, args, kwargs = job
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


class RankPool:
    """`world` ranks on this machine. `run(f, ...)` calls f on every rank and returns the results by rank."""

    def __init__(self, world: int, backend: str = "gloo") -> None:
        self.world, self.backend = world, backend
        self._start()

    def _start(self) -> None:
        # CUDA does not live through a fork, not even one of a process that has only looked for it
        context = CONTEXT if self.backend == "gloo" else mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world, self.backend, os.path.join(self._folder.name, "store"), there),
                daemon=True,
            )
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a module-level function on every rank; raise `RanksFailed` where any rank raised or hung."""
        outcomes = self.outcomes(function, *args, **kwargs)
        failed = [(rank, outcome[1]) for rank, outcome in enumerate(outcomes) if not outcome[0]]
        if failed:
            raise RanksFailed("\n".join(f"rank {rank}: {what[2]}" for rank, what in failed))
        return [outcome[1] for outcome in outcomes]

    def outcomes(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[bool, Any]]:
        """(True, result) or (False, (exception name, message, traceback)) of each rank."""
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        deadline, results = time.monotonic() + TIMEOUT, []
        for pipe in self._pipes:
            arrived = pipe.poll(max(0.0, deadline - time.monotonic()))
            results.append(pipe.recv() if arrived else (False, ("Hang", "no answer", f"no answer in {TIMEOUT} s")))
        if any(not ok and what[0] in ("Hang", "RuntimeError", "DistBackendError") for ok, what in results):
            self.stop()  # a rank may be left inside a collective: start afresh for the next case
            self._start()
        return results

    def stop(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


_POOLS: dict[tuple[int, str], RankPool] = {}


def pool(world: int, backend: str = "gloo") -> RankPool:
    """The shared pool of this size and backend ("nccl": a GPU each), started when it is first asked for."""
    if (world, backend) not in _POOLS:
        _POOLS[world, backend] = RankPool(world, backend)
    return _POOLS[world, backend]


def stop_pools() -> None:
    """End every shared pool."""
    while _POOLS:
        _POOLS.popitem()[1].stop()


def mesh(cp: int, dp: int = 1, ranks_per_node: int | None = None):
    """This rank's mesh of this shape; made once in a rank process, since every mesh opens process groups."""
    return _mesh(cp, dp, ranks_per_node)


@cache  # which takes `mesh(2)` and `mesh(2, 1)` for two, were they its own calls
def _mesh(cp: int, dp: int, ranks_per_node: int | None):
    import lss

    return lss.init_mesh(cp=cp, dp=dp, ranks_per_node=ranks_per_node)
