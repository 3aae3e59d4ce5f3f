"""What rank processes compute in the tests of recurrences and convolutions over a cut sequence."""

from __future__ import annotations

import torch

import lss
from lss.comm import Communicator, count_collectives
from lss.kernels.conv import conv_reference
from lss.kernels.scan import scan_reference
from lss.mesh import axis_group
from tests.distributed.cases import relative
from tests.distributed.pool import mesh


def drawn(*shapes, seed=0):
    """Random float64 tensors, equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _segment(cp, S, order, edges, per_node=None):
    the_mesh = mesh(cp, 1, per_node)
    return the_mesh, lss.make_segment(S, the_mesh, order, None if edges is None else torch.tensor(edges, dtype=torch.int32))


def _sizes(counters):
    return [{(kind, purpose): (t.calls, t.bytes) for (kind, purpose, _), t in c.tallies.items()} for c in counters]


def _at_padding(y, seg):
    """The largest output there, which is 0, though padding holds ones, and ones are its gradient."""
    return float(y.detach()[:, seg.positions >= seg.seq_len].abs().sum())


def scan_case(cp, *, S, N=4, K=2, P=3, H=5, B=2, order="head_tail", edges=None, dtype=torch.float64, decay=0.25,
              per_node=None, by_channel=False):  # fmt: skip
    """Relative errors of y, dq, dk, dv and dg against the loop over tokens, y at padding, and what this rank counted."""
    the_mesh, seg = _segment(cp, S, order, edges, per_node)
    q, k, v, g, dy = drawn((B, S, K, P), (B, S, K, P), (B, S, N, H), (B, S, N, P) if by_channel else (B, S, N), (B, S, N, H))
    whole = [x.to(dtype) for x in (q, k, v, -g.abs() * decay)]
    dy = dy.to(dtype)
    leaves = [x.double().requires_grad_() for x in whole]
    expected = scan_reference(*leaves, edges=tuple(edges or ()))
    expected = [expected.detach(), *torch.autograd.grad(expected, leaves, dy.double())]
    mine = [lss.shard(x, the_mesh, seg=seg, pad_value=1.0).requires_grad_() for x in whole]
    with count_collectives() as forward:
        y = lss.scan(*mine, mesh=the_mesh, seg=seg)
    with count_collectives() as backward:
        grads = torch.autograd.grad(y, mine, lss.shard(dy, the_mesh, seg=seg, pad_value=1.0))
    found = [lss.unshard(x.detach(), the_mesh, seg=seg) for x in (y, *grads)]
    largest = max(float(x.norm()) for x in expected[1:])
    errors = [relative(a, b, 1e-6 * largest) for a, b in zip(found, expected, strict=True)]
    return [*errors, _at_padding(y, seg)], *_sizes((forward, backward))


def conv_case(cp, *, S, C=6, W=4, B=2, order="head_tail", edges=None, dtype=torch.float64, per_node=None):
    """Relative errors of y, dx and dw against torch's own convolution, and what was counted, on this rank."""
    the_mesh, seg = _segment(cp, S, order, edges, per_node)
    x, w, dy = (t.to(dtype) for t in drawn((B, S, C), (C, W), (B, S, C)))
    leaves = [t.double().requires_grad_() for t in (x, w)]
    expected = conv_reference(*leaves, edges=tuple(edges or ()))
    expected = [expected.detach(), *torch.autograd.grad(expected, leaves, dy.double())]
    mine = [lss.shard(x, the_mesh, seg=seg, pad_value=1.0).requires_grad_(), w.clone().requires_grad_()]
    with count_collectives() as forward:
        y = lss.causal_conv(*mine, mesh=the_mesh, seg=seg)
    with count_collectives() as backward:
        dx, dw = torch.autograd.grad(y, mine, lss.shard(dy, the_mesh, seg=seg, pad_value=1.0))
    dw = Communicator(axis_group(the_mesh, ("cp",))).all_reduce(dw.double(), "test").wait()
    found = [*(lss.unshard(t.detach(), the_mesh, seg=seg) for t in (y, dx)), dw]
    errors = [relative(a, b, 1e-300) for a, b in zip(found, expected, strict=True)]
    return [*errors, _at_padding(y, seg)], *_sizes((forward, backward))
