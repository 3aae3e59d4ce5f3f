"""Starting local ranks by torch's own elastic agent, on loopback."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from lss.config.errors import refuse

# Seconds that ranks have to end, once told to stop, and once one of them has failed; then they are killed.
PATIENCE = 18.0
FAREWELL = 10.0
# Exit statuses that a new start would not change: refused, and told to stop.
FINAL = (2, 130, 143)


class Told(Protocol):
    """What this process was told by signals; `lss.train.signals.Signals` is one."""

    stop: int

    def begin(self) -> None:
        """From here on signals are noted; until then they end the process."""

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        ...


def launch_local(nproc: int, arguments: Sequence[str], signals: Told, *, max_restarts: int = 0) -> int:
    """Run `python -m lss ARGUMENTS` as `nproc` ranks on this machine; returns the exit status of the run.

    The ranks meet on 127.0.0.1 at a port that the system picks. If one fails, all are ended, and up to `max_restarts`
    times started again. A signal to stop is passed on to every rank, SIGUSR1 to the first; ranks that have not ended 18
    seconds after the former are killed.

    Returns:
        0; else the status of the rank that failed first, 2 for a refusal; 130 or 143 where the run was interrupted or
        terminated, by a signal to this process or to one rank.
    """
    if nproc < 1:
        raise refuse("--nproc", nproc, "give the number of ranks to start, 1 or more")
    if max_restarts < 0:
        raise refuse("--max-restarts", max_restarts, "give a number of new starts, 0 or more")
    # imported here: every command would pay for it at start, and one uses it
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    from lss.one_host import OneHost

    _share_cores(nproc)
    # the agent's own handlers would raise in the middle of starting ranks, and leave some behind
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""
    # the ranks have said what went wrong; the launcher's own account of exit codes would bury it
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    signals.begin()
    spec = WorkerSpec(
        role="default", local_world_size=nproc, entrypoint=sys.executable, args=("-m", "lss", *arguments),
        rdzv_handler=OneHost(uuid.uuid4().hex), max_restarts=max_restarts, monitor_interval=0.1,
        local_addr="127.0.0.1",
    )  # fmt: skip
    try:
        result = _agent_class()(signals, spec=spec, logs_specs=DefaultLogsSpecs()).run()
    finally:
        spec.rdzv_handler.shutdown()
    return status((failure.exitcode for failure in result.failures.values()), signals.stop) if result.is_failed() else 0


def status(codes: Iterable[int], told: int) -> int:
    """The exit status of a run from those of its ranks, -N for a rank that signal N ended; `told`: to this process.

    A refusal counts more than a failure, a failure more than a stop.
    """
    codes = list(codes)
    for wanted in (lambda c: c == 2, lambda c: c > 0 and c not in FINAL, lambda c: c > 0):
        for code in filter(wanted, codes):
            return code
    # ended by the signal itself, before there was a handler
    stopped = [-code for code in codes if -code in (signal.SIGTERM, signal.SIGINT)]
    if told or (stopped and len(stopped) == len(codes)):
        return 128 + (told or stopped[0])
    return 1


def _agent_class() -> Any:
    """Torch's agent with our manners; made here, since its base takes seconds to import."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        """Passes signals on, starts nothing again that would end the same way, and ends stopped processes too."""

        def __init__(self, signals: Told, **settings: Any) -> None:
            super().__init__(**settings)
            self._signals, self._passed_at = signals, 0.0

        def _ranks(self) -> list[int]:
            return [] if self._pcontext is None else [pid for _, pid in sorted(self._pcontext.pids().items())]

        def _send(self, number: int, pids: Sequence[int]) -> None:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

        def _monitor_workers(self, worker_group: Any) -> RunResult:
            stop = self._signals.stop
            if stop and not self._passed_at:
                self._passed_at = time.monotonic()
                self._send(stop, self._ranks())
            elif stop and time.monotonic() - self._passed_at > PATIENCE:
                self._send(signal.SIGKILL, self._ranks())
            elif self._signals.take_save():
                self._send(signal.SIGUSR1, self._ranks()[:1])
            result = super()._monitor_workers(worker_group)  # type: ignore[call-arg]
            if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
                if stop or any(failure.exitcode in FINAL for failure in result.failures.values()):
                    self._remaining_restarts = 0
                if self._remaining_restarts:
                    lost = ", ".join(str(rank) for rank in sorted(result.failures)) or "some"
                    print(f"lss: rank {lost} was lost; all start again, from the newest save.", file=sys.stderr, flush=True)
            return result

        def _shutdown(self, *settings: Any, **more: Any) -> None:
            if self._pcontext is not None:
                # a stopped process hears nothing else
                self._send(signal.SIGCONT, self._ranks())
                self._pcontext.close(signal.Signals(self._signals.stop or signal.SIGTERM), int(FAREWELL))
            super()._shutdown(*settings, **more)

    return Agent


def _share_cores(nproc: int) -> None:
    """Give each rank its share of the cores: each would otherwise start as many threads as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
