"""Varlen calls of the CUDA kernels against their plain twin, gaps and windows included; and how long they take."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from lss.kernels import KERNELS
from lss.kernels.varlen import Varlen, flash4_backward, flash4_forward, flash_backward, flash_forward, plain, plan_waves
from lss.segment import make_blocks, make_mask
from tests.kernels.test_kernels import inputs
from tests.kernels.test_varlen import some_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMS = {"sdpa_flash": Varlen(flash_forward, flash_backward), "flash4": Varlen(flash4_forward, flash4_backward)}
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # as in test_cuda_kernels


def form(name):
    """The varlen form, or a skip where its package is missing."""
    if name == "flash4" and (find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None):
        pytest.skip("needs flash-attn-4")
    return FORMS[name]


def all_of(varlen, waves, q, k, v, dout, scale):
    """(out, lse, dq, dk, dv) of all waves."""
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), float("-inf"), device=q.device)
    lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
    for wave in waves:
        varlen.forward(out, lse, q, k, v, wave, scale)
    for wave in waves:
        varlen.backward(*grads, dout, q, k, v, out, lse, wave, scale)
    return out, lse, *grads


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("order", ["contiguous", "head_tail"])
@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 60), (False, 60)])
@pytest.mark.parametrize("H, N, K, dtype", [(64, 8, 2, torch.bfloat16), (128, 4, 4, torch.bfloat16),
                                            (128, 6, 1, torch.float16)])  # fmt: skip
def test_a_varlen_call_is_its_plain_twin(name, order, causal, window, H, N, K, dtype):
    varlen = form(name)
    S = 3000
    for seed in range(6):
        blocks = some_blocks(seed, order, causal, window, S)
        q, k, v, dout = (x.cuda()[0] for x in inputs(S, S, N=N, K=K, H=H, B=1, dtype=dtype, seed=seed))
        T = max(b.q_stop for b in blocks)
        waves, q, dout = plan_waves(blocks), q[:T], dout[:T]
        found = all_of(varlen, waves, q, k, v, dout, H**-0.5)
        true = all_of(plain(KERNELS["reference"]), waves, *(x.double() for x in (q, k, v, dout)), H**-0.5)
        for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, true, strict=True):
            seen = b != float("-inf")
            assert torch.equal(seen, a != float("-inf")), what
            error = float((a.double() - b)[seen].norm() / b[seen].norm())
            assert error <= BOUNDS[dtype], (what, error)


@pytest.mark.parametrize("name", FORMS)
def test_runs_with_gaps_leave_what_lies_between(name):
    """Rows that no run holds keep what stood there, forward and backward."""
    varlen = form(name)
    q, k, v, dout = (x.cuda()[0] for x in inputs(1000, 1000, N=8, K=2, H=64, B=1, dtype=torch.bfloat16))
    run = ((0, 1000, 0, 1000),)
    mask = make_mask((0, 70, 71, 300, 520, 999, 1000), causal=True)
    blocks = tuple(b for n, b in enumerate(make_blocks(run, run, mask)) if n % 2)
    waves = plan_waves(blocks)
    assert len(waves) == 1
    out, lse = torch.full_like(q, 7.0), torch.full((8, 1000), 7.0, device="cuda")
    grads = [torch.full_like(x, 7.0, dtype=torch.float32) for x in (q, k, v)]
    varlen.forward(out, lse, q, k, v, waves[0], 0.125)
    varlen.backward(*grads, dout, q, k, v, out, lse, waves[0], 0.125)
    inside = torch.zeros(1000, dtype=torch.bool, device="cuda")
    for b in blocks:
        inside[b.q_start : b.q_stop] = True
    for x in (out, lse.T, *grads):
        assert bool((x[~inside] == 7.0).all())
    true = all_of(plain(KERNELS["reference"]), waves, *(x.double() for x in (q, k, v, dout)), 0.125)
    for a, b in zip((out, lse.T, *(g - 7.0 for g in grads)), (true[0], true[1].T, *true[2:]), strict=True):
        assert float((a.double() - b)[inside].norm() / b[inside].norm()) <= 8e-3


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [64, 256, 1024])
def test_one_call_is_faster_than_one_for_each_document(name, length):
    """Forward and backward of 16,384 tokens of packed documents, 32/8 heads of 128: printed, with `-s`."""
    varlen, S = form(name), 16384
    q, k, v, dout = (x.cuda()[0] for x in inputs(S, S, N=32, K=8, H=128, B=1, dtype=torch.bfloat16))
    run = ((0, S, 0, S),)
    waves = plan_waves(make_blocks(run, run, make_mask(tuple(range(0, S + 1, length)), causal=True)))
    times = {}
    for what, one in ((name, varlen), ("block by block", plain(KERNELS["sdpa_flash"]))):
        for _ in range(2):
            all_of(one, waves, q, k, v, dout, 0.1)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            all_of(one, waves, q, k, v, dout, 0.1)
        stop.record()
        stop.synchronize()
        times[what] = start.elapsed_time(stop) / 5
    print(f"documents of {length}: " + ", ".join(f"{what} {ms:.2f} ms" for what, ms in times.items()))
    assert times[name] < times["block by block"] or length > 512
