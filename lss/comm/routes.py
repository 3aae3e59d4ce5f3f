"""Where the copies of a transfer into peers' memory go, and their way there: all at once, or in stages.

`lss.comm.symmetric` makes routes once and sends many transfers along each; it says what the barriers are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lss.comm.peers import PeerMemory


@dataclass(frozen=True)
class Copy:
    """One copy between this rank's tensors and a rank's buffer: which plane (k or v), row and tokens of them."""

    place: torch.Tensor
    plane: int
    row: int
    start: int
    stop: int

    def source(self, planes: Sequence[torch.Tensor]) -> torch.Tensor:
        return planes[self.plane][self.row, self.start : self.stop]


@dataclass(frozen=True)
class Leg:
    """Copies that are issued together: those that stay on this rank, and those to the others."""

    here: tuple[Copy, ...]
    abroad: tuple[Copy, ...]


class Together:
    """All copies of some legs as one list, those abroad first; what goes to several places is cut out once."""

    def __init__(self, legs: Sequence[Leg]) -> None:
        copies = [copy for leg in legs for copy in leg.abroad]
        self.abroad = len(copies)
        copies += [copy for leg in legs for copy in leg.here]
        self.places = [copy.place for copy in copies]
        pieces = [(copy.plane, copy.row, copy.start, copy.stop) for copy in copies]
        numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
        self._pieces, self._numbers = list(numbers), [numbers[piece] for piece in pieces]

    def sources(self, planes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What goes to each of `places`; planes are (B, tokens, K, H)."""
        rows: dict[tuple[int, int], torch.Tensor] = {}
        cut = []
        for plane, row, start, stop in self._pieces:
            if (plane, row) not in rows:
                rows[plane, row] = planes[plane].select(0, row)
            cut.append(rows[plane, row].narrow(0, start, stop - start))
        return [cut[number] for number in self._numbers]


@dataclass(frozen=True)
class Route:
    """Where one kind of transfer goes: this rank's own buffer, and the copies of each leg of the way.

    Attributes:
        counted: as large as what this transfer is counted as.
        stages: how many tokens of this rank's buffer have come after each leg, where others wait for that leg by itself.
        sums: of gradients: tokens [a, b) of this rank's are the sum of these slots.
    """

    mine: torch.Tensor
    legs: tuple[Leg, ...]
    counted: torch.Tensor
    stages: tuple[int, ...] = ()
    sums: tuple[tuple[int, int, torch.Tensor], ...] = ()

    @cached_property
    def together(self) -> Together:
        return Together(self.legs)


class Way:
    """One transfer on its way in stages, leg by leg.

    The same barriers in the same order on every rank, however many legs it has.
    """

    def __init__(
        self, peers: PeerMemory, name: str, route: Route, planes: Sequence[torch.Tensor], *, clear: bool = False
    ) -> None:
        self.name, self.route = name, route
        self._peers, self._planes, self._gone = peers, planes, set()
        peers.wait_for(peers.read.get(name))
        if clear:
            route.mine.zero_()
        peers.follow()
        peers.reach("free")
        peers.barrier("free")

    def go(self, leg: int, *, beside: bool = False) -> None:
        """Issue a leg's copies, once.

        `beside`: behind the kernel that was issued last, and beside the next: what stays here is copied on the side too.
        """
        if leg in self._gone:
            return
        peers, copies = self._peers, self.route.legs[leg]
        if beside:
            peers.follow()
        peers.reach("copy")
        peers.copy(*_pairs(copies.abroad + (copies.here if beside else ()), self._planes), aside=True)
        if not beside:
            peers.copy(*_pairs(copies.here, self._planes), aside=False)
        self._gone.add(leg)

    def arrived(self, leg: int) -> Any:
        """All ranks have written what they issued before; returns the mark of it."""
        self._peers.reach("arrived")
        self._peers.barrier(f"arrived{leg}")
        return self._peers.mark(aside=True)


def exchange_all(
    peers: PeerMemory, name: str, route: Route, planes: Sequence[torch.Tensor], *, clear: bool = False
) -> Any:
    """A transfer whose legs all go at once; returns the mark of its arrival."""
    copies = route.together
    return peers.exchange(name, copies.places, copies.sources(planes), copies.abroad, route.mine if clear else None)


def _pairs(copies: Sequence[Copy], planes: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [copy.place for copy in copies], [copy.source(planes) for copy in copies]
