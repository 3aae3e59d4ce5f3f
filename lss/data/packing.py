"""Documents laid end to end in sequences of one length, with little padding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lss.config.errors import refuse
from lss.data.permutation import hashes

# Pieces are placed longest first among so many sequences' worth of them. Fewer waste more (1 % at worst for real files
# and log-normal lengths); more bring the same documents together under every seed.
_WINDOW = 16


@dataclass(frozen=True)
class Packed:
    """Which tokens of which documents stand in each sequence; `len` is the number of sequences.

    Attributes:
        seq_len: S, tokens in a sequence, padding included.
        first: int64 (n + 1,), the pieces of sequence i are [first[i], first[i + 1]).
        document, start, stop: int64 (P,), each piece is tokens [start, stop) of that document, with stop > start.
    """

    seq_len: int
    first: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def pieces(self, i: int) -> tuple[tuple[int, int, int], ...]:
        """(document, start, stop) of each piece of sequence i, in the order in which they stand."""
        part = slice(self.first[i], self.first[i + 1])
        return tuple(zip(self.document[part].tolist(), self.start[part].tolist(), self.stop[part].tolist(), strict=True))

    def cu_seqlens(self, i: int) -> torch.Tensor:
        """Edges of the pieces of sequence i: int32, 0 first and S last; padding at the end is a document of its own."""
        part = slice(self.first[i], self.first[i + 1])
        ends = np.cumsum(self.stop[part] - self.start[part])
        padding = [] if ends[-1] == self.seq_len else [self.seq_len]
        return torch.from_numpy(np.concatenate(([0], ends, padding)).astype(np.int32))

    @cached_property
    def waste(self) -> float:
        """Fraction of all tokens that is padding."""
        return 1.0 - int((self.stop - self.start).sum()) / (len(self) * self.seq_len)


def pack(lengths: np.ndarray, seq_len: int, seed: int) -> Packed:
    """Lay documents into sequences of exactly `seq_len` tokens; every token stands in exactly one place.

    A document longer than S is cut into pieces of S and a remainder. Pieces are shuffled by the seed, and each goes where
    it leaves the least room (best fit), those within a stretch of the shuffle longest first. The result is a function of
    the arguments alone, in whole numbers, and so the same on every rank, machine and version.

    Args:
        lengths: (documents,) whole numbers, each document's tokens; empty documents are left out.

    Raises:
        Refused: a length below 1 for the sequences, below 0 for a document, or no tokens at all.
    """
    lengths = np.asarray(lengths, np.int64)
    if seq_len < 1:
        raise refuse("seq_len", seq_len, "a sequence has at least 1 token; give a whole number >= 1")
    if lengths.ndim != 1 or lengths.min(initial=0) < 0:
        raise refuse("lengths", f"{lengths.min(initial=0)} in shape {lengths.shape}", "give counts >= 0 in one dimension")
    if not lengths.any():
        raise refuse("lengths", f"{len(lengths)} documents", "they hold no tokens; give at least one that is not empty")
    parts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), parts)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)) * seq_len
    stop = np.minimum(start + seq_len, lengths[document])
    shuffle = np.argsort(hashes(seed, np.arange(len(document))), kind="stable")
    size = (stop - start)[shuffle]
    longest_first = np.lexsort((-size, (np.cumsum(size) - size) // (_WINDOW * seq_len)))
    place = np.empty(len(size), np.int64)
    place[longest_first] = _best_fit(size[longest_first].tolist(), seq_len)
    # sequences, and pieces within one, in the order of the shuffle: long documents shall not always come first
    _, earliest = np.unique(place, return_index=True)
    rank = np.argsort(np.argsort(earliest))[place]
    order = shuffle[np.argsort(rank, kind="stable")]
    first = np.concatenate(([0], np.cumsum(np.bincount(rank))))
    return Packed(seq_len, first, document[order], start[order], stop[order])


def join(packs: Sequence[Packed], documents: Sequence[int]) -> Packed:
    """Packs of several corpora one after another; `documents`: of each, by which its numbers are shifted."""
    if len(packs) == 1:
        return packs[0]
    before = np.concatenate(([0], np.cumsum(documents)[:-1]))
    pieces = np.concatenate(([0], np.cumsum([len(pack.document) for pack in packs])[:-1]))
    first = [pack.first[:-1] + start for pack, start in zip(packs, pieces, strict=True)]
    last = [np.array([sum(len(pack.document) for pack in packs)])]
    numbers = [pack.document + start for pack, start in zip(packs, before, strict=True)]
    return Packed(
        packs[0].seq_len, np.concatenate(first + last), np.concatenate(numbers),
        np.concatenate([pack.start for pack in packs]), np.concatenate([pack.stop for pack in packs]),
    )  # fmt: skip


def _best_fit(sizes: list[int], seq_len: int) -> list[int]:
    """For each piece in turn, the sequence with the least room that holds it, or a new one."""
    rooms: list[int] = []  # the different rooms left, rising: at most S of them, however many sequences there are
    open_by_room: dict[int, list[int]] = {}
    places, count = [], 0
    for size in sizes:
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            sequence = open_by_room[room].pop()
            if not open_by_room[room]:
                del rooms[at], open_by_room[room]
        else:
            room, sequence, count = seq_len, count, count + 1
        places.append(sequence)
        room -= size
        if room and room not in open_by_room:
            rooms.insert(bisect_left(rooms, room), room)
            open_by_room[room] = []
        if room:
            open_by_room[room].append(sequence)
    return places
