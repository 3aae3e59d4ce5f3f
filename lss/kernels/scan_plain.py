"""Recurrences in plain torch, a block of tokens at a time: forward and backward, with states between chunks."""

from __future__ import annotations

import torch

from lss.kernels.scan_blocks import BLOCK, Passing, ScanWork, chained
from lss.kernels.scan_channels import CHANNEL_BLOCK, ChannelWork
from lss.segment import Segment, scan_blocks


def _work(q, k, v, g, segment: Segment) -> ScanWork:
    """A call's blocks, by whether a head has one decay or one for each of its channels."""
    if g.dim() == 3:
        return ScanWork(q, k, v, g, scan_blocks(segment, BLOCK))
    return ChannelWork(q, k, v, g, scan_blocks(segment, CHANNEL_BLOCK))


def forward(q, k, v, g, segment: Segment, passing: Passing | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y (B, T, N, H), and the states that enter this rank's chunks, None where that is 0.

    Memory while it computes: a few times the scores of an eighth of the blocks with themselves, B T N C / 8, and a state a
    block, B (T / C) N P H, all in float32 (float64).
    """
    work = _work(q, k, v, g, segment)
    states, ends = chained(work.by_chunk(work.ends()), work.by_chunk(work.decay))
    arriving = None if passing is None else passing.forward(work.by_chunk(work.decay).prod(2), ends)
    out = work.inside()  # while the states are under way
    entering = None if arriving is None else arriving()
    out += work.from_states(work.entered(states, entering))
    return work.back(out, v.dtype), entering


def backward(dy, q, k, v, g, entering, segment: Segment, passing: Passing | None) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv, dg), each in its input's dtype."""
    work = _work(q, k, v, g, segment)
    decay = work.by_chunk(work.decay)
    dy = work.cut(dy, masked=True)
    leaving, first = chained(work.by_chunk(work.states_gradient(dy)), decay, reverse=True)
    arriving = None if passing is None else passing.backward(first)
    inside = work.inside_gradients(dy)  # while the states' gradients are under way
    states, _ = chained(work.by_chunk(work.ends()), decay)
    states = work.entered(states, entering)
    leaving = work.left(leaving, None if arriving is None else arriving())
    grads = work.gradients(dy, states, leaving, inside)
    dq, dk, dv, dg = (work.back(grad, x.dtype) for grad, x in zip(grads, (q, k, v, g), strict=True))
    return dq, dk, dv, dg.view(g.shape)
