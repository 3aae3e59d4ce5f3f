"""From a corpus to batches: each rank reads the bytes of its own segment and nothing else.

The order of samples is a function of (seed, epoch, place in the epoch), free of the number of ranks, so that any
layout sees the same sequences in the same steps, before and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict, Unpack

from lss.config.errors import refuse
from lss.data.reader import Batch, Kind, Reader
from lss.data.sources import Split
from lss.segment import Segment

__all__ = ["Batch", "EvalLoader", "Loader", "LoaderState"]

_ONE_ROW = "packed sequences come one at a time: one row per micro-batch and dp rank, since documents differ by row"


class LoaderState(TypedDict):
    """Where a run's data stands: the place of the next sample in the order of an epoch, which `seed` draws."""

    seed: int
    epoch: int
    sample: int


class Loader(Reader):
    """Training batches: every epoch a permutation of the split's samples.

    The step's `batch_size` slots are filled in the order of the epoch; micro-batch m of dp rank d takes the slots
    [m * B + d * b, ... + b), with B = batch_size / accumulate and b = B / dp. `kind` says what is made of the text:
    packed documents, a prefix, masked tokens or an encoder's source (see `Reader`).

    Raises:
        Refused: the split is too short, batch_size does not divide, or packing with more than a row; see `Reader` too.
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
        **kind: Unpack[Kind],
    ) -> None:
        if batch_size % (dp * accumulate):
            raise refuse("train.batch_size", batch_size, f"must be a multiple of dp={dp} x accumulate={accumulate}")
        if kind.get("packing") and batch_size != dp * accumulate:
            fit = f"{_ONE_ROW}; use dp x accumulate = {dp * accumulate}, or train.accumulate={batch_size // dp}"
            raise refuse("train.batch_size", batch_size, fit)
        assert 0 <= dp_rank < dp, (dp_rank, dp)
        super().__init__(split, seq_len, segment, seed=seed, **kind)
        self.batch_size, self.accumulate, self.dp_rank = batch_size, accumulate, dp_rank
        self._known = (0, 0)  # after this step, so many samples of all epochs had been read
        self._micro_rows = batch_size // accumulate
        self._rows = self._micro_rows // dp

    def sample(self, number: int) -> int:
        """Which sample of the split is number `number` (a `sample_ids` value) in the order of all epochs."""
        return self.split.draw(number, self.counts, self.seed)

    def read_before(self, step: int) -> int:
        """How many samples, of all epochs and by all ranks, the steps before `step` have read."""
        known_step, known = self._known
        assert step > known_step, (step, known_step)
        return known + (step - 1 - known_step) * self.batch_size

    def state(self, step: int) -> LoaderState:
        """Where the data stands after `step`; the same for any number of ranks."""
        epoch, sample = divmod(self.read_before(step + 1), self.samples)
        return {"seed": self.seed, "epoch": epoch, "sample": sample}

    def resume(self, step: int, state: LoaderState) -> None:
        """Go on after `step` where `state` says, whatever the batch size was before.

        Raises:
            Refused: the order of samples was drawn by another seed.
        """
        if state["seed"] != self.seed:
            fit = f"the run's order of samples was drawn by seed {state['seed']}; use that one or another --out"
            raise refuse("train.seed", self.seed, fit)
        self._known = (step, state["epoch"] * self.samples + state["sample"])

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch `micro` (from 0) of step `step` (from 1): this rank's rows and tokens."""
        assert step >= 1, step
        assert 0 <= micro < self.accumulate, (micro, self.accumulate)
        first = micro * self._micro_rows + self.dp_rank * self._rows
        slots, done = range(first, first + self._rows), self.read_before(step)
        return self.rows([self.sample(done + slot) for slot in slots], slots, done)


class EvalLoader(Reader):
    """Held-out batches: up to `samples` sequences spread evenly over the split, the same number on every rank.

    `chosen[slot]` is the sample of a slot; rows after the last are padding, of which no label counts. Every iteration
    yields the same batches. `kind` is as for training; packing and masks are drawn by seed 0.

    Raises:
        Refused: the split does not hold one sequence, or packing with more than one row; see `Reader` too.
    """

    def __init__(
        self,
        split: Split,
        *,
        seq_len: int,
        samples: int,
        rows_per_batch: int,
        dp: int,
        dp_rank: int,
        segment: Segment,
        **kind: Unpack[Kind],
    ) -> None:
        if kind.get("packing") and rows_per_batch != 1:
            raise refuse("rows_per_batch", rows_per_batch, f"{_ONE_ROW}; use 1")
        super().__init__(split, seq_len, segment, seed=0, **kind)
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
