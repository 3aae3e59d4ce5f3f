"""Several corpora as one, whose samples are drawn by weights.

Of every w1 + w2 + ... samples in a row, w1 come from the first corpus, w2 from the second and so on, in an order drawn by
(seed, row). Each corpus has epochs of its own, every one a permutation of its samples. All is a function of the sample's
number, and so the same for any number of ranks and after a resume.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from lss.data.permutation import permute
from lss.data.sources import Corpus, Split


class MixedCorpus:
    """Corpora of one kind side by side; with the methods of `Corpus` that runs need."""

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[int]) -> None:
        self.corpora, self.weights = list(corpora), tuple(weights)
        self.unit, self.item, self.dtype = corpora[0].unit, corpora[0].item, corpora[0].dtype
        self.name = ", ".join(f"{corpus.name} x {weight}" for corpus, weight in zip(corpora, weights, strict=True))
        self.files: list[Path] = [file for corpus in corpora for file in corpus.files]
        told = "\n".join(f"{corpus.digest} {weight}" for corpus, weight in zip(corpora, weights, strict=True))
        self.digest = hashlib.sha256(told.encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.corpora))

    def scan(self, part: int = 0, parts: int = 1) -> None:
        """Read every id of every corpus that has ids; see `TokenCorpus.scan`."""
        for corpus in self.corpora:
            corpus.scan(part, parts)

    def split(self, held_out: float) -> tuple[MixedSplit, MixedSplit]:
        """(training part, held-out part): the end of each corpus is held out."""
        pairs = [corpus.split(held_out) for corpus in self.corpora]
        return MixedSplit(self, [pair[0] for pair in pairs]), MixedSplit(self, [pair[1] for pair in pairs])


class MixedSplit(Split):
    """The same part of several corpora, one after another; samples do not reach from one into the next."""

    def __init__(self, corpus: MixedCorpus, parts: Sequence[Split]) -> None:
        self.corpus, self.parts, self.name, self.weights = corpus, list(parts), parts[0].name, corpus.weights
        self._starts = [0, *accumulate(map(len, parts))]
        self._row: tuple[int, int, list[int]] = (-1, 0, [])

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Items [start, stop)."""
        found = [part.read(a, b) for part, a, b in self._within(start, stop)]
        return np.concatenate(found) if found else np.empty(0, self.corpus.dtype)

    def read_trained(self, start: int, stop: int) -> np.ndarray | None:
        """Which of them are trained on; None where all are."""
        marks = [(part.read_trained(a, b), b - a) for part, a, b in self._within(start, stop)]
        if all(mark is None for mark, _ in marks):
            return None
        return np.concatenate([np.ones(size, bool) if mark is None else mark for mark, size in marks])

    def _within(self, start: int, stop: int) -> Iterator[tuple[Split, int, int]]:
        for part, first in zip(self.parts, self._starts, strict=False):
            a, b = max(start - first, 0), min(stop - first, len(part))
            if a < b:
                yield part, a, b

    def documents(self) -> np.ndarray:
        """Where each document of all corpora lies: int64 (n, 2)."""
        return np.concatenate([part.documents() + start for part, start in zip(self.parts, self._starts, strict=False)])

    def split_parts(self) -> list[tuple[Split, int]]:
        """Each corpus's part, and where it begins."""
        return list(zip(self.parts, self._starts, strict=False))

    def draw(self, number: int, samples: Sequence[int], seed: int) -> int:
        """The sample of number `number`; `samples`: of each corpus, which come one after another."""
        row, place = divmod(number, sum(self.weights))
        order = self._order(row, seed)
        which = order[place]
        count = row * self.weights[which] + order[:place].count(which)
        epoch, place = divmod(count, samples[which])
        return sum(samples[:which]) + permute(place, samples[which], seed + which, epoch)

    def _order(self, row: int, seed: int) -> list[int]:
        """Which corpus each sample of a row is of; the last row asked for is kept."""
        if self._row[:2] != (row, seed):
            edges, total = list(accumulate(self.weights)), sum(self.weights)
            self._row = (row, seed, [bisect_right(edges, permute(place, total, seed, row)) for place in range(total)])
        return self._row[2]
