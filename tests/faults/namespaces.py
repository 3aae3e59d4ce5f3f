"""Two hosts on one machine: network namespaces joined by a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
# a host knows neither the other's processes nor its name
APART = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c",
         'echo "$1" > /proc/sys/kernel/hostname; shift; exec "$@"', "sh"]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


class Unavailable(Exception):
    """Namespaces cannot be made here; the text is the reason."""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class TwoHosts:
    """Two namespaces, `names`, with an address each; processes started by `start` run in one of them.

    Each has an interface, a name and process numbers of its own; `cable0` and `cable1` are the interfaces. The files are
    this machine's, as where hosts share a file system.
    """

    def __init__(self) -> None:
        self.names = [f"lss{os.getpid()}-{host}" for host in range(2)]
        self.processes: list[subprocess.Popen] = []

    def make(self) -> None:
        """Make both and lay the cable.

        Raises:
            Unavailable: no `ip` command, or it may not.
        """
        missing = [command for command in ("ip", "unshare") if shutil.which(command) is None]
        if missing:
            raise Unavailable(f"there is no {missing[0]} command")
        for name in self.names:
            _ip("netns", "add", name)
        first, second = self.names
        _ip("link", "add", "cable0", "netns", first, "type", "veth", "peer", "name", "cable1", "netns", second)
        for host, name in enumerate(self.names):
            _ip("-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", f"cable{host}")
            _ip("-n", name, "link", "set", "lo", "up")
            self._try(host)
        self.join()

    def _try(self, host: int) -> None:
        done = subprocess.run(self._inside(host, ["true"]), capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"unshare: {done.stderr.strip()}")

    def _inside(self, host: int, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *APART, f"host{host}", *command]

    def cut(self) -> None:
        """Cut the cable: nothing arrives any more, and nobody is told that connections are gone."""
        for host, name in enumerate(self.names):
            _ip("-n", name, "link", "set", f"cable{host}", "down")

    def join(self) -> None:
        """Join it again."""
        for host, name in enumerate(self.names):
            _ip("-n", name, "link", "set", f"cable{host}", "up")

    def start(
        self, host: int, command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """Start a command on a host, with stdout and stderr in a file."""
        given = {k: v for k, v in os.environ.items() if k not in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT")}
        given |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environ or {})}
        with log.open("wb") as file:
            process = subprocess.Popen(
                self._inside(host, command),
                cwd=log.parent, env=given, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def pids(self, host: int) -> list[int]:
        """Processes that run on a host, apart from those that have ended and wait to be asked for their status."""
        done = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split() if not _ended(int(pid))]

    def remove(self) -> None:
        """End whatever runs on them and take both away; their ends of the cable go with them."""
        for host, name in enumerate(self.names):
            for pid in self.pids(host):
                _kill(pid)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        for process in self.processes:
            process.wait(timeout=20)


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, 9)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts that are gone afterwards, with all that ran on them.

    Raises:
        Unavailable: they cannot be made here.
    """
    hosts = TwoHosts()
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()


def torchrun(host: int, port: int, arguments: Sequence[str], *, static: bool) -> list[str]:
    """torchrun's command on one of two hosts with two ranks each, by the addresses given to all or by its own meeting."""
    node = ["--nnodes=2", "--nproc-per-node=2"]
    if static:
        node += [f"--node-rank={host}", f"--master-addr={ADDRESSES[0]}", f"--master-port={port}"]
    else:
        # their names are in no directory, so each says by which address it is reached
        node += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{port}", f"--local-addr={ADDRESSES[host]}",
                 f"--rdzv-conf=is_host={'true' if host == 0 else 'false'}"]  # fmt: skip
    return [*TORCHRUN, *node, "-m", "lss", *arguments]


def wait_all(processes: Sequence[subprocess.Popen], timeout: float) -> list[int | None]:
    """Exit codes once all have ended, or None for those that have not in so many seconds."""
    deadline = time.monotonic() + timeout
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    return [process.poll() for process in processes]
