"""From a corpus to batches: each rank reads the bytes of its own segment and nothing else.

The order of samples is a function of (seed, epoch, place in the epoch), free of the number of ranks, so that any
layout sees the same sequences in the same steps, before and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lss.config.errors import refuse
from lss.data.permutation import permute
from lss.data.sources import Split
from lss.segment import Segment

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch as one rank holds it.

    Attributes:
        tokens: (B, T) int64; 0 at padding.
        labels: (B, T) int64, each the byte after its token in the whole sequence; -100 where not counted.
        positions: (T,) int64, global.
        slots: (B,) int64, each row's place in the step's global batch; keys dropout.
        sample_ids: (B,) int64, each row's number in the loader's order of samples: (step - 1) * batch_size + slot in
            training, where it counts on through the epochs; the slot in evaluation, and -1 for a row of padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sample_ids: torch.Tensor


class _Reader:
    """Reads samples of one split as one rank's segment has them; counts the bytes it reads."""

    def __init__(self, split: Split, seq_len: int, segment: Segment) -> None:
        if segment.seq_len != seq_len:
            raise refuse("seq_len", seq_len, f"the segment is of sequences of {segment.seq_len}")
        self.split, self.seq_len, self.segment = split, seq_len, segment
        self.samples = split.samples(seq_len)
        self.bytes_read = 0

    def row(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) of this rank, (T,) int64 each. A run of tokens costs one byte more, its last label."""
        tokens = np.zeros(self.segment.local_len, np.int64)
        labels = np.full(self.segment.local_len, IGNORE_INDEX, np.int64)
        for local, local_stop, start, stop in self.segment.local_runs:
            offset = sample * self.seq_len
            run = self.split.read(offset + start, offset + stop + 1)
            self.bytes_read += len(run)
            tokens[local:local_stop], labels[local:local_stop] = run[:-1], run[1:]
        return tokens, labels

    def rows(self, samples: Sequence[int | None], slots: Sequence[int], first_id: int = 0) -> Batch:
        """A batch of these samples, numbered first_id + slot; None is a row of padding, of which no label counts."""
        empty = (np.zeros(self.segment.local_len, np.int64), np.full(self.segment.local_len, IGNORE_INDEX, np.int64))
        rows = [empty if sample is None else self.row(sample) for sample in samples]
        numbers = [-1 if sample is None else first_id + slot for sample, slot in zip(samples, slots, strict=True)]
        return Batch(
            tokens=torch.from_numpy(np.stack([tokens for tokens, _ in rows])),
            labels=torch.from_numpy(np.stack([labels for _, labels in rows])),
            positions=self.segment.positions,
            slots=torch.tensor(list(slots), dtype=torch.int64),
            sample_ids=torch.tensor(numbers, dtype=torch.int64),
        )


class Loader(_Reader):
    """Training batches: every epoch a permutation of the split's samples.

    The step's `batch_size` slots are filled in the order of the epoch; micro-batch m of dp rank d takes the slots
    [m * B + d * b, ... + b), with B = batch_size / accumulate and b = B / dp.

    Raises:
        Refused: the split is too short, or batch_size does not divide.
    """

    def __init__(
        self,
        split: Split,
        *,
        seq_len: int,
        batch_size: int,
        accumulate: int,
        dp: int,
        dp_rank: int,
        segment: Segment,
        seed: int,
    ) -> None:
        super().__init__(split, seq_len, segment)
        if batch_size % (dp * accumulate):
            raise refuse("train.batch_size", batch_size, f"must be a multiple of dp={dp} x accumulate={accumulate}")
        assert 0 <= dp_rank < dp, (dp_rank, dp)
        self.batch_size, self.accumulate, self.seed, self.dp_rank = batch_size, accumulate, seed, dp_rank
        self._micro_rows = batch_size // accumulate
        self._rows = self._micro_rows // dp

    def sample(self, number: int) -> int:
        """Which sample of the split is number `number` (a `sample_ids` value) in the order of all epochs."""
        epoch, place = divmod(number, self.samples)
        return permute(place, self.samples, self.seed, epoch)

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch `micro` (from 0) of step `step` (from 1): this rank's rows and tokens."""
        assert step >= 1, step
        assert 0 <= micro < self.accumulate, (micro, self.accumulate)
        first = micro * self._micro_rows + self.dp_rank * self._rows
        slots, done = range(first, first + self._rows), (step - 1) * self.batch_size
        return self.rows([self.sample(done + slot) for slot in slots], slots, done)


class EvalLoader(_Reader):
    """Held-out batches: up to `samples` sequences spread evenly over the split, the same number on every rank.

    `chosen[slot]` is the sample of a slot; rows after the last are padding, of which no label counts. Every iteration
    yields the same batches.

    Raises:
        Refused: the split does not hold one sequence.
    """

    def __init__(
        self, split: Split, *, seq_len: int, samples: int, rows_per_batch: int, dp: int, dp_rank: int, segment: Segment
    ) -> None:
        super().__init__(split, seq_len, segment)
        count = min(samples, self.samples)
        self.chosen = [i * self.samples // count for i in range(count)]
        self._rows, self._dp, self._dp_rank = rows_per_batch, dp, dp_rank

    def __len__(self) -> int:
        return -(-len(self.chosen) // (self._rows * self._dp))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self._dp + self._dp_rank) * self._rows
            slots = range(first, first + self._rows)
            yield self.rows([self.chosen[s] if s < len(self.chosen) else None for s in slots], slots)
