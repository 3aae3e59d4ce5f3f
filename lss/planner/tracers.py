"""Processes that take traces beside one another: those that a plan needs are apart from one another."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch

from lss.config import Config
from lss.planner.fakes import QuickFakes
from lss.planner.ledger import Ledger
from lss.planner.trace import StepTrace, trace_step

# Traces of a plan that no other waits for: two depths at two lengths.
MOST = 4


@dataclass(frozen=True)
class Request:
    """A trace that is wanted, as `trace_step` takes it."""

    config: Config
    granularity: int
    ranks_per_node: int | None
    stands_for: tuple[int, int] | None

    def take(self, fakes: QuickFakes) -> tuple[Ledger, StepTrace]:
        """The trace, and its ledger."""
        ledger = Ledger(self.granularity, self.config.model.vocab_size, fuses=self.config.train.compile)
        how = {"granularity": self.granularity, "ranks_per_node": self.ranks_per_node, "stands_for": self.stands_for}
        return ledger, trace_step(self.config, ledger=ledger, fakes=fakes, **how)


class Tracers:
    """A process for each core, `MOST` at most, and none where there is one core. Use as a context manager.

    They are forked, so that none has to import torch again: enter before this process starts threads. Where it has, there
    are none: what another thread has locked at that moment would stay locked in them for ever.

    Args:
        count: processes; by default by the cores that this process may use.
    """

    def __init__(self, count: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self._count = min(MOST, cores) if count is None else count
        self._idle: list[Connection] = []
        self._busy: dict[Connection, Hashable] = {}
        self._waiting: deque[tuple[Hashable, Request]] = deque()
        self._found: dict[Hashable, Any] = {}
        self._processes: list[Any] = []

    def __enter__(self) -> Tracers:
        if self._count > 1 and threading.active_count() == 1:
            fork = mp.get_context("fork")
            for _ in range(self._count):
                here, there = fork.Pipe()
                process = fork.Process(target=_serve, args=(there,), daemon=True)
                process.start()
                there.close()
                self._idle.append(here)
                self._processes.append(process)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in (*self._idle, *self._busy):
            connection.close()
        for process in self._processes:
            process.terminate()  # what it traces nobody waits for
            process.join()

    def ask(self, key: Hashable, request: Request) -> None:
        """Have a trace taken, unless it was asked for already."""
        if key not in self._found and key not in self._busy.values() and key not in [key for key, _ in self._waiting]:
            self._waiting.append((key, request))
            self._hand_out()

    def result(self, key: Hashable) -> tuple[Ledger, StepTrace] | None:
        """What was asked for by this key, once; None where no process could tell: there is none, or it was killed.

        Raises:
            Exception: as the trace did.
        """
        while key not in self._found and self._busy and key in (*self._busy.values(), *(key for key, _ in self._waiting)):
            self._collect()
        found = self._found.pop(key, None)
        if isinstance(found, Exception):
            raise found
        return found

    def _hand_out(self) -> None:
        while self._idle and self._waiting:
            key, request = self._waiting.popleft()
            connection = self._idle.pop(0)
            try:
                connection.send(request)
            except OSError:  # it was killed
                self._waiting.appendleft((key, request))
                continue
            self._busy[connection] = key

    def _collect(self) -> None:
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            key = self._busy.pop(connection)
            try:
                self._found[key] = connection.recv()
            except (EOFError, OSError):
                continue
            self._idle.append(connection)
        self._hand_out()


def _serve(connection: Connection) -> None:
    """Take traces until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks is interrupted, and ends this
    torch.set_num_threads(1)
    fakes = QuickFakes()
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            found: Any = request.take(fakes)
            found[0].forget()
        except Exception as error:
            found = error
        connection.send(found)
