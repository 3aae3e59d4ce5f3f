"""What every context-parallel algorithm is given besides q, k and v."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from lss.comm import Communicator
from lss.comm.transport import Transport
from lss.kernels import Work
from lss.segment import Segment


@dataclass(frozen=True)
class AttentionSpec:
    """One attention call over a cut sequence, with everything that has been decided about it.

    Attributes:
        segment: the queries that this rank holds.
        keys: the keys that this rank holds; the same segment in self-attention.
        comm: the cp group.
        work: what this rank's queries compute, for all heads.
        transport: how keys and their gradients travel, for the algorithms that gather them.
        head_chunks: in how many nearly even groups the key heads are taken one after another.
        regather: backward fetches keys and values again instead of keeping them.
    """

    segment: Segment
    keys: Segment
    comm: Communicator
    work: Work
    transport: Transport | None = None
    head_chunks: int = 1
    regather: bool = True


def head_groups(n_heads: int, n_kv_heads: int, chunks: int) -> list[tuple[slice, slice]]:
    """(query heads, key heads) of each head chunk: key heads in nearly even runs, with the queries that use them."""
    share = n_heads // n_kv_heads
    edges = [n_kv_heads * i // chunks for i in range(chunks + 1)]
    return [(slice(a * share, b * share), slice(a, b)) for a, b in pairwise(edges)]
