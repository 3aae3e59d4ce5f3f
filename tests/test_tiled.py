"""Loss and linear pieces by tiles: exact, summed in float32, and never as large as the whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lss
from lss.config.errors import Refused
from lss.model import Transformer
from lss.tiled import linear_cross_entropy_sum, recomputed, tile_size
from tests.distributed.model_cases import model_config
from tests.distributed.pool import mesh, pool

T, D, V = 23, 16, 61


class Largest(TorchDispatchMode):
    """The most elements that a tensor of a given width, last or first, has had."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.elements = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dim() and self.width in (x.shape[-1], x.shape[0]):
                self.elements = max(self.elements, x.numel())
        return out


def example(dtype=torch.float64, tokens=T):
    """Hidden states, weight and labels of which a third is not counted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(V, (tokens,), generator=generator)
    labels[::3] = -100
    return x, weight, labels


def by_torch(x, weight, labels):
    """Loss and both gradients from all logits at once."""
    loss = F.cross_entropy(F.linear(x, weight), labels, reduction="sum")
    return loss, *torch.autograd.grad(3 * loss, (x, weight))


def relative(a, b):
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())


@pytest.mark.parametrize("tiles", ["auto", 1, 5, 22, 23, 100])
def test_loss_by_tiles_is_the_loss(tiles):
    x, weight, labels = example()
    found = linear_cross_entropy_sum(x, weight, labels, tiles=tiles)
    gradients = torch.autograd.grad(3 * found, (x, weight), retain_graph=True)
    for a, b in zip((found, *gradients), by_torch(x, weight, labels), strict=True):
        assert relative(a, b) <= 1e-14
    again = torch.autograd.grad(3 * found, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("needed", ["x", "weight", "neither"])
def test_only_the_gradients_asked_for(needed):
    x, weight, labels = example()
    x.requires_grad_(needed == "x")
    weight.requires_grad_(needed == "weight")
    loss = linear_cross_entropy_sum(x, weight, labels, tiles=5)
    assert loss.requires_grad == (needed != "neither")
    if needed != "neither":
        loss.backward()
    assert (x.grad is None, weight.grad is None) == (needed != "x", needed != "weight")


def test_no_labels_and_no_tokens_are_zero():
    x, weight, labels = example()
    assert linear_cross_entropy_sum(x, weight, torch.full_like(labels, -100), tiles=5).item() == 0.0
    loss = linear_cross_entropy_sum(x[:0], weight, labels[:0])
    loss.backward()
    assert loss.item() == 0.0
    assert not weight.grad.any()


def test_weight_gradients_add_up_in_float32_under_autocast():
    """The error of 64 tiles is that of one: sums of bfloat16 parts would be off by ten times as much."""
    x, weight, labels = example(torch.float32, 1024)
    exact = by_torch(x.double(), weight.double(), labels)[2]
    errors = {}
    for tiles in (16, 1024):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy_sum(x, weight, labels, tiles=tiles)
        dx, dweight = torch.autograd.grad(3 * loss, (x, weight))
        assert dweight.dtype == dx.dtype == torch.float32
        errors[tiles] = relative(dweight, exact)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(x, weight)
    whole = torch.autograd.grad(3 * F.cross_entropy(logits.float(), labels, reduction="sum"), weight)[0]
    assert errors[16] <= 1.01 * errors[1024]
    assert errors[16] <= relative(whole, exact)


def test_no_tensor_of_all_tokens_by_vocabulary():
    x, weight, labels = example()
    with Largest(V) as whole:
        by_torch(x, weight, labels)
    with Largest(V) as tiled:
        linear_cross_entropy_sum(x, weight, labels, tiles=5).backward()
    assert whole.elements == T * V
    assert tiled.elements == max(5, D) * V  # the weight itself is D * V


@pytest.mark.parametrize("size", [None, 1, 5, 23])
def test_recomputed_piece_is_the_piece(size):
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)).double()
    mlp[0].bias.requires_grad_(False)
    x, a = (torch.randn(2, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.arange(T, dtype=torch.float64)[:, None]
    wanted = [x, a, mlp[0].weight, mlp[2].weight, mlp[2].bias]

    def piece(x, a, tokens):
        return x + mlp(a * scale[tokens])

    expected = torch.autograd.grad(piece(x, a, slice(None)).square().sum(), wanted)
    found = torch.autograd.grad(recomputed(piece, (x, a), list(mlp.parameters()), size).square().sum(), wanted)
    assert max(map(relative, found, expected)) <= 1e-14


@pytest.mark.parametrize("size", [None, 1, 5, 23])
def test_recomputed_piece_of_several_results(size):
    torch.manual_seed(0)
    first, second = torch.nn.Linear(8, 6).double(), torch.nn.Linear(8, 4).double()
    x = torch.randn(2, T, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.arange(T, dtype=torch.float64)[:, None]
    wanted = [x, *first.parameters(), *second.parameters()]

    def piece(x, tokens):
        return first(x), second(x).unflatten(-1, (2, 2)) * scale[tokens][..., None]

    def total(results):
        a, b = results
        return a.square().sum() + b.sin().sum()

    expected = torch.autograd.grad(total(piece(x, slice(None))), wanted)
    found = torch.autograd.grad(total(recomputed(piece, (x,), wanted[1:], size)), wanted)
    assert max(map(relative, found, expected)) <= 1e-14


def test_tile_sizes():
    assert tile_size(7, 100, 1, 1) == 7
    assert tile_size("auto", 100, 8, 1 << 20) == 100
    assert tile_size("auto", 65536, 128256 * 2, 1 << 30) == 4096  # sixteen even tiles
    assert tile_size("auto", 1000, 10, 30) == 3
    assert tile_size("auto", 5, 1 << 40, 1 << 30) == 1
    for tiles in (0, -1, "all", 2.5, True):
        with pytest.raises(Refused, match=r"memory\.tiles"):
            lss.linear_cross_entropy(*example(), tiles=tiles)


def _peak(function):
    """Bytes that this process's resident memory rises by at most while the function runs."""
    import threading
    import time

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    done, peak, before = threading.Event(), [0], resident()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        function()
    finally:
        done.set()
        watching.join()
    return peak[0] - before


def _loss_memory(cp, seq_len, vocab, tiles):
    """(peak of loss and backward on this rank, bytes of all of its logits in float32)."""
    T, width = seq_len // cp, 8
    x = torch.randn(1, T, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(vocab, (1, T))

    def step():
        lss.linear_cross_entropy(x, weight, labels, mesh=mesh(cp), tiles=tiles).backward()

    return _peak(step), T * vocab * 4


def test_memory_of_the_loss_is_that_of_a_tile():
    """With 32,000 words 8,192 tokens a rank have 1 GiB of logits; the loss takes half a GiB at most, for any length."""
    for peak, logits in pool(2).run(_loss_memory, 2, 16384, 32000, "auto"):
        assert logits == 1_048_576_000
        assert peak <= 512 << 20
    # and where all are there at once, they are what is measured
    for peak, logits in pool(2).run(_loss_memory, 2, 4096, 32000, 4096):
        assert peak >= 2 * logits


def test_logits_after_an_update_are_refused():
    model = Transformer(model_config(), 8)
    output = model(torch.zeros(1, 8, dtype=torch.int64))
    assert output.logits.shape == (1, 8, 61)
    output = model(torch.zeros(1, 8, dtype=torch.int64))
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed"):
        _ = output.logits


def _uneven(cp, tiles):
    """A model of one's own: loss and gradient by hidden states against all logits, labels uneven over ranks."""
    x, weight, labels = example()
    labels[:11] = -100
    count = int((labels != -100).sum())
    expected = by_torch(x, weight, labels)
    local = lss.shard(x.detach()[None], mesh(cp)).requires_grad_()
    own = weight.detach().clone().requires_grad_()
    loss = lss.linear_cross_entropy(local, own, lss.shard(labels[None], mesh(cp)), mesh(cp), tiles=tiles)
    (3 * count * loss).backward()
    lss.sum_gradients([own], mesh(cp))
    dx = lss.unshard(local.grad, mesh(cp), length=T)[0]
    return [relative(a, b) for a, b in zip((loss * count, dx, own.grad), expected, strict=True)]


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_global_loss_by_tiles(cp):
    for errors in pool(cp).run(_uneven, cp, 4):
        assert max(errors) <= 1e-13
