"""What every context-parallel algorithm is given besides q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lss.comm import Communicator
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
        transport, dkv_dtype: how keys and their gradients travel, for the algorithms that gather them.
        head_chunks: in how many nearly even groups the key heads are taken one after another.
        token_chunks: in how many runs the tokens of every segment are gathered, one after another.
        regather: backward fetches keys and values again instead of keeping them.
        inner: neighbouring ranks that share out the heads of their tokens; 1 but for "lss_2d".
        groups: (query heads, key heads) taken one after another, where they are not simply `head_chunks` even groups.
    """

    segment: Segment
    keys: Segment
    comm: Communicator
    work: Work
    transport: str = "auto"
    dkv_dtype: str = "auto"
    head_chunks: int = 1
    regather: bool = True
    inner: int = 1
    token_chunks: int = 1
    groups: tuple[tuple[slice, slice], ...] | None = None

    def head_groups(self, n_heads: int, n_kv_heads: int) -> Sequence[tuple[slice, slice]]:
        """(query heads, key heads) of each head chunk."""
        return self.groups or head_groups(n_heads, n_kv_heads, self.head_chunks)


def head_groups(n_heads: int, n_kv_heads: int, chunks: int) -> list[tuple[slice, slice]]:
    """(query heads, key heads) of each head chunk: key heads in nearly even runs, with the queries that use them."""
    share = n_heads // n_kv_heads
    edges = [n_kv_heads * i // chunks for i in range(chunks + 1)]
    return [(slice(a * share, b * share), slice(a, b)) for a, b in pairwise(edges)]


# by the address of their storage, since autograd hands out another object than a hook returned
_SPENT: dict[int, StorageWeakRef] = {}


def spend(x: torch.Tensor) -> torch.Tensor:
    """Say of a saved tensor that it was handed out for the last time: who has it may write over it."""
    for address in [address for address, storage in _SPENT.items() if storage.expired()]:
        del _SPENT[address]
    storage = x.untyped_storage()
    _SPENT[storage._cdata] = StorageWeakRef(storage)
    return x


def is_spendable(x: torch.Tensor) -> bool:
    """Whether nobody will read this tensor's memory after who has it now."""
    known = _SPENT.get(x.untyped_storage()._cdata)
    return known is not None and not known.expired()
