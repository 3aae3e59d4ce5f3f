"""A heartbeat of every rank over the rendezvous store, by which the ranks learn of one another's death.

A rank that waits in a collective for a dead or stuck one learns of it after the collective's timeout, if at all, and not
whom it waits for. So each rank tells each second, through a connection of its own and from a thread of its own, where it is;
reads what the others tell; and ends, with the sentence that all ranks agree on, where one is gone or holds up the rest.

Two threads: "beat" talks to the store and judges; "guard" never touches the store, since a call to one that does not answer
never returns. It speaks where the store is silent, and ends the process where the main thread cannot: a wait for a GPU or
for a peer's transfer cannot be interrupted.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lss.comm.control import control
from lss.comm.counter import Inside, listening
from lss.comm.verdict import SILENCE, Beat, Peer, Verdict, host_identity, judge, process_state
from lss.config.errors import Failed, Refused, Stopped
from lss.environment import rank_environment

PERIOD = 1.0
# How long the main thread, once a transfer has failed, waits to be told why.
EXPLAIN = SILENCE + 4.0
# How long it may take, once a verdict is there, to come out of what it does by itself.
FUSE = 1.5
_GLANCE = 0.25  # seconds between two looks of the guard


class Watch:
    """Watches the other ranks, and lets them watch this one. A context; on one rank it does nothing.

    Args:
        mesh: of all ranks, made by `lss.init_mesh` under a launcher.
        timeout: seconds after which a rank that does not get on while others wait for it is stuck.
        newest: the newest save, in words for the end of the sentence; called once, when something is wrong.

    Collectives: at the start three all-reduces and an all-gather of a few numbers, host to host.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float, newest: Callable[[], str] = lambda: "") -> None:
        self.rank, self.size, self.timeout, self._newest = mesh.get_rank(), mesh.size(), timeout, newest
        environment = rank_environment()
        self.on = self.size > 1 and environment is not None
        self._cuda = mesh.device_type == "cuda"
        self._calls = _Calls()
        self._scope = ExitStack()
        self._lock, self._wake, self._over = threading.Lock(), threading.Event(), threading.Event()
        self._verdict: Verdict | None = None
        self._known = threading.Event()
        self._closing = False
        self._rounds = self._missed = 0
        self._broken: str = ""
        self._place = (0, "starting")
        self._leaving = ("on", "", 0)
        if not self.on or environment is None:
            return
        self._address, self._port = environment.address, environment.port
        # torch's elastic agent says so; otherwise rank 0 hosts the store in its own process
        self._hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and self.rank == 0
        self._store_of_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        node = environment.rank - environment.local_rank
        self._beat = Beat(phase="starting", pid=os.getpid(), host=host_identity(), node=node)
        agreed = control(mesh, "watch")
        token = agreed.gather(os.urandom(6).hex())[0]  # an agent's store outlives the runs that it restarts
        self._keys = [f"lss/{token}/{rank}" for rank in range(self.size)] + [f"lss/{token}/verdict"]
        self._client = dist.TCPStore(
            self._address, self._port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE)
        )
        self._client.set(self._keys[self.rank], self._beat.to_text())
        if self.rank == 0:
            self._client.set(self._keys[-1], "-")
        agreed.largest(0)  # every key is there from here on
        self._peers = [Peer(self._beat) for _ in range(self.size)]
        self._awake, self._before = 0.0, time.monotonic()

    # -- what the main thread tells ----------------------------------------------------------------------------------

    def at(self, step: int, phase: str) -> None:
        """Where this rank is: the step (0 before the first) and what it does there."""
        self._place = (step, phase)

    def __enter__(self) -> Watch:
        if self.on:
            self._scope.enter_context(listening(self._calls))
            self._threads = [threading.Thread(target=run, name=f"lss {name}", daemon=True)
                             for name, run in (("beat", self._beats), ("guard", self._guard))]  # fmt: skip
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, Stopped):
            self.leave("done")
        else:
            why = _first_line(error)
            known = isinstance(error, (Refused, Failed))
            self.leave("failed", why if known else f"{type(error).__name__}: {why}", 2 if isinstance(error, Refused) else 1)

    def leave(self, state: str, why: str = "", code: int = 0) -> None:
        """Tell the others that this rank goes, and why ("done", "stopped", "failed"); then stop watching.

        Where this process hosts the store and the others are to read the reason, it stays until they have, some seconds
        at most. Never raises.
        """
        with self._lock:
            if not self.on or self._closing or self._leaving[0] != "on":
                return
            self._leaving = (state, why, code)
        self._tell()
        if self._hosts_store and state != "done":
            deadline = time.monotonic() + FUSE + 3 * PERIOD
            while time.monotonic() < deadline and any(
                peer.beat.state == "on" for rank, peer in enumerate(self._peers) if rank != self.rank
            ):
                self._tell()
        self._closing = True
        self._over.set()
        self._wake.set()
        self._scope.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=1.0)

    def _tell(self) -> None:
        """Have one more round made, and wait for it a little."""
        rounds, deadline = self._rounds, time.monotonic() + PERIOD
        # two: the one under way may have looked before
        while self._rounds < rounds + 2 and time.monotonic() < deadline and not self._broken:
            self._wake.set()
            time.sleep(0.005)

    def explain(self, error: BaseException) -> None:
        """End the process with the ranks' verdict, if `error` is a transfer that failed because a rank is lost.

        Returns where it is not such an error or no verdict comes in time; the error is then the caller's again.
        """
        if not self.on or not is_transfer_error(error):
            return
        if self._known.wait(EXPLAIN) and self._verdict is not None:
            self.end(self._verdict)
        step, phase = self._place
        waits = self._calls.waits()
        self.end(Verdict(
            f"rank {self.rank} lost its connection to the others in step {step} ({phase})"
            f"{f', in the {waits}' if waits else ''}: {_first_line(error)}{self._save()}"
        ))  # fmt: skip

    def end(self, verdict: Verdict) -> None:
        """Say it, on one rank of each host, and end the process: what waits for lost peers cannot be torn down in order."""
        if not self._lock.acquire(timeout=FUSE):
            os._exit(verdict.code)
        node = self._beat.node
        here = [r for r, p in enumerate(self._peers) if p.beat.node == node and r != verdict.rank and p.beat.state == "on"]
        with suppress(Exception):
            sys.stdout.flush()
            if self.rank == min(here, default=self.rank) or self.rank == verdict.rank:
                print(f"lss: {verdict.text}.", file=sys.stderr, flush=True)
        if self._hosts_store:  # the others are still reading it
            time.sleep(2 * PERIOD)
        os._exit(verdict.code)

    # -- the threads -------------------------------------------------------------------------------------------------

    def _beats(self) -> None:
        while not self._closing:
            self._wake.wait(PERIOD)
            self._wake.clear()
            try:
                self._round()
            except Exception as error:
                # closed: its host is gone, and no later call would do better
                self._broken = _first_line(error)
                return

    def _round(self) -> None:
        step, phase = self._place
        waits = self._calls.waits()
        if not waits and self._cuda and phase == DEVICE:
            waits = self._calls.last
        state, why, code = self._leaving
        self._beat = replace(self._beat, number=self._beat.number + 1, step=step, phase=phase, begun=self._calls.begun,
                             waits=waits, state=state, why=why, code=code)  # fmt: skip
        self._client.set(self._keys[self.rank], self._beat.to_text())
        *texts, verdict = self._client.multi_get(self._keys)
        now = time.monotonic()
        # its own sleep, where it was stopped, is no silence of others
        self._awake += min(now - self._before, 2 * PERIOD)
        self._before = now
        for peer, text in zip(self._peers, texts, strict=True):
            peer.update(Beat.from_text(text), self._awake)
        self._rounds += 1
        if verdict != b"-":
            self._set(verdict.decode())
        elif state == "on" and not self._known.is_set():
            found = judge(self._peers, self.rank, self._awake, timeout=self.timeout, unreached=self._calls.after)
            if found is not None:
                told = f"{found.code} {found.rank} {found.text}{self._save() if found.code == 1 else ''}"
                # the first to find something speaks for all
                self._set(self._client.compare_set(self._keys[-1], "-", told).decode())

    def _set(self, told: str) -> None:
        code, rank, text = told.split(" ", 2)
        self._verdict = Verdict(text, int(code), int(rank))
        self._known.set()

    def _guard(self) -> None:
        """Looks on: counts its own looks rather than time, for it may have been stopped itself."""
        rounds, looks, fuse = -1, 0, 0
        while not self._over.wait(_GLANCE):
            if self._known.is_set():
                fuse += 1
                if fuse * _GLANCE >= FUSE and self._verdict is not None and self._leaving[0] == "on":
                    self.end(self._verdict)
                continue
            looks = looks + 1 if self._rounds == rounds else 0
            rounds = self._rounds
            if looks * _GLANCE >= (2 * PERIOD if self._broken else SILENCE + PERIOD) and self._leaving[0] == "on":
                self._set(f"1 {0 if self._store_of_rank_0 else -1} {self._store_gone(looks * _GLANCE)}{self._save()}")

    def _store_gone(self, seconds: float) -> str:
        where = f"{self._address}:{self._port}"
        how = f"gone ({self._broken})" if self._broken else f"silent for {seconds:.0f} s"
        if not self._store_of_rank_0:
            return f"the rendezvous store at {where}, which the launcher hosts, is {how}: it was killed or is cut off"
        first, me = self._peers[0].beat, self._beat
        seen = process_state(first.pid) if first.host and first.host == me.host else None
        what = {"gone": f"its process {first.pid} was killed or crashed", "stopped": "its process is stopped"}
        step, _ = self._place
        waits = self._calls.waits() or self._calls.after(first.begun)
        of = f" of step {step}" if step != first.step else ""
        before = f", before the {waits}{of} that rank {self.rank} waits in" if waits else ""
        return (f"rank 0 has not been heard of for {seconds:.0f} s: {what.get(seen or '', 'killed, stopped or cut off')} "
                f"(its rendezvous store at {where} is {how}); last seen {first.place}{before}")  # fmt: skip

    def _save(self) -> str:
        try:
            return f"; {self._newest()}" if self._newest() else ""
        except Exception:  # a folder that cannot be read must not hide the verdict
            return ""


# The phase in which the host waits for all that it has given its device.
DEVICE = "waiting for the device"


class _Calls:
    """What this rank has issued: how many collectives, which ones lately, and which it waits in."""

    def __init__(self) -> None:
        self.begun, self.last = 0, ""
        self._lock = threading.Lock()
        # weakly: a call's buffers must not live on for having been watched
        self._lately: deque[list[Any]] = deque(maxlen=512)
        self._latest: dict[int, list[Any]] = {}

    def add(self, kind: str, purpose: str, payload: torch.Tensor, link: str | None = None) -> None:
        """A listener's."""
        with self._lock:
            self.begun += 1
            self.last = f"{kind} of {purpose}"
            entry: list[Any] = [self.begun, self.last, None]
            self._lately.append(entry)
            self._latest[threading.get_ident()] = entry

    def issued(self, pending: Any) -> None:
        """A listener's."""
        entry = self._latest.get(threading.get_ident())
        if entry is not None and entry[2] is None:
            entry[2] = (lambda: pending) if isinstance(pending, Inside) else weakref.ref(pending)

    def waits(self) -> str:
        """The call that a thread of this process is inside of, and has been longest."""
        for _, label, reference in list(self._lately):
            pending = None if reference is None else reference()
            if pending is not None and pending.waiting:
                return label
        return ""

    def after(self, begun: int) -> str:
        """The call that follows the first `begun`; empty where it was not made, or long ago."""
        return next((label for number, label, _ in list(self._lately) if number == begun + 1), "")


def is_transfer_error(error: BaseException) -> bool:
    """Whether this is a collective that failed, rather than a fault of the program."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection", "processgroup"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
