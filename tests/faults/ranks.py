"""Real rank processes of `lss train` that tests can kill: forked from one process that has imported torch already."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.forkserver import CONTEXT

# A text that is always there: to look through the standard library costs each rank as much as a small run's training.
TEXT = f"data.path={argparse.__file__}"
# A model whose step takes milliseconds; a case adds its own overrides behind.
SMALL = [
    TEXT,
    "model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_mlp=48",
    "data.seq_len=48", "train.batch_size=4", "train.eval_samples=4", "train.eval_every=0", "train.dtype=float64",
    "train.deterministic=true",
]  # fmt: skip


def _write_to(log: str, *descriptors: int) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in descriptors:
        os.dup2(file, descriptor)
    os.close(file)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _rank(
    arguments: Sequence[str], environ: Mapping[str, str], log: str, hook: Callable[[], None] | None, report: bool
) -> None:
    _write_to(log, 1, 2)
    gc.freeze()  # what was imported stays, and is not looked through again
    os.environ.update(environ)
    import torch

    torch.set_num_threads(1)
    import lss.cli.train as train
    from lss.cli import main

    if not report:
        train._report = lambda out: []
    if hook is not None:
        hook()
    sys.exit(main(list(arguments)))


def _command(
    arguments: Sequence[str], environ: Mapping[str, str], cwd: str, out: str, error: str, hook: Callable[[], None] | None
) -> None:
    _write_to(out, 1)
    _write_to(error, 2)
    gc.freeze()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda _, line, variables: _ForkedRank(line[3:], variables)
    if hook is not None:
        hook()
    from lss.cli import main

    sys.exit(main(list(arguments)))


class _ForkedRank:
    """What `subprocess.Popen` is to torch's agent, of a rank that a forked launcher forks in its turn.

    As if it were another Python it has a session of its own, none of the launcher's files or handlers, and these variables.
    """

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                status = self._run(arguments, environ)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    @staticmethod
    def _run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.closerange(3, 1 << 16)
        os.environ.clear()
        os.environ.update(environ)
        import torch

        torch.set_num_threads(1)
        from lss.cli import main

        return main(list(arguments))

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, as `subprocess.Popen.wait` does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired([], timeout or 0.0)
            time.sleep(0.01)
        return code


class Command:
    """`lss ARGUMENTS` in a folder, with these variables and no others, as a process of its own.

    Args:
        hook: called in it before.
        fork: from the process that has imported all, and so are the ranks that it starts; otherwise it is `python -m lss`,
            which imports what it needs.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        cwd: Path,
        environ: Mapping[str, str],
        *,
        hook: Callable[[], None] | None = None,
        fork: bool = True,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._logs = [Path(self._folder.name) / name for name in ("out", "error")]
        typed = [str(argument) for argument in arguments]
        self._process: Any = None
        if fork:
            given = (typed, dict(environ), str(cwd), *map(str, self._logs), hook)
            self._process = CONTEXT.Process(target=_command, args=given)
            self._process.start()
        else:
            with self._logs[0].open("w") as out, self._logs[1].open("w") as error:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "lss", *typed], cwd=cwd, env=environ, stdout=out, stderr=error
                )
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode

    def said(self) -> list[str]:
        """What it has printed on standard output and on standard error."""
        return [log.read_text() if log.exists() else "" for log in self._logs]

    def wait(self, timeout: float = 120.0) -> subprocess.CompletedProcess:
        """Wait for its end; returns what `subprocess.run` would."""
        if isinstance(self._process, subprocess.Popen):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        else:
            self._process.join(timeout)
        code, told = self.poll(), self.said()
        if code is None:
            self._process.kill()
        self._folder.cleanup()
        assert code is not None, f"not within {timeout} s\n{told}"
        return subprocess.CompletedProcess([], code, *told)


class Run:
    """One start of `lss train` as `nproc` ranks of one host, as torchrun starts them, without an agent above them.

    Args:
        out: the run's folder; each start logs to `out`'s sibling files `NAME.START.RANK.log`.
        overrides: config keys, after those of `SMALL`.
        hook: a module-level function that every rank calls before it starts, to plant a fault.
        environ: variables for every rank; those of rank r alone in `of_rank[r]`.
        report: make the page at the end, half a second of a core.
    """

    def __init__(
        self,
        out: Path,
        nproc: int,
        overrides: Sequence[str] = (),
        *,
        arguments: Sequence[str] | None = None,
        hook: Callable[[], None] | None = None,
        environ: Mapping[str, str] | None = None,
        of_rank: Mapping[int, Mapping[str, str]] | None = None,
        report: bool = False,
    ) -> None:
        self.out = Path(out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        start = len(list(self.out.parent.glob(f"{self.out.name}.*.0.log")))
        self.logs = [self.out.parent / f"{self.out.name}.{start}.{rank}.log" for rank in range(nproc)]
        line = ["train", *(SMALL if arguments is None else arguments), *overrides, "--out", str(out)]
        port = str(free_port())
        self.processes = []
        for rank in range(nproc):
            place = {"RANK": str(rank), "WORLD_SIZE": str(nproc), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(nproc),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}  # fmt: skip
            mine = place | dict(environ or {}) | dict((of_rank or {}).get(rank, {}))
            process = CONTEXT.Process(target=_rank, args=(line, mine, str(self.logs[rank]), hook, report))
            process.start()
            self.processes.append(process)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank, if it is still there."""
        pid = self.processes[rank].pid
        if pid is not None and self.processes[rank].is_alive():
            os.kill(pid, number)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Wait until the condition holds; fails where every rank has ended or time is up before."""
        deadline = time.monotonic() + timeout
        while not condition():
            alive = any(process.is_alive() for process in self.processes)
            if not alive and condition():
                return
            assert alive, f"all ranks ended before it: {self.codes()}\n{self.said()}"
            assert time.monotonic() < deadline, f"not within {timeout} s\n{self.said()}"
            time.sleep(0.002)

    def steps(self) -> int:
        """Steps whose metrics have been written."""
        try:
            return (self.out / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def wait(self, timeout: float = 60.0) -> list[int | None]:
        """Wait for all ranks to end; returns their exit codes, -N for a signal N, None for one that did not end."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = self.codes()
        self.end()
        return codes

    def codes(self) -> list[int | None]:
        """Exit codes so far."""
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def said(self) -> str:
        """What all ranks printed."""
        return "\n".join(f"-- {log.name}\n{log.read_text()}" for log in self.logs if log.exists())


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
