"""The second tier: files on a local disk."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from lss.config.errors import Failed, refuse
from lss.offload.host import Event, HostTier, Slot, bytes_of


class DiskTier:
    """Files without a name in a folder, written and read by a thread each, through a few host buffers.

    Args:
        staging: makes the buffers that bytes pass through, and bounds them.
        folder: on a fast local disk; the system's temporary folder by default.

    Raises:
        Refused: the folder is not there, or cannot be written to.
    """

    def __init__(self, staging: HostTier, folder: str | Path = "") -> None:
        self.limit: int | None = None
        self.staging, self.folder = staging, Path(folder or tempfile.gettempdir())
        if not self.folder.is_dir() or not os.access(self.folder, os.W_OK):
            raise refuse("memory.offload_path", self.folder, "not a folder that can be written to; name one on a local disk")
        self.writer, self.reader = (ThreadPoolExecutor(1, f"offload-{name}") for name in ("write", "read"))
        self._free: dict[int, list[int]] = {}

    def take(self, nbytes: int) -> Slot | None:
        if nbytes > self.staging.limit:
            return None
        if self._free.get(nbytes):
            return _DiskSlot(self, self._free[nbytes].pop(), nbytes)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)  # a full disk is found here, not in a thread
        except OSError:
            return None
        return _DiskSlot(self, descriptor, nbytes)

    def buffers(self) -> list[torch.Tensor]:
        return self.staging.buffers()

    def staged(self, nbytes: int) -> tuple[torch.Tensor, Event | None]:
        """A buffer to pass through; where all are in use, the threads are waited for, which give theirs back."""
        while (found := self.staging.buffer(nbytes)) is None:
            for thread in (self.writer, self.reader):
                thread.submit(lambda: None).result()  # a thread takes its work in turn
        return found

    def give_back(self, descriptor: int, nbytes: int) -> None:
        """The file may be written anew."""
        self._free.setdefault(nbytes, []).append(descriptor)


class _DiskSlot:
    def __init__(self, tier: DiskTier, descriptor: int, nbytes: int) -> None:
        self._tier, self._file, self._nbytes = tier, descriptor, nbytes
        self._written: Future[None] | None = None
        self._read: Future[Event | None] | None = None

    def store(self, x: torch.Tensor) -> None:
        staging = self._tier.staging
        buffer, free = self._tier.staged(self._nbytes)
        copied = staging.copy(buffer, bytes_of(x), (staging.now(), free))

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            _whole(os.pwrite, self._file, buffer)
            staging.give_back(buffer)

        self._written = self._tier.writer.submit(write)

    def fetch(self, into: torch.Tensor) -> None:
        staging, written = self._tier.staging, self._written
        (buffer, free), now = self._tier.staged(self._nbytes), staging.now()
        assert written is not None

        def read() -> Event | None:
            written.result()
            if free is not None:
                free.synchronize()
            _whole(lambda file, view, at: os.preadv(file, [view], at), self._file, buffer)
            copied = staging.copy(bytes_of(into), buffer, (now,))
            staging.give_back(buffer, copied)
            return copied

        self._read = self._tier.reader.submit(read)

    def wait(self) -> None:
        assert self._read is not None
        self._tier.staging.wait_here(self._read.result())

    def free(self) -> None:
        for work in (self._written, self._read):
            if work is not None:
                work.result()
        self._tier.give_back(self._file, self._nbytes)


def _whole(call: Callable[[int, memoryview, int], int], descriptor: int, buffer: torch.Tensor) -> None:
    """Write or read all of a buffer: one call moves 2 GiB at most."""
    view, at = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
    while at < len(view):
        done = call(descriptor, view[at : at + (1 << 30)], at)
        if done == 0:
            raise Failed("A file of offloaded activations ended early: something else has cut it short.")
        at += done
