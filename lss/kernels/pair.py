"""Two blocks in one call: a rank's two runs of queries, each seeing a prefix of the keys, as a batch of two.

Causal attention in head_tail order gives a rank two such blocks. On short sequences launching a kernel takes as long as
computing it: one call for both halves launches half as many. Keys and values stand there once, expanded to two rows, and
each row reads as many of them as its queries see; their gradients come in two rooms, one for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lss.segment import Block

Lengths = tuple[int, int]


class Pair(NamedTuple):
    """A kernel's form for two rows of queries on prefixes of the same keys, causal masks aligned bottom-right in each.

    Attributes:
        forward: (out, lse, q, k, v, lengths, scale): writes out (2, T, N, H) and lse (2, N, T) of q (2, T, N, H); row n
            sees the first lengths[n] tokens of k and v (1, S, K, H).
        backward: (dq, dk, dv, dout, q, k, v, out, lse, lengths, scale): writes dq (2, T, N, H), and dk and dv (2, S, K, H),
            of which row n's are the first lengths[n] tokens; what stands behind them is not defined.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]


def pair_of(blocks: Sequence[Block], n_queries: int) -> Lengths | None:
    """How many keys the first and the second half of the queries see, where these blocks are just that; else None."""
    if len(blocks) != 2 or n_queries % 2:
        return None
    half = n_queries // 2
    for number, block in enumerate(blocks):
        placed = (block.q_start, block.q_stop, block.k_start) == (number * half, (number + 1) * half, 0)
        if not placed or not block.causal or block.window is not None or block.k_stop < half:
            return None
    return blocks[0].k_stop, blocks[1].k_stop


def halves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """(1, 2T, heads, H) as two rows (2, T, heads, H), and lse (1, N, 2T) as (2, N, T); views."""
    return [
        x.view(2, -1, *x.shape[2:]) if x.dim() == 4 else x.view(x.shape[1], 2, -1).transpose(0, 1) for x in tensors
    ]


def stacked(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two tensors (1, S, K, H) of one shape in one buffer, b behind a, as one (2, S, K, H), a view."""
    assert a.shape == b.shape
    assert a.stride() == b.stride()
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    distance = b.storage_offset() - a.storage_offset()
    assert distance > 0, "strides do not run backwards"
    return a.as_strided((2, *a.shape[1:]), (distance, *a.stride()[1:]))


def plain(module: Any) -> Pair:
    """The plain twin: one row after another, by a kernel's own forward and backward."""

    def forward(out, lse, q, k, v, lengths, scale) -> None:
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            found = module.forward(q[one], k[:, :length], v[:, :length], causal=True, scale=scale)
            out[one], lse[one] = found

    def backward(dq, dk, dv, dout, q, k, v, out, lse, lengths, scale) -> None:
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            keys = k[:, :length], v[:, :length]
            grads = module.backward(dout[one], q[one], *keys, out[one], lse[one], causal=True, scale=scale)
            dq[one], dk[one, :length], dv[one, :length] = grads

    return Pair(forward, backward)
