"""A file's digest, taken by several threads at once.

A file of at most `PIECE` bytes has the SHA-256 of its bytes. A longer one has the SHA-256 of its pieces' SHA-256s, one
behind another: pieces are hashed side by side, where a SHA-256 of the whole is as fast as one core, about 1.4 GB/s, which
a good disk outruns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

# Small enough to be hashed from a core's own cache, just before it is written or just after it is read.
PIECE = 4 << 20
SMALLEST_PIECE, LARGEST_PIECE = 1 << 20, 64 << 20  # that are read


def hashers(*, yielding: bool = False) -> Executor:
    """Threads that hash: as many as this rank's share of the cores, 2 to 8. A context.

    Args:
        yielding: to whatever else wants the cores (`yield_cores`).
    """
    count = min(8, max(2, torch.get_num_threads()))
    return ThreadPoolExecutor(count, "lss hash", initializer=yield_cores if yielding else None)


def yield_cores() -> None:
    """Let this thread, for as long as it lives, have what time of the cores others leave, where the system knows how."""
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):  # a container may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # 0: of the thread that calls


class PieceDigest:
    """The digest of what `update` is given, bit by bit, hashed by `pool` meanwhile; nothing is copied, so it must stay."""

    def __init__(self, pool: Executor, digest: Callable[[], Any] = hashlib.sha256) -> None:
        self._pool, self._digest = pool, digest
        self._parts: list[memoryview] = []
        self._room = PIECE
        self._done: list[Future[bytes]] = []

    def update(self, data: memoryview) -> None:
        """The next bytes."""
        while len(data):
            part, data = data[: self._room], data[self._room :]
            self._parts.append(part)
            self._room -= len(part)
            if not self._room:
                self._close()

    def _close(self) -> None:
        self._done.append(self._pool.submit(_hash, self._digest, self._parts))
        self._parts, self._room = [], PIECE

    def hexdigest(self) -> str:
        """The digest of all of it, once the threads are done."""
        if self._parts or not self._done:
            self._close()
        return join([piece.result() for piece in self._done], self._digest)


def join(pieces: Sequence[bytes], digest: Callable[[], Any] = hashlib.sha256) -> str:
    """A file's digest from those of its pieces."""
    if len(pieces) == 1:
        return pieces[0].hex()
    whole = digest()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()


def _hash(digest: Callable[[], Any], parts: Sequence[memoryview]) -> bytes:
    hashed = digest()
    for part in parts:
        hashed.update(part)
    return hashed.digest()


def hash_descriptor(descriptor: int, piece: int) -> str:
    """The digest of an open file, by pieces of so many bytes. Memory: a piece for each thread."""
    size = os.fstat(descriptor).st_size

    def read_and_hash(at: int) -> bytes:
        hashed, end = hashlib.sha256(), min(size, at + piece)
        while at < end:
            data = os.pread(descriptor, end - at, at)
            if not data:  # cut off since
                break
            hashed.update(data)
            at += len(data)
        return hashed.digest()

    with hashers() as pool:
        return join(list(pool.map(read_and_hash, range(0, max(size, 1), piece))))
