"""What collectives take: bytes over links, and the messages that each call waits for.

The messages' latencies are those by which NCCL chooses its algorithms (NVIDIA/nccl, src/graph/tuning.cc, ring, simple): a
start for each call, then hops between devices of a host and between hosts. A gather or scatter goes around a ring, over
hosts too, whose borders its bytes cross once and over all their ports; among ranks of which no two share a host in a number
of hops that grows with the logarithm (PAT, arXiv 2506.20252, which NCCL from 2.23 on runs in such groups). A sum goes up and
down a tree. Of an all-to-all all messages are under way at once, which is kind to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lss.comm.counter import Tally
from lss.planner.hardware import Hardware

Collectives = Mapping[tuple[str, str, str | None], Tally]


def seconds_of(
    hardware: Hardware, collectives: Collectives, ranks: int, wanted: Callable[[str], bool], *, flat: bool = False
) -> float:
    """Seconds of the calls whose purpose is wanted, one after another.

    Args:
        collectives: tallies by (kind, purpose, link).
        ranks: of the group, of which "inside" and "across" calls are a part each.
        flat: as if calls inside hosts were of the whole group and those across hosts, their first stage, were not made.
    """
    total = 0.0
    for (kind, purpose, link), tally in collectives.items():
        if not wanted(purpose):
            continue
        if flat and link == "across" and kind in ("all_gather", "reduce_scatter"):
            continue
        total += call_seconds(hardware, kind, tally, *group_of(hardware, None if flat else link, ranks))
    return total


def group_of(hardware: Hardware, link: str | None, ranks: int) -> tuple[int, int]:
    """(ranks, hosts) of the calls with this link in a group of so many neighbours."""
    hosts = math.ceil(ranks / hardware.per_host)
    if link == "across":
        return hosts, hosts
    return (min(ranks, hardware.per_host), 1) if link == "inside" else (ranks, hosts)


def call_seconds(hardware: Hardware, kind: str, tally: Tally, ranks: int, hosts: int) -> float:
    """Seconds of calls of one kind, by their bytes and their number, in a group of so many ranks on so many hosts."""
    if ranks == 1:
        return 0.0
    here = ranks / hosts
    near, far = hardware.hop, hardware.network_hop if hosts > 1 else 0.0
    ring = (ranks - hosts) * near + (hosts - 1) * far
    logarithm = math.ceil(math.log2(hosts))
    if kind == "send_recv":
        sent, hops = 1.0, far or near
    elif kind == "all_to_all":
        # what stays on a host goes meanwhile
        sent, hops = (ranks - (here if hosts > 1 else 1)) / ranks, far or near
    elif kind == "all_reduce":
        sent, hops = 2 * (ranks - 1) / ranks, 2 * ((here - 1) * near + logarithm * far)
    else:
        sent, hops = (ranks - 1) / ranks, logarithm * far if here == 1 else ring
    rate = hardware.link
    if hosts > 1:
        rate = hardware.network if kind in ("send_recv", "all_to_all") else min(rate, here * hardware.network)
        rate = hardware.network if here == 1 else rate
    return sent * tally.bytes / rate + tally.calls * (hardware.start + hops)
