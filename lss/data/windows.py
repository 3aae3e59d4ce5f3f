"""Every token of a part of a corpus, once: the windows that an evaluation reads, and this rank's share of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from lss.config.errors import refuse
from lss.data.reader import IGNORE_INDEX, Batch
from lss.data.sources import Split
from lss.segment import Segment


class WindowReader:
    """Batches in which every item of a part but the first is a label exactly once.

    Window k of a run of items holds the tokens [k stride, k stride + window) of it, the last one fewer. The first window
    counts all its labels, every other one those of its last `stride` tokens: each of these has seen `window - stride`
    tokens or more before its own. With stride = window these are sequences laid end to end. A run is the whole part (of
    several corpora that of each), or with `documents` each document, whose first item then is no label either.

    Args:
        segment_of: borders of documents, or None for one -> this rank's segment of `window` tokens.
        documents: documents see only themselves. Windows shorter than a row are laid behind one another in it, in order,
            and a batch is one row.

    Attributes:
        runs: int64 (n, 2), [start, stop) in items of the part.
        labels: how many items are counted as labels on all ranks, but for those that the corpus says are not trained on.

    Raises:
        Refused: no run has two items.
    """

    def __init__(
        self,
        split: Split,
        *,
        window: int,
        stride: int,
        rows_per_batch: int,
        dp: int,
        dp_rank: int,
        segment_of: Callable[[torch.Tensor | None], Segment],
        documents: bool = False,
    ) -> None:
        assert 1 <= stride <= window, (stride, window)
        assert rows_per_batch == 1 or not documents, rows_per_batch
        self.split, self.window, self.stride, self.packed = split, window, stride, documents
        self.runs = runs_of_items(split, documents)
        self.labels = int((self.runs[:, 1] - self.runs[:, 0] - 1).sum())
        self._start, self._stop, self._scored = _windows(self.runs, window, stride)
        self._rows = _next_fit(self._stop - self._start, window) if documents else np.arange(len(self._start) + 1)
        self._per_batch, self._dp, self._dp_rank, self._segment_of = rows_per_batch, dp, dp_rank, segment_of

    def __len__(self) -> int:
        return -(-(len(self._rows) - 1) // (self._per_batch * self._dp))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            yield self.batch(number)

    def batch(self, number: int) -> Batch:
        """This rank's rows and tokens of batch `number`; rows after the last are padding."""
        first = (number * self._dp + self._dp_rank) * self._per_batch
        numbers = [row if row < len(self._rows) - 1 else None for row in range(first, first + self._per_batch)]
        cu_seqlens = self._borders(numbers[0]) if self.packed else None
        segment = self._segment_of(cu_seqlens)
        rows = [self._row(row, segment) for row in numbers]
        return Batch(
            tokens=torch.from_numpy(np.stack([tokens for tokens, _ in rows])),
            labels=torch.from_numpy(np.stack([labels for _, labels in rows])),
            positions=segment.positions if cu_seqlens is None else segment.document_positions,
            slots=torch.arange(first, first + self._per_batch),
            sample_ids=torch.tensor([-1 if row is None else row for row in numbers]),
            cu_seqlens=cu_seqlens,
            segment=segment,
        )

    def places(self, row: int) -> Iterator[tuple[int, int, int]]:
        """(first, end, item): the labels of tokens [first, end) of a row are the items from `item` on, counted here."""
        for at, which in self._pieces(row):
            first = at + int(self._scored[which] - self._start[which])
            yield first, at + int(self._stop[which] - self._start[which]), int(self._scored[which]) + 1

    def rows_of(self, number: int) -> range:
        """The rows of a batch on all dp ranks, in their order; those after the last are padding."""
        size = self._per_batch * self._dp
        return range(number * size, min((number + 1) * size, len(self._rows) - 1))

    def _pieces(self, row: int) -> Iterator[tuple[int, int]]:
        """(where it begins in the row, its number) of each window of a row."""
        at = 0
        for which in range(int(self._rows[row]), int(self._rows[row + 1])):
            yield at, which
            at += int(self._stop[which] - self._start[which])

    def _borders(self, row: int | None) -> torch.Tensor:
        """Borders of a row's windows as documents; padding at its end is one of its own."""
        ends = [] if row is None else [at for at, _ in self._pieces(row)][1:]
        if row is not None:
            last = slice(int(self._rows[row]), int(self._rows[row + 1]))
            ends.append(int((self._stop[last] - self._start[last]).sum()))
        edges = [0, *ends] if ends and ends[-1] == self.window else [0, *ends, self.window]
        return torch.tensor(edges, dtype=torch.int32)

    def _row(self, row: int | None, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) of this rank, (T,) int64 each; 0 and -100 at padding."""
        tokens = np.zeros(segment.local_len, np.int64)
        labels = np.full(segment.local_len, IGNORE_INDEX, np.int64)
        for at, which in () if row is None else self._pieces(row):
            start, end = int(self._start[which]), int(self._stop[which])
            for local, _, a, b in segment.local_runs:
                left, right = max(a, at), min(b, at + end - start)
                if left >= right:
                    continue
                first, place = start + left - at, slice(local + left - a, local + right - a)
                items = self.split.read(first, first + right - left + 1).astype(np.int64)
                counted = np.arange(first, first + right - left) >= self._scored[which]
                trained = self.split.read_trained(first + 1, first + right - left + 1)
                counted = counted if trained is None else counted & trained
                tokens[place], labels[place] = items[:-1], np.where(counted, items[1:], IGNORE_INDEX)
        return tokens, labels


def runs_of_items(split: Split, documents: bool) -> np.ndarray:
    """The runs of a part that are read by themselves, two items or more each: int64 (n, 2).

    Raises:
        Refused: there are none.
    """
    if documents:
        runs = split.documents()
    else:
        runs = np.array([(start, start + len(part)) for part, start in split.split_parts()], np.int64).reshape(-1, 2)
    runs = runs[runs[:, 1] - runs[:, 0] > 1]
    if not len(runs):
        facts = f"the {split.name} part has {len(split):,} {split.corpus.unit}"
        raise refuse("data.path", split.corpus.name, f"{facts}, and a label takes two in a row; give more text")
    return runs


def _windows(runs: np.ndarray, window: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, stop, first token whose label counts) of all windows, in order: int64 each."""
    tokens = runs[:, 1] - runs[:, 0] - 1  # the last item is a label only
    counts = 1 + -(-(tokens - window).clip(0) // stride)
    which = np.repeat(np.arange(len(runs)), counts)
    k = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = runs[which, 0] + k * stride
    stop = np.minimum(start + window, runs[which, 1] - 1)
    return start, stop, np.where(k == 0, start, start + window - stride)


def _next_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """Which window each row begins with, and the number of windows last: as many in order as fit, then a new row."""
    first, used = [0], 0
    for number, length in enumerate(lengths.tolist()):
        if used + length > room:
            first.append(number)
            used = 0
        used += length
    return np.array([*first, len(lengths)], np.int64)
