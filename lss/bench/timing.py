"""Taking times on all ranks together: in step, the slowest rank's, with failures that every rank learns of.

A step that fails on *some* ranks only, between two of its collectives, leaves the others waiting inside one. Nothing
but the group's timeout ends that: gloo then raises, which `agree` turns into a `Failed`; NCCL ends the process, and
the mark of `lss.bench.rows.Results` makes the next start go on behind the step. A failure before a step's first
collective, on all ranks, or in a local call (by far the most) costs that candidate only.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lss.bench.rival import reason_of
from lss.comm import Communicator
from lss.config.errors import Failed
from lss.hosts import out_of_memory

_REASON_BYTES = 256
R = TypeVar("R")


@dataclass(frozen=True)
class Clock:
    """Times steps on one device of a group of ranks."""

    comm: Communicator
    device: torch.device

    def synchronize(self) -> None:
        """Wait for everything that this rank's device was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for every rank."""
        self.largest([0.0])

    def largest(self, values: list[float]) -> list[float]:
        """Each number's largest over the ranks. Collectives: one all-reduce; none for no numbers."""
        if not values:
            return []
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.comm.all_reduce_max(x, "bench").wait().tolist()

    def total(self, values: list[float]) -> list[float]:
        """Each number's sum over the ranks. Collectives: one all-reduce."""
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.comm.all_reduce(x, "bench").wait().tolist()

    def agree(self, failure: str | None) -> str | None:
        """The first rank's failure that has one, on every rank; None where no rank has any.

        Raises:
            Failed: the ranks cannot reach each other any more.
        """
        try:
            if self.largest([float(failure is not None)])[0] == 0:
                return None
            text = (failure or "").encode()[:_REASON_BYTES].ljust(_REASON_BYTES)
            mine = torch.tensor(list(text), dtype=torch.uint8, device=self.device)
            told = bytes(self.comm.all_gather(mine, 0, "bench").wait().tolist())
        except RuntimeError as error:
            raise Failed(f"The ranks fell out of step, which ends this run ({failure or reason_of(error)}); start it again "
                         "and it goes on behind what it was doing.") from error  # fmt: skip
        parts = [told[at : at + _REASON_BYTES].decode(errors="replace").strip() for at in range(0, len(told), _REASON_BYTES)]
        return next(part for part in parts if part)

    def attempt(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        """(result, None) where the action came back on every rank, else (None, why not)."""
        result, failure = None, None
        try:
            result = action()
            self.synchronize()
        except KeyboardInterrupt:
            raise
        except Exception as error:
            failure = status_of(error)
            print(f"lss bench: rank {self.comm.rank}: {failure}", file=sys.stderr, flush=True)
        agreed = self.agree(failure)
        if agreed is None:
            return result, None
        del result
        self.tidy()
        return None, agreed

    def tidy(self) -> None:
        """Give memory back that a failed or finished candidate may have left on a GPU."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def time(self, step: Callable[[], R]) -> tuple[float, R]:
        """Milliseconds of one step on this rank, and its result; CUDA events on a GPU."""
        self.synchronize()
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = step()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop), result
        began = time.perf_counter()
        result = step()
        return 1e3 * (time.perf_counter() - began), result


def status_of(error: BaseException) -> str:
    """A row's status for what a step raised: "oom" or "failed: why"."""
    if out_of_memory(error):
        return "oom"
    return f"failed: {reason_of(error)}"


def spread_of(times: list[float]) -> float:
    """How far the times lie apart, over their median: from the 10th to the 90th percentile of 10 times or more, else
    from the smallest to the largest."""
    middle = statistics.median(times)
    if len(times) >= 10:
        tenths = statistics.quantiles(times, n=10, method="inclusive")
        return (tenths[-1] - tenths[0]) / middle
    return (max(times) - min(times)) / middle
