"""What a tier offers, and the first one: pinned buffers in host memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from lss.config.errors import Failed

Event = Any  # torch.cuda.Event, which torch types in two ways


class Slot(Protocol):
    """Room for one tensor's bytes in a tier: `store`, then once `fetch` and `wait`, then `free`."""

    def store(self, x: torch.Tensor) -> None:
        """Begin to copy a contiguous tensor out; it may be given up when this returns."""
        ...

    def fetch(self, into: torch.Tensor) -> None:
        """Begin to copy the bytes back into a tensor on the device."""
        ...

    def wait(self) -> None:
        """Let the current stream (or this thread) wait for what `fetch` began."""
        ...

    def free(self) -> None:
        """Give the room back."""
        ...


class Tier(Protocol):
    """A place with room for so many bytes."""

    @property
    def limit(self) -> int | None:
        """Bytes that it may take; None for no bound but the disk's."""
        ...

    def take(self, nbytes: int) -> Slot | None:
        """Room for a tensor of so many bytes; None where there is none left."""
        ...

    def buffers(self) -> list[torch.Tensor]:
        """All host memory of it that is free; that in use is its slots'."""
        ...


class HostTier:
    """Buffers in host memory, pinned where a GPU copies to them, made when first needed and then used again.

    Args:
        device: that of the tensors.
        limit: bytes that all buffers together may take.

    Attributes:
        taken: bytes of all buffers there are.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit, self.taken = device, limit, 0
        # with each free buffer the end of the copy that last read it, which whoever writes there waits for
        self._free: dict[int, list[tuple[torch.Tensor, Event | None]]] = {}
        self._lock = threading.Lock()
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def take(self, nbytes: int) -> Slot | None:
        found = self.buffer(nbytes)
        return None if found is None else _HostSlot(self, *found)

    def buffer(self, nbytes: int) -> tuple[torch.Tensor, Event | None] | None:
        """A buffer of just so many bytes, and what its writer must wait for; None where the limit leaves no room.

        No buffer is cut to fit: the tensors of a run have few sizes.
        """
        with self._lock:
            if self._free.get(nbytes):
                return self._free[nbytes].pop()
            for size in [size for size in self._free if size != nbytes]:
                while self._free[size] and self.taken + nbytes > self.limit:  # unused, and in the way
                    _, read = self._free[size].pop()
                    if read is not None:
                        read.synchronize()
                    self.taken -= size
            if self.taken + nbytes > self.limit:
                return None
            self.taken += nbytes
        return (_pinned(nbytes) if self.device.type == "cuda" else torch.empty(nbytes, dtype=torch.uint8)), None

    def buffers(self) -> list[torch.Tensor]:
        """All that are free; those in use are their slots'."""
        return [buffer for free in self._free.values() for buffer, _ in free]

    def give_back(self, buffer: torch.Tensor, read: Event | None = None) -> None:
        """The buffer may be taken again, and written from when `read` is past."""
        with self._lock:
            self._free.setdefault(buffer.numel(), []).append((buffer, read))

    def now(self) -> Event | None:
        """The point that the current stream has come to."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def wait_here(self, event: Event | None) -> None:
        """Let the current stream wait."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def copy(self, to: torch.Tensor, source: torch.Tensor, after: Sequence[Event | None]) -> Event | None:
        """Copy between device and host after these events, on a stream of that direction; returns the event of its end."""
        if self.device.type != "cuda":
            to.copy_(source)
            return None
        with self._lock:
            # one for each direction, so that the link is used both ways at once
            self._streams = self._streams or (torch.cuda.Stream(self.device), torch.cuda.Stream(self.device))
        stream, on_device = (self._streams[0], source) if source.is_cuda else (self._streams[1], to)
        for event in after:
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        on_device.record_stream(stream)  # its memory is not given to another while the copy runs
        return stream.record_event()


class _HostSlot:
    def __init__(self, tier: HostTier, buffer: torch.Tensor, read: Event | None) -> None:
        self._tier, self._buffer, self._copied = tier, buffer, read

    def store(self, x: torch.Tensor) -> None:
        self._copied = self._tier.copy(self._buffer, bytes_of(x), (self._tier.now(), self._copied))

    def fetch(self, into: torch.Tensor) -> None:
        self._copied = self._tier.copy(bytes_of(into), self._buffer, (self._tier.now(), self._copied))

    def wait(self) -> None:
        self._tier.wait_here(self._copied)

    def free(self) -> None:
        self._tier.give_back(self._buffer, self._copied)


def _pinned(nbytes: int) -> torch.Tensor:
    """Pinned memory of just this size: torch's own pinned allocator rounds up to a power of two."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0))
    if error:
        raise Failed(
            f"Host memory of {nbytes / 2**30:.1f} GiB could not be pinned (CUDA error {error}): lower "
            'memory.offload_gib, use memory.optimizer="device", or raise the limit on locked memory (ulimit -l).'
        )
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes."""
    return x.view(-1).view(torch.uint8)
