"""Boxes of tensors: which part of a whole tensor a rank holds, and how such parts are cut further and meet."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

Place = tuple[int, ...]


class Piece(NamedTuple):
    """A box of a whole tensor, and where it lies in the part of it that a rank holds.

    Attributes:
        at: the box's first element in the whole tensor, by dimension.
        size: its lengths.
        local: its first element in the rank's part.
    """

    at: Place
    size: Place
    local: Place

    @property
    def elements(self) -> int:
        """How many elements the box has."""
        return prod(self.size)

    def slices(self) -> tuple[slice, ...]:
        """The box in the rank's part."""
        return tuple(slice(a, a + n) for a, n in zip(self.local, self.size, strict=True))

    def rows(self, start: int, stop: int) -> Piece:
        """The same box, rows [start, stop) of its first dimension only."""
        at, size, local = self
        return Piece((at[0] + start, *at[1:]), (stop - start, *size[1:]), (local[0] + start, *local[1:]))


def whole_piece(shape: tuple[int, ...]) -> Piece:
    """The piece of a rank that holds everything."""
    origin = (0,) * len(shape)
    return Piece(origin, tuple(shape), origin)


def overlap(at: Place, size: Place, piece: Piece) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where the box (at, size) and a piece meet: slices in the box, and in the piece's part; None where they do not."""
    inside, local = [], []
    for a, n, b, m, place in zip(at, size, piece.at, piece.size, piece.local, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        if start >= stop:
            return None
        inside.append(slice(start - a, stop - a))
        local.append(slice(place + start - b, place + stop - b))
    return tuple(inside), tuple(local)
