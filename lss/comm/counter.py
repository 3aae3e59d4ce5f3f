"""Counting collectives: how many calls, how many elements and bytes, of which kind and for what.

Bytes are the payload: the size of the gathered output, of the scatter's input, of the buffer that is reduced or sent.
What crosses a wire is that times (n-1)/n for a gather or a scatter over n ranks.

Where the ranks of a sequence lie on several nodes, a call also has a `link`: "inside" where all ranks of its group are on
one node, "across" where no two are; None where both occur, and on one node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

# Backward runs on autograd's own threads, so neither a context variable nor a thread-local would see it: like torch's
# own counting modes, what listens stands in one list of the process.
_LISTENING: list[Listener] = []


class Listener(Protocol):
    """What is told of every collective that this process issues, from whichever thread issues it."""

    def add(self, kind: str, purpose: str, payload: torch.Tensor, link: str | None = None) -> None:
        """One call is about to be issued."""

    def issued(self, pending: Any) -> None:
        """It is under way: the `Pending` of the call that this thread told of last, or what has a `waiting` as it has."""


@dataclass
class Tally:
    """Calls, elements and bytes of one kind of collective."""

    calls: int = 0
    elements: int = 0
    bytes: int = 0


@dataclass
class CollectiveCounter:
    """Tallies by (kind, purpose, link): kind as in "all_gather", purpose as in "kv", "dkv", "gradients", "loss"."""

    tallies: dict[tuple[str, str, str | None], Tally] = field(default_factory=dict)

    def calls(self, kind: str | None = None, purpose: str | None = None, link: str | None = None) -> int:
        """Number of calls, of one kind, purpose and link or of all."""
        return self._sum("calls", kind, purpose, link)

    def elements(self, kind: str | None = None, purpose: str | None = None, link: str | None = None) -> int:
        """Payload in elements, of one kind, purpose and link or of all."""
        return self._sum("elements", kind, purpose, link)

    def bytes(self, kind: str | None = None, purpose: str | None = None, link: str | None = None) -> int:
        """Payload in bytes, of one kind, purpose and link or of all."""
        return self._sum("bytes", kind, purpose, link)

    def _sum(self, what: str, kind: str | None, purpose: str | None, link: str | None) -> int:
        wanted = (kind, purpose, link)
        return sum(
            getattr(tally, what)
            for key, tally in self.tallies.items()
            if all(w in (None, part) for w, part in zip(wanted, key, strict=True))
        )

    def add(self, kind: str, purpose: str, payload: torch.Tensor, link: str | None = None) -> None:
        """Count one call with this payload."""
        tally = self.tallies.setdefault((kind, purpose, link), Tally())
        tally.calls += 1
        tally.elements += payload.numel()
        tally.bytes += payload.numel() * payload.element_size()

    def issued(self, pending: Any) -> None:
        """A counter does not ask how calls end."""

    def rows(self) -> list[tuple[str, str, int, int]]:
        """(kind, purpose, calls, bytes), sorted, for a table; over all links."""
        pairs = sorted({(kind, purpose) for kind, purpose, _ in self.tallies})
        return [(*pair, self.calls(*pair), self.bytes(*pair)) for pair in pairs]


@contextmanager
def count_collectives() -> Iterator[CollectiveCounter]:
    """Count every collective that this process issues inside the block, backward passes included.

    A group of one rank issues nothing and counts nothing.
    """
    counter = CollectiveCounter()
    with listening(counter):
        yield counter


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of every collective that this process issues inside the block."""
    _LISTENING.append(listener)
    try:
        yield
    finally:
        # by identity: two counters that have counted the same are equal
        _LISTENING[:] = [other for other in _LISTENING if other is not listener]


def issued(pending: Any) -> None:
    """Tell every listener that the call recorded last by this thread is under way."""
    for listener in _LISTENING:
        listener.issued(pending)


@contextmanager
def waiting_inside() -> Iterator[None]:
    """Tell every listener that this thread is inside of the call that it told of last, as long as the block lasts.

    For calls that return only when they are done, and so have no `Pending`.
    """
    call = Inside()
    issued(call)
    yield
    call.waiting = False  # not where it fails: it is still the one that was waited in


class Inside:
    """A call that somebody is inside of, until `waiting` is false. It holds nothing of the call."""

    waiting = True


def record(kind: str, purpose: str, payload: torch.Tensor, link: str | None = None) -> None:
    """Tell every listener of one call."""
    for listener in _LISTENING:
        listener.add(kind, purpose, payload, link)
