"""What every context-parallel algorithm is given besides q, k and v."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from lss.comm import Communicator
from lss.kernels import Kernel
from lss.segment import Segment


@dataclass(frozen=True)
class AttentionSpec:
    """One attention call over a cut sequence, with everything that has been decided about it.

    Attributes:
        segment: this rank's part of the sequence.
        comm: the cp group.
        kernel: what computes on one device.
        causal: whether a query sees only keys at its own position and before.
        scale: factor on the scores.
        head_chunks: in how many nearly even groups the key heads are taken one after another.
        regather: backward fetches keys and values again instead of keeping them.
    """

    segment: Segment
    comm: Communicator
    kernel: Kernel
    causal: bool
    scale: float
    head_chunks: int = 1
    regather: bool = True


def head_groups(n_heads: int, n_kv_heads: int, chunks: int) -> list[tuple[slice, slice]]:
    """(query heads, key heads) of each head chunk: key heads in nearly even runs, with the queries that use them."""
    share = n_heads // n_kv_heads
    edges = [n_kv_heads * i // chunks for i in range(chunks + 1)]
    return [(slice(a * share, b * share), slice(a, b)) for a, b in pairwise(edges)]


def lse_like(q_BTNH: torch.Tensor) -> torch.Tensor:
    """An lse of shape (B, N, T) for which no key has been seen yet: -inf everywhere."""
    B, T, N, _ = q_BTNH.shape
    dtype = torch.promote_types(q_BTNH.dtype, torch.float32)
    return torch.full((B, N, T), float("-inf"), dtype=dtype, device=q_BTNH.device)
