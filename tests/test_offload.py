"""Tensors that autograd saves, kept in host memory and on disk."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from lss.config.errors import Refused
from lss.hosts import free_memory
from lss.offload import DiskTier, HostTier, Offloader, host_limit, make_offloader

CPU = torch.device("cpu")


def host(limit=1 << 30, **options):
    return Offloader([HostTier(CPU, limit)], least_bytes=1, **options)


def disk(folder, limit=1 << 20):
    return Offloader([DiskTier(HostTier(CPU, limit), folder)], least_bytes=1)


@pytest.fixture(params=["host", "disk", "host then disk"])
def offloader(request, tmp_path):
    if request.param == "host":
        return host()
    if request.param == "disk":
        return disk(tmp_path)
    return Offloader([HostTier(CPU, 3000), DiskTier(HostTier(CPU, 2000), tmp_path)], least_bytes=1)


def chain(x, offloader=None):
    """exp is saved by its output, sin and * by their inputs."""
    for _ in range(5):
        if offloader is None:
            x = x.sin().exp() * x
            continue
        offloader.next_group()
        with offloader.keeping():
            x = x.sin().exp() * x
    return x.sum()


def test_gradients_are_the_same_bits(offloader):
    leaf = torch.randn(64, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(chain(leaf), leaf)
    for _ in range(3):  # buffers and files are used again
        (found,) = torch.autograd.grad(chain(leaf, offloader), leaf)
        assert torch.equal(found, expected)
        # a product of which one factor is saved for another operator already is not written twice
        assert offloader.tally.here == 0
        assert offloader.tally.away <= 15 * leaf.numel() * 8


def test_what_is_saved_twice_is_kept_once():
    keeper = host()
    x = torch.randn(100)
    first, second = keeper.keep(x), keeper.keep(x)
    assert first is second
    assert keeper.tally.away == 400
    assert torch.equal(keeper.restore(first), x)
    assert torch.equal(keeper.restore(second), x)
    with pytest.raises(RuntimeError, match="twice"):
        keeper.restore(first)


def test_memory_used_anew_is_another_tensor():
    """The same address, shape and version, but what stood there is gone."""
    keeper, buffer = host(), torch.zeros(256)
    kept = []
    for number in range(20):
        x = torch.full((1000,), float(number))
        kept.append((number, keeper.keep(x)))
        del x
    x = buffer.fill_(1)
    one = keeper.keep(x)
    two = keeper.keep(x.fill_(2))
    assert (keeper.restore(two) == 2).all()
    assert (keeper.restore(one) == 1).all()
    for number, one in reversed(kept):
        assert (keeper.restore(one) == number).all()


def test_the_limit_holds_and_what_finds_no_room_stays():
    tier = HostTier(CPU, 1000)
    keeper = Offloader([tier], least_bytes=1)
    tensors = [torch.randn(100) for _ in range(4)]
    kept = [keeper.keep(x) for x in tensors]
    assert [isinstance(k, torch.Tensor) for k in kept] == [False, False, True, True]
    assert (keeper.tally.away, keeper.tally.here, tier.taken) == (800, 800, 800)
    for x, k in zip(tensors, kept, strict=True):
        assert torch.equal(keeper.restore(k), x)
    # freed buffers of another size make room
    assert not isinstance(keeper.keep(torch.zeros(250)), torch.Tensor)
    assert tier.taken == 1000


def test_small_parameters_and_views_stay():
    keeper = Offloader([HostTier(CPU, 1 << 20)], least_bytes=100)
    for x in (torch.zeros(24), torch.nn.Parameter(torch.zeros(100)), torch.zeros(100, 2)[:, 0], torch.zeros(9, 8).T):
        assert isinstance(keeper.keep(x), torch.Tensor)


def test_a_pass_without_backward_gives_its_room_back():
    tier = HostTier(CPU, 10_000)
    keeper = Offloader([tier], least_bytes=1)
    for _ in range(8):
        chain(torch.randn(30, requires_grad=True), keeper)
        gc.collect()
    assert keeper.tally.here == 0


def test_disk_waits_for_slow_writes_and_brings_them_back_ahead(tmp_path):
    tier = DiskTier(HostTier(CPU, 900), tmp_path)
    keeper, gate = Offloader([tier], least_bytes=1), threading.Event()
    first, second = torch.randn(100), torch.randn(100)
    tier.writer.submit(gate.wait)
    kept = []
    for x in (first, second):
        keeper.next_group()
        kept.append(keeper.keep(x.clone()))
    assert not list(tmp_path.iterdir())  # the files have no names
    gate.set()
    assert torch.equal(keeper.restore(kept[1]), second)
    assert kept[0].back is not None  # on its way, or there
    assert torch.equal(keeper.restore(kept[0]), first)


def test_more_than_passes_through_stays_on_the_device(tmp_path):
    keeper = disk(tmp_path, limit=100)
    assert isinstance(keeper.keep(torch.zeros(100)), torch.Tensor)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "cpu"}, "memory.offload=cpu: use 'none', 'host' or 'disk'"),
        ({"kind": "host", "gib": 0}, "memory.offload_gib=0"),
        ({"kind": "host", "gib": "much"}, "memory.offload_gib=much"),
        ({"kind": "disk", "folder": "/no/such"}, "memory.offload_path=/no/such"),
    ],
)
def test_refusals(options, message):
    kind = options.pop("kind")
    with pytest.raises(Refused, match=message):
        make_offloader(kind, CPU, **options)


def test_limits_are_shares_of_what_is_free():
    assert make_offloader("none", CPU) is None
    assert host_limit(1.5, 4) == 3 << 29
    free = free_memory()
    assert 1 << 20 < free < 1 << 50
    assert 0.5 < host_limit("auto", 4) / (free // 8) < 2


@pytest.mark.parametrize("early, late, groups, between", [(1 << 30, 1 << 30, 2, 1), (0, 1 << 30, 1, 1), (0, 0, 1, 0)])
def test_large_groups_come_back_one_at_a_time(early, late, groups, between):
    """Of a chain's five groups, how many have tensors on the device at once, and how many after the last use of one."""
    keeper = host(early_bytes=early, late_bytes=late)
    leaf = torch.randn(64, 3, dtype=torch.float64, requires_grad=True)
    most, least, restore = 0, 5, keeper.restore

    def watched(kept):
        nonlocal most, least
        x = restore(kept)
        alive = [one for ref in keeper._order if (one := ref()) is not None]
        back = len({one.group for one in alive if one.back is not None})
        most = max(most, back)
        least = min(least, back) if alive else least
        return x

    keeper.restore = watched
    (found,) = torch.autograd.grad(chain(leaf, keeper), leaf)
    (expected,) = torch.autograd.grad(chain(leaf), leaf)
    assert torch.equal(found, expected)
    assert (most, least) == (groups, between)
