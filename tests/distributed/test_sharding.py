"""Cutting and putting back: any length, any dimension, any dtype, and gradients through both."""

from __future__ import annotations

import pytest
import torch

import lss
from tests.distributed.pool import mesh, pool


def _round_trip(cp, order, length, dim, dtype):
    shape = [2, 3, 4]
    shape[dim] = length
    x = torch.arange(2 * 3 * 4 * length).to(dtype)[: torch.Size(shape).numel()].view(shape)
    local = lss.shard(x, mesh(cp), dim=dim, order=order)
    back = lss.unshard(local, mesh(cp), dim=dim, order=order, length=length)
    seg = lss.make_segment(length, mesh(cp), order)
    by_segment = lss.unshard(lss.shard(x, mesh(cp), dim=dim, seg=seg), mesh(cp), dim=dim, seg=seg)
    return torch.equal(back, x), torch.equal(by_segment, x), local.shape[dim] == seg.local_len


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["contiguous", "head_tail"])
@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize("dim, dtype", [(0, torch.float32), (1, torch.int64), (-1, torch.bfloat16)])
def test_unshard_undoes_shard(cp, order, length, dim, dtype):
    assert all(all(result) for result in pool(cp).run(_round_trip, cp, order, length, dim, dtype))


def _padding(dtype, **options):
    return lss.shard(torch.ones(1, 5).to(dtype), mesh(2), order="contiguous", **options).tolist()


def test_padding_is_never_a_label():
    assert pool(2).run(_padding, torch.int64)[1] == [[1, 1, -100]]
    assert pool(2).run(_padding, torch.int64, pad_value=0)[1] == [[1, 1, 0]]
    assert pool(2).run(_padding, torch.float32)[1] == [[1.0, 1.0, 0.0]]
    assert pool(2).run(_padding, torch.bool)[1] == [[True, True, False]]


def _gradients(cp):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    whole = lss.unshard(lss.shard(x, mesh(cp)) ** 2, mesh(cp), length=7)
    # every rank computes the same loss on the whole tensor: the sum over ranks is cp times it
    (whole * weight).sum().div(cp).backward()
    total = lss.unshard(lss.shard(x.grad, mesh(cp)), mesh(cp), length=7)
    return float((total - 2 * x.detach() * weight).abs().max())


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_gradients_flow_through_both(cp):
    assert max(pool(cp).run(_gradients, cp)) <= 1e-14


def _refused(what):
    x = torch.randn(1, 6, 2)
    if what == "length":
        lss.unshard(x, mesh(2), length=8)
    if what == "seg":
        lss.shard(x, mesh(2), seg=lss.make_segment(7, mesh(2)))
    if what == "attention":
        lss.attention(*(torch.randn(1, 6, 2, 8) for _ in range(3)), mesh=mesh(2), seq_len=40)
    if what == "cu_seqlens":
        lss.make_segment(8, mesh(2), cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))


@pytest.mark.parametrize("what, words", [("length", "length=8"), ("seg", "seq_len 7"), ("attention", "seq_len=40"),
                                         ("cu_seqlens", "cu_seqlens")])  # fmt: skip
def test_lengths_that_do_not_fit_are_refused(what, words):
    for ok, error in pool(2).outcomes(_refused, what):
        assert not ok
        assert error[0] == "Refused"
        assert words in error[1]
