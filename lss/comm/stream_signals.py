"""A barrier between GPUs that takes no multiprocessor: streams write into one another's memory, and wait for theirs.

The driver's stream memory operations (cuStreamBatchMemOp) are done by the front end of a GPU, in the order of the stream
and behind a fence: what the stream wrote before is seen by who sees the flag. torch offers the writing half alone.

Source: CUDA Driver API, "Stream Memory Operations".
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

WAIT_32, WRITE_32 = 1, 2  # CUstreamBatchMemOpType
_WAIT_EQUAL = 1  # CUstreamWaitValue_flags
TRIAL_SECONDS = 5.0


class Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams, for a wait or a write of 32 bits: 48 bytes."""

    _fields_ = (
        ("kind", ctypes.c_uint32), ("_gap", ctypes.c_uint32), ("address", ctypes.c_uint64), ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32), ("_gap2", ctypes.c_uint32), ("alias", ctypes.c_uint64), ("_pad", ctypes.c_uint64),
    )  # fmt: skip


class StreamSignals:
    """Barriers of some GPUs' streams, a set of flags for each step.

    On arrival a rank writes 1 into its flag on every other rank, waits until all others have done so on its own, and
    clears those. Nobody can write a flag again before it was cleared, if another step's barrier lies between: passing that
    one says that all have cleared. The operations are the same each time, and so can be replayed in a CUDA graph.

    Args:
        buffers: each rank's flags (uint8), 0 at first, at least 4 x steps x ranks bytes, mapped on this device.
        rank: this rank.
        steps: the names of the barriers.
        stream: the one that signals and waits.
    """

    def __init__(
        self, buffers: Sequence[torch.Tensor], rank: int, steps: Sequence[str], stream: torch.cuda.Stream
    ) -> None:
        self._batch = ctypes.CDLL("libcuda.so.1").cuStreamBatchMemOp_v2
        self._batch.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
        self._mine, self._stream, self._handle = buffers[rank], stream, stream.cuda_stream
        starts = [buffer.data_ptr() for buffer in buffers]
        self._operations = {step: barrier_operations(starts, rank, number) for number, step in enumerate(steps)}

    @classmethod
    def opened(
        cls, buffers: Sequence[torch.Tensor], rank: int, steps: Sequence[str], stream: torch.cuda.Stream
    ) -> StreamSignals | None:
        """Signals with cleared flags, or None where the driver has none; all ranks must meet before their first use."""
        with suppress(OSError, AttributeError):
            signals = cls(buffers, rank, steps, stream)
            buffers[rank].zero_()
            torch.cuda.synchronize()
            return signals
        return None

    def barrier(self, step: str) -> None:
        """Let the stream wait until every rank's has come to this step.

        Raises:
            RuntimeError: the driver refuses.
        """
        operations = self._operations[step]
        error = self._batch(self._handle, len(operations), operations, 0)
        if error:
            raise RuntimeError(f"cuStreamBatchMemOp failed with CUDA error {error}")

    def trial(self) -> bool:
        """Whether one round of all barriers comes to its end; every rank must call, having met since `opened`.

        Where it hangs, this rank's flags are set by hand, so that the stream goes on; these signals are then of no use.
        """
        done = torch.cuda.Event()
        try:
            for step in self._operations:
                self.barrier(step)
            done.record(self._stream)
        except RuntimeError:
            return False
        end = time.monotonic() + TRIAL_SECONDS
        while not done.query():
            if time.monotonic() > end:
                with torch.cuda.stream(torch.cuda.Stream()):
                    self._mine.view(torch.int32).fill_(1)
                return False
            time.sleep(0.001)
        return True


def barrier_operations(starts: Sequence[int], rank: int, number: int) -> ctypes.Array[Operation]:
    """What a rank's stream does at the barrier of this number; `starts` are the addresses of the ranks' flags."""
    size, at = len(starts), 4 * len(starts) * number
    others = [(rank + step) % size for step in range(1, size)]
    mine = [starts[rank] + at + 4 * other for other in others]
    told = [_operation(WRITE_32, starts[other] + at + 4 * rank, 1) for other in others]
    told += [_operation(WAIT_32, place, 1, _WAIT_EQUAL) for place in mine]
    told += [_operation(WRITE_32, place, 0) for place in mine]
    return (Operation * len(told))(*told)


def _operation(kind: int, address: int, value: int, flags: int = 0) -> Operation:
    return Operation(kind=kind, address=address, value=value, flags=flags)
