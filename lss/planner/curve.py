"""Memory over the moments of a step: what is live, by class, after each allocation and each end of one.

The whole step is put together from the ledgers of models of two and of three blocks. Laid beside one another, what the
longer has and the shorter has not is what a block adds: in forward, in backward and in the update, where its tensors are
made and where they end. That is repeated for the blocks that the config has beyond two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

import torch

from lss.planner.ledger import CLASSES, Ledger, Peak

ON_DEVICE = tuple(name for name in CLASSES if name != "host")
# operation, bytes by class; of what ends together, in whatever order: no operation, and bytes below 0
_Change = tuple[str, tuple[tuple[str, int], ...]]
_Parts = list[tuple[str, list[_Change]]]


@dataclass(frozen=True, eq=False)
class Curve:
    """Bytes that are live on the device over one step.

    Attributes:
        live: (moments, classes) int64, bytes; a class of `ON_DEVICE` each column. The first moment is before the step.
        parts: (name, its first moment), in turn: "forward", "loss" from the first logits on, "backward" and "update"; with
            `train.accumulate` all but the last again for each micro-batch.
    """

    live: torch.Tensor
    parts: list[tuple[str, int]]

    @property
    def total(self) -> torch.Tensor:
        """(moments,) int64, bytes of all classes."""
        return self.live.sum(1)

    @property
    def peak(self) -> int:
        """Most bytes at any moment."""
        return int(self.total.max())

    def of(self, name: str) -> torch.Tensor:
        """(moments,) int64, bytes of one class."""
        return self.live[:, ON_DEVICE.index(name)]

    def highest(self) -> Peak:
        """The first moment of most bytes, without an operation's name and the host's part."""
        at = int(self.total.argmax())
        name = [name for name, first in self.parts if first <= at][-1]
        found = dict(zip(ON_DEVICE, self.live[at].tolist(), strict=True))
        classes = {label: n for label, n in sorted(found.items(), key=lambda one: -one[1]) if n}
        return Peak(self.peak, "forward" if name == "loss" else name, "", classes, 0)


def curve_of(ledgers: Sequence[Ledger], rounds: float = 0.0) -> Curve:
    """The curve of a step that was traced whole; or of one drawn out from those of two and of three rounds of blocks.

    At a moment that both have, a class has v_2 + rounds (v_3 - v_2) bytes, where v_2 and v_3 are theirs. A deeper model may
    peak at another moment than one of two or three blocks (short sequences, as gradients add up); this is where the plan's
    peak is read. What was there before the step may end in one trace and not in the other, by what caches keep: it then
    stays to the end, of a few KiB to a MiB.

    Args:
        ledgers: one, or two of models that differ by a round of blocks.
        rounds: how many there are beyond those of the first.
    """
    # what was there before the step may outlive it in a cache: if so in one of the two, then in both
    keep = _older(ledgers[0]) != _older(ledgers[-1])
    few, more = _parts(ledgers[0], keep), _parts(ledgers[-1], keep)
    assert [phase for phase, _ in few] == [phase for phase, _ in more]
    moments, parts, count = [torch.zeros(1, len(ON_DEVICE), dtype=torch.float64)], [], 1
    for (phase, some), (_, others) in zip(few, more, strict=True):
        drawn = _drawn_out(some, others, rounds) if len(ledgers) > 1 else _deltas(some)
        if phase == "before":
            moments[0] += drawn.sum(0)
            continue
        parts.append((phase, count if parts else 0))
        moments.append(drawn)
        count += len(drawn)
    live = torch.cat(moments).cumsum(0).round().to(torch.int64)
    if ledgers[0].most_logits:
        live[:, ON_DEVICE.index("logits")].clamp_(max=ledgers[0].most_logits)
    return Curve(live, _with_loss(parts, live[:, ON_DEVICE.index("logits")]))


def _with_loss(parts: list[tuple[str, int]], logits: torch.Tensor) -> list[tuple[str, int]]:
    """With the part of each forward that begins with its first logits, as "loss"."""
    found = []
    for (name, first), end in zip(parts, [first for _, first in parts[1:]] + [len(logits)], strict=True):
        found.append((name, first))
        there = logits[first:end].nonzero()
        if name == "forward" and len(there):
            found.append(("loss", first + int(there[0])))
    return found


def _parts(ledger: Ledger, keep: bool) -> _Parts:
    """The changes of each phase on the device, in turn; with `keep` what was there before the step does not end."""
    parts: _Parts = []
    for phase, group in groupby(ledger.changes(), lambda change: change[0]):
        changes: list[_Change] = []
        noted = [(made, label, size) for _, made, label, size in group if label != "host" and size]
        for ends, run in groupby(noted, lambda change: change[2] < 0):
            if not ends:
                changes += [(operation, ((label, size),)) for operation, label, size in run]
                continue
            ended: Counter[str] = Counter()
            for made, label, size in run:
                if not (keep and made == "before"):
                    ended[label] += size
            if ended:
                changes.append(("", tuple(sorted(ended.items()))))
        parts.append((phase, changes))
    return parts


def _older(ledger: Ledger) -> list[tuple[str, int]]:
    """What was there before the step, and ends in it."""
    return sorted((label, size) for _, made, label, size in ledger.changes() if size < 0 and made == "before")


def _deltas(changes: Sequence[_Change]) -> torch.Tensor:
    """(changes, classes) float64."""
    found = torch.zeros(len(changes), len(ON_DEVICE), dtype=torch.float64)
    for row, (_, sizes) in enumerate(changes):
        for label, size in sizes:
            found[row, ON_DEVICE.index(label)] = size
    return found


def _drawn_out(few: Sequence[_Change], more: Sequence[_Change], rounds: float) -> torch.Tensor:
    """(changes, classes) of a phase, with what `more` has beyond `few` as many times."""
    first = 0
    while first < min(len(few), len(more)) and few[first] == more[first]:
        first += 1
    last = 0
    while last < min(len(few), len(more)) - first and few[-1 - last] == more[-1 - last]:
        last += 1
    some, others = few[first : len(few) - last], more[first : len(more) - last]
    found = [_deltas(more[:first])]
    for kind, i, j, k, m in SequenceMatcher(None, some, others, autojunk=False).get_opcodes():
        found += [_deltas(others[k:m])] if kind == "equal" else _repeated(some[i:j], others[k:m], rounds)
    return torch.cat([*found, _deltas(more[len(more) - last :])])


def _repeated(gone: Sequence[_Change], there: Sequence[_Change], rounds: float) -> list[torch.Tensor]:
    """What is there in place of what is gone, once for each round; what is gone is taken away at one moment.

    Together these are gone + rounds (there - gone). A part of a round has its part of each change. At both ends, what is the
    same but for its bytes, as a buffer of all gradients is, has those on the line.
    """
    first = 0
    while first < min(len(gone), len(there)) and _grows(gone[first], there[first]):
        first += 1
    last = 0
    while last < min(len(gone), len(there)) - first and _grows(gone[-1 - last], there[-1 - last]):
        last += 1
    if first or last:
        a, b = len(gone) - last, len(there) - last
        head, tail = _line(gone[:first], there[:first], rounds), _line(gone[a:], there[b:], rounds)
        return [head, *_repeated(gone[first:a], there[first:b], rounds), tail]
    if not gone and not there:
        return []
    once, away = _deltas(there), _deltas(gone).sum(0, keepdim=True)
    found, left = [], rounds
    while left > 0:
        part = min(1.0, left)
        if gone:
            found.append(-part * away if found else (1 - part) * away)
        found.append(part * once)
        left -= part
    return found


def _grows(a: _Change, b: _Change) -> bool:
    """Whether one is the other, of as many bytes or more."""
    return a[0] == b[0] and [label for label, _ in a[1]] == [label for label, _ in b[1]] and all(
        abs(x) <= abs(y) for (_, x), (_, y) in zip(a[1], b[1], strict=True)
    )


def _line(few: Sequence[_Change], more: Sequence[_Change], rounds: float) -> torch.Tensor:
    low = _deltas(few)
    return low + rounds * (_deltas(more) - low)
