"""Every kernel against softmax by autograd in float64; the cases that crash or mislead the operators underneath."""

from __future__ import annotations

import pytest
import torch

from lss.config.errors import Refused
from lss.kernels import KERNELS, pick_kernel, single_attention
from lss.kernels.merge import merge

CPU_KERNELS = ["sdpa_cpu", "tiled", "reference"]


def inputs(Tq, Tk, N=4, K=2, H=8, B=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, Tq, N, H), (B, Tk, K, H), (B, Tk, K, H), (B, Tq, N, H))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def softmax_attention(q, k, v, dout, causal, scale):
    """out, lse, dq, dk, dv by autograd; bottom-right causal; every query must see a key."""
    q, k, v, dout = (x.detach().double().requires_grad_() for x in (q, k, v, dout))
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ keys.transpose(-1, -2) * scale
    if causal:
        Tq, Tk = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(Tq, Tk, dtype=torch.bool).triu(1 + Tk - Tq), float("-inf"))
    out = (scores.softmax(-1) @ values).transpose(1, 2)
    return out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), dout)


@pytest.mark.parametrize("name", CPU_KERNELS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("Tq, Tk", [(1, 1), (5, 5), (3, 7), (1, 9), (33, 64), (64, 130)])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_forward_and_backward(name, causal, Tq, Tk, dtype, bound):
    q, k, v, dout = inputs(Tq, Tk, dtype=dtype)
    kernel = KERNELS[name]
    out, lse = kernel.forward(q, k, v, causal=causal, scale=0.3)
    expected = softmax_attention(q, k, v, dout, causal, 0.3)
    grads = kernel.backward(dout, q, k, v, out, lse, causal=causal, scale=0.3)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, Tq)
    for found, true in zip((out, lse, *grads), expected, strict=True):
        # with a single key dq and dk are 0, and what stands there is the rounding of numbers as large as dout
        size = max(true.norm(), dout.double().norm()) if Tk == 1 else true.norm()
        assert (found.double() - true).norm() <= bound * size + 1e-14


@pytest.mark.parametrize("name", CPU_KERNELS)
@pytest.mark.parametrize("Tq, Tk, causal", [(0, 4, True), (4, 0, True), (0, 0, False), (4, 0, False)])
def test_empty_blocks_are_zero_and_do_not_crash(name, Tq, Tk, causal):
    q, k, v, dout = inputs(Tq, Tk)
    out, lse = KERNELS[name].forward(q, k, v, causal=causal, scale=1.0)
    dq, dk, dv = KERNELS[name].backward(dout, q, k, v, out, lse, causal=causal, scale=1.0)
    assert out.shape == q.shape
    assert bool((out == 0).all() and torch.isneginf(lse).all())
    assert not dq.any()
    assert not dk.any()
    assert not dv.any()


@pytest.mark.parametrize("name", CPU_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_queries_before_the_first_key_give_zero(name, dtype):
    """Bottom-right causal with fewer keys than queries: the first queries see nothing."""
    q, k, v, dout = inputs(6, 4, dtype=dtype)
    out, lse = KERNELS[name].forward(q, k, v, causal=True, scale=1.0)
    dq, dk, dv = KERNELS[name].backward(dout, q, k, v, out, lse, causal=True, scale=1.0)
    seen = softmax_attention(q[:, 2:], k, v, dout[:, 2:], True, 1.0)
    bound = 1e-13 if dtype == torch.float64 else 1e-2
    assert not out[:, :2].any()
    assert torch.isneginf(lse[:, :, :2]).all()
    assert not dq[:, :2].any()
    for found, true in zip((out[:, 2:], lse[:, :, 2:], dq[:, 2:], dk, dv), seen, strict=True):
        assert (found.double() - true).norm() <= bound * true.norm()


@pytest.mark.parametrize("name", CPU_KERNELS)
def test_backward_of_parts_takes_the_global_lse(name):
    """Two halves of the keys, each given the out and lse of all keys, add up to the whole gradient."""
    q, k, v, dout = inputs(5, 8)
    kernel = KERNELS[name]
    out, lse = kernel.forward(q, k, v, causal=False, scale=0.5)
    whole = kernel.backward(dout, q, k, v, out, lse, causal=False, scale=0.5)
    halves = [kernel.backward(dout, q, k[:, s], v[:, s], out, lse, causal=False, scale=0.5)
              for s in (slice(0, 3), slice(3, 8))]  # fmt: skip
    assert torch.allclose(halves[0][0] + halves[1][0], whole[0], rtol=0, atol=1e-14)
    for i in (1, 2):
        assert torch.allclose(torch.cat((halves[0][i], halves[1][i]), 1), whole[i], rtol=0, atol=1e-14)


def test_merge_of_parts_is_the_whole_and_ignores_empty_parts():
    q, k, v, _ = inputs(5, 8)
    kernel = KERNELS["reference"]
    whole = kernel.forward(q, k, v, causal=False, scale=0.5)
    parts = [kernel.forward(q, k[:, s], v[:, s], causal=False, scale=0.5) for s in (slice(0, 3), slice(3, 8), slice(8, 8))]
    merged = merge(*merge(*parts[2], *parts[0]), *parts[1])
    for found, true in zip(merged, whole, strict=True):
        assert torch.allclose(found, true, rtol=0, atol=1e-14)
    out, lse = merge(*parts[2], *parts[2])
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_single_attention_passes_gradcheck():
    q, k, v, _ = (x.requires_grad_() for x in inputs(5, 5, N=2, K=1, H=4, B=1))
    for kernel in ("sdpa", "tiled", "reference"):
        assert torch.autograd.gradcheck(lambda *x, kernel=kernel: single_attention(*x, kernel=kernel), (q, k, v))


def test_kernel_table_refuses_by_name():
    q = torch.randn(1, 2, 2, 8)
    assert pick_kernel("auto", q).name == pick_kernel("sdpa", q).name == "sdpa_cpu"
    with pytest.raises(Refused, match="kernel=fast"):
        pick_kernel("fast", q)
    with pytest.raises(Refused, match="CUDA only"):
        pick_kernel("sdpa_cudnn", q)
