"""What batch systems' lists say, and which interface leads where."""

from __future__ import annotations

import socket

import pytest

from lss import hosts
from lss.hosts import first_host, interface_towards, is_loopback, tasks_of_nodes


@pytest.mark.parametrize(
    "nodelist, first",
    [
        ("node1", "node1"),
        ("a1,a2", "a1"),
        ("gpu[003-010,12],login1", "gpu003"),
        ("gpu[12,003-010]", "gpu12"),
        ("rack[1-2]node[01-04]", "rack1node01"),
        ("rack[1,3]node[04,06-07],b", "rack1node04"),
        ("a-b[07].cluster,c", "a-b07.cluster"),
    ],
)
def test_the_first_host_of_a_list(nodelist, first):
    assert first_host(nodelist) == first


def test_tasks_of_nodes():
    assert tasks_of_nodes("4(x2),3") == [4, 4, 3]
    assert tasks_of_nodes("8") == [8]
    for wrong in ("", "4(x2", "x2", "4,,3", "4(2)"):
        with pytest.raises(ValueError, match="counts"):
            tasks_of_nodes(wrong)


def test_loopback_addresses():
    assert [is_loopback(a) for a in ("127.0.0.1", "127.0.1.1", "::1", "localhost", "10.0.0.1", "node1")] == [
        True, True, True, True, False, False]  # fmt: skip


def test_loopback_is_reached_by_its_own_interface():
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    assert interface_towards("127.0.0.1", several_hosts=False) == loopback
    assert interface_towards("localhost", several_hosts=True) == loopback


def test_a_host_whose_name_is_its_loopback_is_reached_by_the_default_route(monkeypatch):
    routes = {"node1": "127.0.1.1", hosts._ELSEWHERE: "10.1.2.3"}
    monkeypatch.setattr(hosts, "_own_address", routes.get)
    monkeypatch.setattr(hosts, "_interface_of", {"10.1.2.3": "ib0"}.get)
    assert interface_towards("node1", several_hosts=True) == "ib0"
    assert interface_towards("node1", several_hosts=False) == hosts._loopback()
    assert interface_towards("unknown", several_hosts=True) is None


def test_an_address_that_no_interface_has():
    assert hosts._interface_of("192.0.2.1") is None
    assert hosts._interface_of("2001:db8::1") is None
