"""What recurrences and convolutions need to know of a cut sequence: index arithmetic only.

A recurrence carries a state from token to token. Cut over ranks, each chunk computes its own part and the states between
chunks are put together in the order of the sequence; a document's first token forgets the state. Padding counts as a
document of its own, behind the last, so that it neither gives nor takes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lss.segment.order import Segment


@dataclass(frozen=True, eq=False)
class ScanBlocks:
    """This rank's tokens in blocks of one size, a whole number of them for each chunk.

    A chunk is filled up to that number by tokens that belong to its last token's document and have no key.

    Attributes:
        chunks, per_chunk, size, chunk_len: chunks of the rank, blocks of a chunk, tokens of a block and of a chunk.
        documents: (Z, C) int64, each token's document; None where all tokens are of one.
        first: (Z, C), whether a token is of the same document as the token before its block.
        last: (Z, C), whether it is of the same document as its block's last token.
        passes: (Z,), whether no document begins in the block, so that its end still sees the state that entered it.
        true: (T,), False at padding; None where there is none.
    """

    chunks: int
    per_chunk: int
    size: int
    chunk_len: int
    documents: np.ndarray | None
    first: np.ndarray
    last: np.ndarray
    passes: np.ndarray
    true: np.ndarray | None


@lru_cache(maxsize=64)
def scan_blocks(segment: Segment, size: int) -> ScanBlocks:
    """The blocks of a segment, of `size` tokens or of a chunk's where that has fewer."""
    L, M = segment.chunk_len, len(segment.chunks)
    size = min(size, L)
    per_chunk = -(-L // size)
    starts = np.array(segment.chunks, np.int64)[:, None] * L
    places = starts + np.minimum(np.arange(per_chunk * size), L - 1)
    documents = _documents(segment, places).reshape(M * per_chunk, size)
    heads = (starts + np.arange(0, per_chunk * size, size)).reshape(-1)
    before = np.where(heads > 0, _documents(segment, heads - 1), -1)
    first, last = documents == before[:, None], documents == documents[:, -1:]
    true = (places[:, :L] < segment.seq_len).reshape(-1)
    # one document in each block is what the masks ask for; across blocks `first` and `passes` tell
    one = bool((documents == documents[:, :1]).all())
    return ScanBlocks(M, per_chunk, size, L, None if one else documents, first, last, first[:, -1],
                      None if true.all() else true)  # fmt: skip


def _documents(segment: Segment, places: np.ndarray) -> np.ndarray:
    """The document of the tokens at these places; padding's is one behind the last."""
    return np.searchsorted(np.array(segment.documents[1:], np.int64), places, side="right")


@lru_cache(maxsize=64)
def chunk_places(segment: Segment) -> tuple[int, ...]:
    """Where each chunk of the sequence stands among all ranks' chunks, one rank's behind another's."""
    arriving = [chunk for rank in range(segment.cp) for chunk in segment.peer(rank).chunks]
    return tuple(sorted(range(len(arriving)), key=arriving.__getitem__))


Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Halo:
    """The tokens before each of this rank's chunks that a convolution reads, and whose they are.

    Attributes:
        sends: by rank, runs [start, stop) of the local tokens that it is sent, in the order in which it asks for them.
        rows: by rank, runs of the places that the tokens from it take among `chunks * reach`, where each chunk has `reach`
            places for the tokens before it, the nearest last.
    """

    sends: tuple[Spans, ...]
    rows: tuple[Spans, ...]


@lru_cache(maxsize=64)
def plan_halo(segment: Segment, reach: int) -> Halo:
    """The halo of `reach` tokens before each chunk: from the chunk before it, and from those before that where it is short.

    It depends on the cut alone and not on documents, so that every rank's tensors have one size at every batch.
    """
    L = segment.chunk_len
    owner = {chunk: (rank, at) for rank in range(segment.cp) for at, chunk in enumerate(segment.peer(rank).chunks)}

    def wanted(rank: int, source: int) -> list[tuple[int, int]]:
        """(local place at its source, row of the halo) of each token that `rank` asks of `source`."""
        rows = [
            (chunk * L - reach + i, number * reach + i)
            for number, chunk in enumerate(segment.peer(rank).chunks)
            for i in range(reach)
        ]
        return [(owner[p // L][1] * L + p % L, row) for p, row in rows if p >= 0 and owner[p // L][0] == source]

    ranks = range(segment.cp)
    sends = tuple(_spans([place for place, _ in wanted(rank, segment.rank)]) for rank in ranks)
    return Halo(sends, tuple(_spans([row for _, row in wanted(segment.rank, rank)]) for rank in ranks))


def _spans(places: list[int]) -> Spans:
    """Runs of consecutive places, in their order."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return tuple(runs)
