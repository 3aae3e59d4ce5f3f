"""The kernel of traces: flash-attn-4's buffers and nothing of its numbers, and never on tensors with data."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lss.config.errors import Refused
from lss.kernels import pick_kernel
from lss.planner.ledger import Ledger


def heads(N: int, K: int, T: int = 256, S: int = 1024, H: int = 64, dtype=torch.bfloat16):
    q, out, dout = (torch.empty(1, T, N, H, dtype=dtype) for _ in range(3))
    k, v = (torch.empty(1, S, K, H, dtype=dtype) for _ in range(2))
    return q, k, v, out, dout, torch.empty(1, N, T)


@pytest.mark.parametrize("N, K", [(8, 8), (8, 2)])
def test_backward_makes_the_sums_of_the_kernel_and_lets_them_go(N, K):
    with FakeTensorMode():
        q, k, v, out, dout, lse = heads(N, K)
        kernel = pick_kernel("traced", q)
        places = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        with Ledger() as ledger:
            grads = kernel.backward(dout, q, k, v, out, lse, causal=True, scale=1.0, into=places)
        assert all(a is b for a, b in zip(grads, places, strict=True))
    shared = 2 * 4 * k.numel() if N != K else 0
    given = 4 * lse.numel()  # was there before, but is noted as what the guard's slice of it gives
    assert ledger.peak().bytes == given + 4 * q.numel() + 2 * 4 * lse.numel() + shared
    assert ledger.timeline()[-1][1] == given


def test_forward_makes_what_it_returns():
    with FakeTensorMode():
        q, k, v, *_ = heads(8, 2)
        with Ledger() as ledger:
            out, lse = pick_kernel("traced", q).forward(q, k, v, causal=True, scale=1.0)
        assert ledger.peak().bytes == out.numel() * 2 + lse.numel() * 4


def test_what_the_kernel_does_not_take_is_traced_by_another():
    with FakeTensorMode():
        assert pick_kernel("traced", heads(8, 2, dtype=torch.float64)[0]).name == "sdpa_cpu"
        assert pick_kernel("traced", heads(8, 2)[0], ["alibi_slopes"]).name == "tiled"


def test_numbers_are_never_left_to_it():
    with pytest.raises(Refused, match="kernel"):
        pick_kernel("traced", heads(8, 2)[0])
