"""Activations in host memory and on disk, copied on streams of their own beside a GPU's work."""

from __future__ import annotations

import pytest
import torch

import lss
from lss.model import Transformer
from lss.offload import DiskTier, HostTier, Offloader
from lss.parallel import layout_of
from tests.distributed.model_cases import gradient_errors, model_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def one_gpu():
    mesh = lss.init_mesh()
    yield mesh
    from lss.mesh import close

    close()


def _gradients(mesh, offload, dtype=torch.float64, steps=3, layers=6, tokens=4096, **options):
    config = model_config(n_layers=layers, d_model=128, n_heads=4, n_kv_heads=2, d_mlp=256)
    model = Transformer(config, tokens, seed=3).to(DEVICE, dtype)
    model = lss.parallelize(model, mesh, checkpointing="attention", offload=offload, **options)
    ids = torch.randint(61, (1, tokens), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if offload:
        layout_of(model).offloader.least_bytes = 1
    for _ in range(steps):  # buffers are used again, some while copies are under way
        model.zero_grad()
        model(ids, ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, layout_of(model).offloader


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_gradients_are_the_same(one_gpu, offload, tmp_path):
    expected, _ = _gradients(one_gpu, None)
    options = {"offload_gib": 0.03, "offload_path": str(tmp_path)} if offload == "disk" else {"offload_gib": 2}
    found, offloader = _gradients(one_gpu, offload, **options)
    assert offloader.tally.away > 40 << 20  # six layers, two tensors of 4 MiB each
    assert offloader.tally.here == 0
    assert max(gradient_errors(found, expected).values()) <= 1e-12


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_copies_wait_for_what_they_copy(tier, tmp_path):
    """Each tensor is made by slow work and given up at once, and each buffer is written again while the last is read."""
    host = HostTier(DEVICE, 96 << 20)
    keeper = Offloader([host if tier == "host" else DiskTier(host, tmp_path)])
    big = torch.randn(4096, 4096, device=DEVICE)
    for turn in range(3):
        kept = []
        for number in range(5):
            keeper.next_group()
            for _ in range(20):
                big @ big
            x = torch.full((4 << 20,), turn * 10.0 + number, device=DEVICE)
            kept.append(keeper.keep(x))
            x.record_stream(torch.cuda.current_stream())
            del x
            torch.full((4 << 20,), -1.0, device=DEVICE)  # takes the memory, were it free too early
        for number in reversed(range(5)):
            found = keeper.restore(kept.pop())
            assert (found == turn * 10.0 + number).all(), (turn, number)


def test_pinned_memory_is_bounded_and_of_just_the_size():
    host = HostTier(DEVICE, 80 << 20)
    slots = [host.take(33 << 20), host.take(33 << 20), host.take(33 << 20)]
    assert slots[2] is None
    assert host.taken == 66 << 20


def test_copies_stand_beside_the_computation(one_gpu):
    """Milliseconds of a step with what is kept on the host and on the device, attention being long enough to hide it."""
    config = model_config(n_layers=8, d_model=1024, n_heads=8, n_kv_heads=4, d_mlp=2048)
    ids, times = torch.zeros(1, 32768, dtype=torch.int64, device=DEVICE), {}
    for offload in (None, "host"):
        model = Transformer(config, 32768, seed=3).to(DEVICE)
        model = lss.parallelize(model, one_gpu, checkpointing="attention", offload=offload, offload_gib=16)
        spent = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            with torch.autocast("cuda", torch.bfloat16):
                model(ids, ids).loss.backward()
            end.record()
            end.synchronize()
            spent.append(start.elapsed_time(end))
        times[offload] = sorted(spent[2:])[1]
        del model
        torch.cuda.empty_cache()
    print(times)
    assert times["host"] <= 1.1 * times[None], times
