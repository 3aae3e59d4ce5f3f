"""What stands around flash-linear-attention's kernels, in plain torch: sums of decays, and dq, dk and dg of a section."""

from __future__ import annotations

import pytest
import torch

from lss.kernels.scan_blocks import ScanWork, chained
from lss.kernels.scan_fla import block_sums, marked_blocks, section_gradients
from lss.segment import make_segment, scan_blocks
from tests.gpu.test_scan_kernels import DOCUMENTS, drawn

BEGINS = torch.zeros(1, 1000, dtype=torch.bool)
BEGINS[:, list(DOCUMENTS[:-1])] = True


@pytest.mark.parametrize("decay", [1e-3, 0.1, 30.0])
def test_differences_of_sums_are_decays_and_0_between_documents(decay):
    g = -decay * torch.rand(1, 1000, 3, generator=torch.Generator().manual_seed(0))
    g = g.masked_fill(BEGINS[..., None], 0.0)
    for begins in (None, BEGINS):
        sums = block_sums(g, None if begins is None else marked_blocks(begins))
        for start in range(0, 1000, 64):
            at = slice(start, min(start + 64, 1000))
            weights = (sums[0, at, None] - sums[0, None, at]).exp2()
            document = BEGINS[0, at].cumsum(0) if begins is not None else torch.zeros(at.stop - at.start)
            c = g[0, at].double().cumsum(0)
            true = (c[:, None] - c[None]).exp() * (document[:, None] == document[None])[..., None]
            lower = torch.ones(at.stop - at.start, at.stop - at.start).tril()[..., None].bool()
            assert float((weights - true)[lower.expand_as(true)].abs().max()) <= (5e-5 if begins is None else 1e-3)
            assert bool((weights[lower.expand_as(true) & (true == 0)] == 0).all())


def test_sums_have_not_a_bit_of_documents_before():
    g = -torch.rand(1, 1000, 3, generator=torch.Generator().manual_seed(0)).masked_fill(BEGINS[..., None], 0.0)
    changed = g.clone()
    changed[:, 67:150] *= 7.3
    a, b = (block_sums(x, marked_blocks(BEGINS)) for x in (g, changed))
    for start, stop in ((0, 64), (150, 192), (192, 1000)):
        at = slice(start, stop)
        assert torch.equal(a[:, at, None] - a[:, None, at], b[:, at, None] - b[:, None, at])


@pytest.mark.parametrize("N, K", [(4, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_gradients_of_a_section_are_those_of_the_blocks(N, K, dtype, bound):
    segment = make_segment(200, cp=1, rank=0)
    q, k, v, g, dy, *_ = (x.to(dtype) if x.dim() == 4 else x for x in drawn(segment, N=N, K=K, P=16, H=32, device="cpu"))
    work = ScanWork(*(x.double() for x in (q, k, v, g)), scan_blocks(segment, 64))
    decay, dy64 = work.by_chunk(work.decay), work.cut(dy.double())
    leaving, _ = chained(work.by_chunk(work.states_gradient(dy64)), decay, reverse=True)
    states, _ = chained(work.by_chunk(work.ends()), decay)
    true = work.gradients(dy64, states.flatten(1, 2), leaving.flatten(1, 2), work.inside_gradients(dy64))
    dq, dk, _, dg = (work.back(x, torch.float64) for x in true)
    h, dh = (x[:, 0].flatten(2, 3).to(dtype) for x in (states, leaving))
    found = section_gradients(q, k, v, block_sums(g, None), dy, h, dh)
    for a, b in zip(found, (dq, dk, dg[..., 0]), strict=True):
        assert float((a.double() - b).norm() / b.norm()) <= bound
