"""Hosts: what a batch system's lists say of them, which interface leads to another one, and how much memory one has."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SIOCGIFADDR = 0x8915  # Linux: the address of an interface
# an address for documentation, which no host has: the way to it is the way to everything else
_ELSEWHERE = "192.0.2.1"


def first_host(nodelist: str) -> str:
    """First host of a Slurm list such as "gpu[003-010,12],login1" or "rack[1-2]node[01-04]"."""
    # the first entry ends at the first comma outside of brackets
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\]?)*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]?", r"\1", entry[0] if entry else nodelist)


def tasks_of_nodes(text: str) -> list[int]:
    """Slurm's tasks of each node, "4(x2),3" for 4, 4 and 3.

    Raises:
        ValueError: not such a list.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"not a list of counts: {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def is_loopback(address: str) -> bool:
    """Whether this is an address, not a name, of a host's own loopback; "localhost" counts as one."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def interface_towards(address: str, several_hosts: bool) -> str | None:
    """The network interface by which this host reaches another, or itself at an address of its own; None if not known.

    Nothing is sent: the system is asked for its route.

    Args:
        address: name or address of the host to reach.
        several_hosts: whether others must reach this one by that interface too. A host's own name often stands for its
            loopback in its /etc/hosts, which is no way for others: the interface of the default route then serves.
    """
    own = _own_address(address)
    if own is not None and is_loopback(own) and several_hosts and not is_loopback(address):
        own = _own_address(_ELSEWHERE) or own
    if own is None:
        return None
    if is_loopback(own):
        return _loopback()
    return _interface_of(own)


def _own_address(towards: str) -> str | None:
    """This host's address as a host that it sends to sees it."""
    try:
        for family, kind, protocol, _, target in socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # of a datagram socket: sends nothing
                return probe.getsockname()[0].split("%")[0]
    except (OSError, UnicodeError):  # no way there; or no name of a host at all, as whoever meets there says
        pass
    return None


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "lo")


def _interface_of(own: str) -> str | None:
    """The interface that has this address of this host; None where it cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    if ":" in own:
        return _interface_of_ipv6(ipaddress.IPv6Address(own))
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == own:
                return name
    return None


def _interface_of_ipv6(own: ipaddress.IPv6Address) -> str | None:
    table = Path("/proc/net/if_inet6")
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    return next((row[-1] for row in rows if int(row[0], 16) == int(own)), None)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had: a GPU's, the host's, or a library's wording of either."""
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")
    # torch's own error by its name: torch takes seconds to import, and this is asked before it is
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and any(word in text for word in words)


# Where a control group of either version tells its limit, and what is in use of it.
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def all_memory() -> int:
    """Bytes of memory of this host, or of the part of it that this process's control group may use."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _control_groups())])


def free_memory() -> int:
    """Bytes of it that can be taken now without swapping."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return min([free, *(limit - used for limit, used in _control_groups())])


def _control_groups() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of the control groups that have a limit."""
    for names in _LIMITS:
        with suppress(OSError, ValueError):  # no control group of this version, or no limit
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in names)
            yield limit, used
