"""CUDA kernels against softmax by autograd in float64, beside the reference kernel in the same dtype."""

from __future__ import annotations

import pytest
import torch

from lss.config.errors import Refused
from lss.kernels import KERNELS, flash4, pick_kernel
from lss.kernels.merge import merge
from tests.kernels.test_kernels import inputs, softmax_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FUSED = ["flash4", "sdpa_cudnn", "sdpa_flash"]
SHAPES = [(64, 64), (1, 1), (1, 64), (128, 384), (200, 333), (511, 1024)]


@pytest.fixture(autouse=True)
def _installed(request):
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("name") == "flash4" and flash4.installed() is None:
        pytest.skip("flash-attn-4 is not installed")


def relative(found, true):
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("Tq, Tk", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H, N, K", [(64, 8, 2), (128, 4, 4), (128, 6, 1)])
def test_kernel_is_as_near_as_its_dtype_allows(name, causal, Tq, Tk, dtype, H, N, K):
    q, k, v, dout = (x.cuda() for x in inputs(Tq, Tk, N=N, K=K, H=H, dtype=dtype))
    scale = H**-0.5
    expected = softmax_attention(*(x.cpu() for x in (q, k, v, dout)), causal, scale)
    out, lse = KERNELS[name].forward(q, k, v, causal=causal, scale=scale)
    grads = KERNELS[name].backward(dout, q, k, v, out, lse, causal=causal, scale=scale)
    assert lse.dtype == torch.float32
    assert lse.shape == expected[1].shape
    # half precision inputs, float32 accumulation, P and dS rounded once more than in the reference
    bound = 8e-3 if dtype == torch.bfloat16 else 1e-3
    for found, true in zip((out, lse, *grads), expected, strict=True):
        # with a single key dq and dk are 0, and what stands there is the rounding of numbers as large as dout
        size = max(float(true.norm()), float(dout.double().norm()) if Tk == 1 else 0.0)
        assert float((found.cpu().double() - true).norm()) <= bound * size


@pytest.mark.parametrize("name", FUSED)
def test_parts_of_the_keys_merge_and_take_the_global_lse(name):
    q, k, v, dout = (x.cuda() for x in inputs(256, 512, H=64, dtype=torch.bfloat16))
    kernel = KERNELS[name]
    parts = [slice(0, 200), slice(200, 512)]
    pairs = [kernel.forward(q, k[:, s], v[:, s], causal=False, scale=0.125) for s in parts]
    out, lse = merge(*pairs[0], *pairs[1])
    expected = softmax_attention(*(x.cpu() for x in (q, k, v, dout)), False, 0.125)
    grads = [kernel.backward(dout, q, k[:, s], v[:, s], out.bfloat16(), lse, causal=False, scale=0.125) for s in parts]
    dq = grads[0][0].float() + grads[1][0].float()
    dk, dv = (torch.cat((grads[0][i], grads[1][i]), 1) for i in (1, 2))
    for found, true in zip((out, lse, dq, dk, dv), expected, strict=True):
        assert relative(found.cpu(), true) <= 8e-3


@pytest.mark.parametrize("name", FUSED)
def test_empty_blocks_and_blind_queries(name):
    q, k, v, dout = (x.cuda() for x in inputs(96, 64, H=64, dtype=torch.bfloat16))
    out, lse = KERNELS[name].forward(q, k, v, causal=True, scale=0.125)
    dq, dk, dv = KERNELS[name].backward(dout, q, k, v, out, lse, causal=True, scale=0.125)
    assert not out[:, :32].any()
    assert torch.isneginf(lse[:, :, :32]).all()
    assert not dq[:, :32].any()
    expected = softmax_attention(*(x.cpu() for x in (q[:, 32:], k, v, dout[:, 32:])), True, 0.125)
    for found, true in zip((out[:, 32:], lse[:, :, 32:], dq[:, 32:], dk, dv), expected, strict=True):
        assert relative(found.cpu(), true) <= 8e-3
    out, lse = KERNELS[name].forward(q, k[:, :0], v[:, :0], causal=True, scale=0.125)
    assert not out.any()


@pytest.mark.parametrize(
    "dtype, H, expected",
    [(torch.float64, 64, "tiled"), (torch.float32, 64, "tiled"), (torch.bfloat16, 64, "flash4"),
     (torch.bfloat16, 256, "flash4"), (torch.bfloat16, 12, "tiled")],
)  # fmt: skip
def test_auto_takes_the_fastest_that_fits(dtype, H, expected):
    hopper, installed = torch.cuda.get_device_capability() >= (9, 0), flash4.installed() is not None
    if expected == "flash4" and not (hopper and installed):
        expected = "sdpa_cudnn" if hopper and H <= 128 else "sdpa_flash"
    assert pick_kernel("auto", torch.empty(1, 1, 1, H, dtype=dtype, device="cuda")).name == expected


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("window", [(100, 0), (31, 64), None])
def test_results_are_written_into_the_places_given(name, window):
    """Slices of larger tensors, as `Work` hands them out: the result is there, and nothing else is touched."""
    if name == "sdpa_cudnn" and window is not None:
        pytest.skip("cuDNN has no windows")
    kernel, how = KERNELS[name], {"causal": window is None, "scale": 0.125, "window": window}
    q, k, v, dout = (x.cuda() for x in inputs(256, 384, N=8, K=2, H=64, dtype=torch.bfloat16))
    out, lse = kernel.forward(q, k, v, **how)
    grads = kernel.backward(dout, q, k, v, out, lse, **how)
    rooms = [torch.full((2, 600, x.shape[2] + 2, 64), 7.0, dtype=x.dtype, device="cuda") for x in (q, q, k, v)]
    places = [room[:, 64 : 64 + x.shape[1], 1:-1] for room, x in zip(rooms, (q, q, k, v), strict=True)]
    lse_room = torch.full((2, 10, 600), 7.0, device="cuda")
    lse_place = lse_room[:, 1:-1, 64:320]
    kernel.forward(q, k, v, **how, into=(places[0], lse_place))
    kernel.backward(dout, q, k, v, out, lse, **how, into=tuple(places[1:]))
    assert torch.equal(places[0], out)
    assert torch.equal(lse_place, lse)
    for place, grad in zip(places[1:], grads, strict=True):
        assert relative(place, grad.double()) <= 2e-3  # sums of another order
    for room, place in zip([*rooms, lse_room], [*places, lse_place], strict=True):
        assert int((room == 7.0).sum()) >= room.numel() - place.numel()


def test_cudnn_is_refused_where_bits_must_be_the_same():
    q = torch.empty(1, 1, 8, 128, dtype=torch.bfloat16, device="cuda")
    assert pick_kernel("sdpa_cudnn", q).name == "sdpa_cudnn"
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(Refused, match="deterministic"):
            pick_kernel("sdpa_cudnn", q)
        assert pick_kernel("sdpa", q).name == "sdpa_flash"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [name for name in FUSED if name != "sdpa_cudnn"])
def test_deterministic_algorithms_give_the_same_bits(name):
    q, k, v, dout = (x.cuda() for x in inputs(2048, 2048, N=8, K=2, H=128, dtype=torch.bfloat16))
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = KERNELS[name].forward(q, k, v, causal=True, scale=0.1)
        first = KERNELS[name].backward(dout, q, k, v, out, lse, causal=True, scale=0.1)
        for _ in range(3):
            again = KERNELS[name].backward(dout, q, k, v, out, lse, causal=True, scale=0.1)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
