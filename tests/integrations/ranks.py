"""Pools of rank processes forked from one that has imported transformers: its import takes seconds, for every rank anew."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import tempfile
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

from tests.distributed.pool import _POOLS, RankPool, _serve
from tests.forkserver import CONTEXT


def _nursery(pipe) -> None:
    # imports only: a process that has computed has threads, which a fork would lose
    from tests.integrations.hf_cases import CASES, classes

    for name in CASES:
        classes(name)
    if find_spec("peft") is not None:
        import peft  # noqa: F401
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended ranks are nobody's to wait for
    while True:
        job = pipe.recv()
        pid = os.fork()
        if pid == 0:
            pipe.close()
            try:
                _serve(*job)
            finally:
                os._exit(0)
        pipe.send(pid)
        job[-1].close()


@cache
def _nursery_pipe():
    here, there = mp.Pipe()
    CONTEXT.Process(target=_nursery, args=(there,), daemon=True).start()
    return here


class ForkedPool(RankPool):
    """A `RankPool` whose ranks start with transformers imported."""

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        nursery = _nursery_pipe()
        for rank in range(self.world):
            here, there = mp.Pipe()
            nursery.send((rank, self.world, self.backend, os.path.join(self._folder.name, "store"), there))
            pid = nursery.recv()
            there.close()
            self._pipes.append(here)
            end = SimpleNamespace(kill=lambda pid=pid: os.kill(pid, signal.SIGKILL), join=lambda: None)
            self._processes.append(end)


def hf_pool(world: int) -> RankPool:
    """The shared pool of this size."""
    if (world, "hf") not in _POOLS:
        _POOLS[world, "hf"] = ForkedPool(world)
    return _POOLS[world, "hf"]
