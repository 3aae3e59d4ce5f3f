"""What collectives take: by bytes, by calls, and by where the group's ranks are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lss.comm.counter import Tally
from lss.planner import HARDWARE
from lss.planner.exchange import call_seconds, group_of, seconds_of

# rates and latencies that are easy to reckon with
HARD = replace(HARDWARE["h100"], link=100.0, network=10.0, per_host=4, start=1000.0, hop=1.0, network_hop=50.0)
CALL = Tally(2, 0, 400)


@pytest.mark.parametrize("kind, ranks, hosts, seconds", [
    ("all_gather", 4, 1, 400 * 3 / 4 / 100 + 2 * (1000 + 3)),
    ("all_reduce", 4, 1, 2 * 400 * 3 / 4 / 100 + 2 * (1000 + 2 * 3)),
    ("send_recv", 4, 1, 400 / 100 + 2 * (1000 + 1)),
    ("all_to_all", 4, 1, 400 * 3 / 4 / 100 + 2 * (1000 + 1)),
    # over hosts a ring crosses each border once, over all ports: 4 x 10 bytes/s
    ("reduce_scatter", 16, 4, 400 * 15 / 16 / 40 + 2 * (1000 + 12 * 1 + 3 * 50)),
    ("all_reduce", 16, 4, 2 * 400 * 15 / 16 / 40 + 2 * (1000 + 2 * (3 * 1 + 2 * 50))),
    # the rank at a border sends its whole message over its one port
    ("send_recv", 16, 4, 400 / 10 + 2 * (1000 + 50)),
    ("all_to_all", 16, 4, 400 * 12 / 16 / 10 + 2 * (1000 + 50)),
    # one rank a host
    ("all_gather", 4, 4, 400 * 3 / 4 / 10 + 2 * (1000 + 2 * 50)),
    ("all_gather", 1, 1, 0.0),
])  # fmt: skip
def test_a_call(kind, ranks, hosts, seconds):
    assert call_seconds(HARD, kind, CALL, ranks, hosts) == pytest.approx(seconds)


def test_groups_of_stages():
    assert group_of(HARD, "across", 16) == (4, 4)
    assert group_of(HARD, "inside", 16) == (4, 1)
    assert group_of(HARD, None, 16) == (16, 4)
    assert group_of(HARD, "inside", 2) == (2, 1)


def test_two_stages_and_one_ring():
    calls = {("all_gather", "kv", "across"): Tally(1, 0, 100), ("all_gather", "kv", "inside"): Tally(1, 0, 400),
             ("all_reduce", "gradients", None): Tally(1, 0, 10**6)}  # fmt: skip
    across, inside = 100 * 3 / 4 / 10 + 1000 + 100, 400 * 3 / 4 / 100 + 1000 + 3
    assert seconds_of(HARD, calls, 16, "kv".__eq__) == pytest.approx(across + inside)
    ring = 400 * 15 / 16 / 40 + 1000 + 12 + 150
    assert seconds_of(HARD, calls, 16, "kv".__eq__, flat=True) == pytest.approx(ring)
