"""Where the ranks of a run meet: the store that they find each other through, who has come, and who says what is wrong.

The store listens on loopback where the ranks are told to meet there. Torch's own would listen on every interface.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from lss.config.errors import Refused, SaidElsewhere, refuse

if TYPE_CHECKING:
    import torch.distributed as dist

# How long ranks are waited for by default, once one of them has come.
RENDEZVOUS = timedelta(seconds=60)
# A rank that hosts the store stays so long for others to hear why the run ends; they are as far, or were never started.
_PARTING = 3.0
_PAUSE = 0.02
_BACKLOG = 2048


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, and where they meet.

    `agent`: torch's launcher hosts the store there, and starts the ranks for this time, "0" first; empty: rank 0 does.
    """

    rank: int
    world_size: int
    address: str
    port: int
    agent: str = ""

    def __str__(self) -> str:
        return f"MASTER_ADDR={self.address}, MASTER_PORT={self.port}"


def listen(address: str, port: int) -> socket.socket:
    """A listening socket for a store: on loopback or another address where that is given, for a name on all interfaces.

    Raises:
        Refused: the port is taken, or not allowed to this user.
    """
    address = "127.0.0.1" if address == "localhost" else address
    try:
        host = str(ipaddress.ip_address(address))
    except ValueError:  # a name, which need not stand for the same address on every host
        host = ""
    try:
        return _bound(host, port)
    except OSError as error:
        if host and error.errno == errno.EADDRNOTAVAIL:  # an address that is translated to this host's
            return _bound("", port)
        what = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror
        fit = f"rank 0 cannot listen at it ({what}); set MASTER_PORT to a free port, 1024 to 65535"
        raise refuse("MASTER_PORT", port, fit) from None


def _bound(host: str, port: int) -> socket.socket:
    both = not host and socket.has_dualstack_ipv6()
    listener = socket.socket(socket.AF_INET6 if both or ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if both:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def host_store(listener: socket.socket, timeout: timedelta) -> dist.TCPStore:
    """A store served by this process at a listening socket, which it takes over."""
    import torch.distributed as dist  # here, so that what is refused before ranks meet does not wait for torch

    address, port = listener.getsockname()[:2]
    local = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    return dist.TCPStore(
        local, port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def open_store(place: Place, timeout: timedelta) -> dist.Store:
    """The run's store: hosted by rank 0, or by torch's launcher; others wait until it is there.

    Raises:
        Refused: an unknown host, a port that is taken, or nobody listening there within the timeout.
    """
    import torch.distributed as dist

    try:
        socket.getaddrinfo(place.address, None)
    except (OSError, UnicodeError) as error:
        fit = f"no such host ({getattr(error, 'strerror', None) or 'not a name of one'}); name the host of rank 0"
        raise refuse("MASTER_ADDR", place.address, fit) from None
    if place.rank == 0 and not place.agent:
        return host_store(listen(place.address, place.port), timeout)
    deadline = time.monotonic() + timeout.total_seconds()
    # asked for here first: torch's client writes pages to standard error while it waits
    while (reason := _unreachable(place)) is not None:
        if time.monotonic() >= deadline:
            raise Refused(
                f"{place}: rank {place.rank} of {place.world_size} found nobody there within "
                f"{timeout.total_seconds():g} s ({reason}); start rank 0 there, or raise --rendezvous-timeout."
            )
        time.sleep(5 * _PAUSE)
    try:
        store = dist.TCPStore(place.address, place.port, None, False, timeout=timeout)
        # the launcher's store may live through restarts, and what ranks said before one is no longer so
        return dist.PrefixStore(f"round_{place.agent}", store) if place.agent else store
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise Refused(f"{place}: what listens there is no store of a run ({reason}).") from None


def _unreachable(place: Place) -> str | None:
    """Why nobody can be reached at this place now; None where somebody listens."""
    try:
        socket.create_connection((place.address, place.port), timeout=1).close()
    except OSError as error:
        return error.strerror or "no answer"
    return None


def meet(place: Place, timeout: timedelta = RENDEZVOUS) -> dist.Store:
    """Wait until every rank has come; returns the store they met through.

    Each rank calls once. No collectives: small texts in the store.

    Raises:
        Refused: not all ranks came within the timeout; on rank 0, with their numbers.
        SaidElsewhere: another rank says why the run ends.
    """
    store = open_store(place, timeout)
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store.set(f"lss/here/{place.rank}", "")
        if place.rank == 0:
            _count(store, place, timeout, deadline)
        else:
            _wait_for_verdict(store, place, deadline + timeout.total_seconds())  # this rank may have come before rank 0
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise Refused(f"{place}: the meeting of the ranks broke off ({reason}); see what rank 0 says.") from None
    return store


def _wait_for_verdict(store: dist.Store, place: Place, deadline: float) -> None:
    """Other ranks than 0: hear how the meeting went."""
    while not store.check(["lss/verdict"]):
        if store.check(["lss/refused"]):
            leave(store, place)
            raise SaidElsewhere(store.get("lss/refused").decode())
        if time.monotonic() >= deadline:
            raise Refused(f"{place}: rank {place.rank} of {place.world_size} waited there for rank 0, which did not come.")
        time.sleep(_PAUSE)
    verdict = store.get("lss/verdict").decode()
    if verdict:
        leave(store, place)
        raise SaidElsewhere(verdict)


def _count(store: dist.Store, place: Place, timeout: timedelta, deadline: float) -> None:
    """Rank 0: wait for all others and tell them how it went."""
    awaited = 1
    while awaited < place.world_size:
        if store.check([f"lss/here/{awaited}"]):
            awaited += 1
        elif store.check(["lss/refused"]):
            verdict = store.get("lss/refused").decode()
            store.set("lss/verdict", verdict)
            leave(store, place)
            raise SaidElsewhere(verdict)
        elif time.monotonic() >= deadline:
            missing = [r for r in range(awaited, place.world_size) if not store.check([f"lss/here/{r}"])]
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            told = (
                f"WORLD_SIZE={place.world_size}: {place.world_size - len(missing)} of these ranks met at "
                f"{place.address}:{place.port} within {timeout.total_seconds():g} s, without {shown}; start all of them, "
                "or raise --rendezvous-timeout."
            )
            store.set("lss/verdict", told)
            leave(store, place)
            raise Refused(told)
        else:
            time.sleep(_PAUSE)
    store.set("lss/verdict", "")


def first_to_say(store: dist.Store, place: Place, text: str) -> bool:
    """Whether this rank is the first of the run to say this, and is to say it. True also where the others are gone."""
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()
        store.set("lss/refused", text)
        first = store.add(f"lss/said/{digest}", 1) == 1
    except RuntimeError:
        return True
    leave(store, place)
    return first


def leave(store: dist.Store, place: Place) -> None:
    """Go from a run that ends before its time; who hosts the store waits a little, so that the others can hear why."""
    with suppress(RuntimeError):
        gone = store.add("lss/left", 1)
        if place.rank != 0 or place.agent:
            return
        deadline = time.monotonic() + _PARTING
        while gone < place.world_size and time.monotonic() < deadline:
            time.sleep(_PAUSE)
            gone = store.add("lss/left", 0)


def agent_round() -> str:
    """How often torch's launcher has started the ranks again, where it hosts their store; empty where it does not."""
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if hosted else ""
