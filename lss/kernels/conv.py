"""Causal depthwise convolution over a cut sequence's chunks, in plain torch.

    y_t = sum_{d < W} w_{W - 1 - d} * x_{t - d},   x = 0 before a document's first token

one filter a channel: torch's `conv1d` with as many groups as channels, padded on the left. The W - 1 tokens before a chunk
lie in the chunk before it; where a sequence is cut, `Neighbours` brings them, and takes their gradients home.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lss.config.errors import refuse
from lss.kernels.outside import outside_graphs
from lss.segment import Segment, make_segment


class Neighbours(Protocol):
    """Brings the tokens before each of a rank's chunks."""

    def fetch(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """(B, chunks * (W - 1), C): those of each chunk behind one another, 0 where the sequence has none."""
        ...

    def give(self, dhalo: torch.Tensor, dx_BTC: torch.Tensor) -> None:
        """Add the gradients of fetched tokens to their owners' dx."""
        ...


def check_conv(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse tensors that do not fit together."""
    if x.dim() != 3 or not x.is_floating_point():
        raise refuse("x", f"{tuple(x.shape)} of {x.dtype}", "give floating point numbers (batch, tokens, channels)")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        fit = f"give a filter of one number or more for each of the {x.shape[2]} channels, (channels, width)"
        raise refuse("weight", tuple(weight.shape), fit)


@outside_graphs
def single_conv(x_BTC: torch.Tensor, weight_CW: torch.Tensor, *, segment: Segment | None = None) -> torch.Tensor:
    """The convolution over whole sequences on one device; (B, T, C).

    Args:
        x_BTC: (B, T, C).
        weight_CW: (C, W); its last column is the token's own.
        segment: the sequence, whole, with its documents; one document by default.
    """
    check_conv(x_BTC, weight_CW)
    return run_conv(x_BTC, weight_CW, segment or make_segment(x_BTC.shape[1], cp=1, rank=0), None)


def run_conv(x, weight, segment: Segment, neighbours: Neighbours | None) -> torch.Tensor:
    """The convolution over a segment, 0 at padding; `neighbours` None: the segment is the whole sequence in one chunk.

    Memory until backward: the inputs and the halo.
    """
    return _Conv.apply(x, weight, segment, neighbours)


def conv_reference(x_BTC: torch.Tensor, weight_CW: torch.Tensor, edges: tuple[int, ...] = ()) -> torch.Tensor:
    """The definition, document after document, by torch's own convolution."""
    parts, C, W = [], *weight_CW.shape
    borders = edges or (0, x_BTC.shape[1])
    for start, stop in pairwise(borders):
        x = F.pad(x_BTC[:, start:stop].transpose(1, 2), (W - 1, 0))
        parts.append(F.conv1d(x, weight_CW[:, None], groups=C).transpose(1, 2))
    return torch.cat(parts, 1)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, segment: Segment, neighbours: Neighbours | None):
        reach = weight.shape[1] - 1
        halo = None if neighbours is None or not reach else neighbours.fetch(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        extended, w = _extended(x, halo, segment, reach).to(wide), weight.to(wide)
        out = torch.zeros_like(extended[:, :, reach:])
        for d, seen in enumerate(_seen(segment, reach, x.device)):
            part = extended[:, :, reach - d : reach - d + segment.chunk_len] * w[:, reach - d]
            out += part if seen is None else part * seen
        ctx.segment, ctx.neighbours = segment, neighbours
        ctx.save_for_backward(x, weight, halo)
        return out.flatten(1, 2).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, halo = ctx.saved_tensors
        segment, reach = ctx.segment, weight.shape[1] - 1
        wide = torch.promote_types(x.dtype, torch.float32)
        extended, w = _extended(x, halo, segment, reach).to(wide), weight.to(wide)
        dy = dout.to(wide).unflatten(1, (len(segment.chunks), segment.chunk_len))
        dextended, dw = torch.zeros_like(extended), torch.empty_like(w)
        for d, seen in enumerate(_seen(segment, reach, x.device)):
            part, tokens = dy if seen is None else dy * seen, slice(reach - d, reach - d + segment.chunk_len)
            dextended[:, :, tokens] += part * w[:, reach - d]
            dw[:, reach - d] = (part * extended[:, :, tokens]).sum((0, 1, 2))
        dx = dextended[:, :, reach:].flatten(1, 2)
        if halo is not None:
            ctx.neighbours.give(dextended[:, :, :reach].flatten(1, 2), dx)
        return dx.to(x.dtype), dw.to(weight.dtype), None, None


def _extended(x: torch.Tensor, halo: torch.Tensor | None, segment: Segment, reach: int) -> torch.Tensor:
    """(B, M, reach + L, C): each chunk behind the tokens before it."""
    chunks = x.unflatten(1, (len(segment.chunks), segment.chunk_len))
    before = F.pad(chunks[:, :, :0], (0, 0, reach, 0)) if halo is None else halo.unflatten(1, (chunks.shape[1], reach))
    return torch.cat((before, chunks), 2)


def _seen(segment: Segment, reach: int, device: torch.device) -> list[torch.Tensor | None]:
    """By distance: (M, L, 1), whether a token sees the one so far before it and is no padding; None: all that are there."""
    whole = segment.padded_len == segment.seq_len
    if whole and not segment.edges:
        return [None] * (reach + 1)
    place = segment.document_positions.unflatten(0, (len(segment.chunks), segment.chunk_len))[..., None].to(device)
    true = (segment.positions < segment.seq_len).view(place.shape).to(device)
    return [(place >= d) & true for d in range(reach + 1)]
