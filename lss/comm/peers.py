"""Memory that the ranks of one host write into directly: CUDA symmetric memory over NVLink, shared memory on the CPU.

Nothing here is safe by itself: a rank that writes into another's memory must know that nobody reads it any more, and a
reader that all has been written. `barrier()` is the only means; `lss.comm.symmetric` says where it stands and why.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lss.comm.stream_signals import StreamSignals
from lss.comm.texts import gather_texts

# Bytes up to which copies are done by one kernel: an engine's start takes as long as 8 MiB over NVLink.
SHORT_COPY = 16 << 20
# Bytes from which on transfers travel in stages on GPUs whose streams signal without a kernel.
STAGED_BYTES = 96 << 20
# The barriers of a transfer, in their order.
STEPS = ("free", "arrived0", "arrived1")


class PeerMemory:
    """Buffers of the ranks of a group, each writable by all of them. This class is the CPU's; `CudaPeerMemory` a GPU's.

    On the CPU a buffer is a file in shared memory that every rank maps, and all calls are done when they return: the
    plain twin, which tests run with delays between the steps.

    Args:
        group: the ranks, all of one host.
        pause: called with a word at every step of a transfer, where the step's stream is the current one; tests sleep there.
    """

    def __init__(self, group: dist.ProcessGroup, pause: Callable[[str], None] | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.pause = pause
        self._buffers: dict[str, tuple[int, Any]] = {}
        # what `lss.comm.symmetric` keeps from call to call: where copies go, and marks of the last reads of each buffer
        self.routes: dict[Any, Any] = {}
        self.read: dict[str, Any] = {}
        # Bytes from which on transfers travel in stages, beside the kernels that compute meanwhile; None: never
        self.staged_bytes: int | None = None

    def buffer(self, name: str, nbytes: int) -> list[torch.Tensor]:
        """The ranks' buffers of this name, at least `nbytes` bytes each (uint8), this rank's own among them.

        Collective where it must grow: every rank asks for the same name and size, in the same order.
        """
        capacity, views = self._buffers.get(name, (0, None))
        if capacity < nbytes:
            self.routes.clear()  # they hold views of the buffer that goes
            self._buffers.pop(name, None)
            del views
            views = self._allocate(nbytes)
            self._buffers[name] = (nbytes, views)
        return views

    def copy(self, places: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, aside: bool) -> None:
        """Copy each source to its place; `aside`: on the transfer stream."""
        for place, source in zip(places, sources, strict=True):
            place.copy_(source)

    def exchange(
        self, name: str, places: list[torch.Tensor], sources: list[torch.Tensor], abroad: int,
        cleared: torch.Tensor | None = None,
    ) -> Any:  # fmt: skip
        """A whole transfer at once: clear a buffer, wait until all may be written, copy, wait until all has been written.

        Args:
            name: of this rank's buffer, whose readers are waited for.
            abroad: how many of the copies, the first, go to other ranks.

        Returns:
            The mark of the arrival.
        """
        self.wait_for(self.read.get(name))
        if cleared is not None:
            cleared.zero_()
        self.follow()
        self.reach("free")
        self.barrier("free")
        self.reach("copy")
        self.copy(places[:abroad], sources[:abroad], aside=True)
        self.copy(places[abroad:], sources[abroad:], aside=False)
        self.reach("arrived")
        self.barrier("arrived0")
        return self.mark(aside=True)

    def in_stages(self, nbytes: int) -> bool:
        """Whether a transfer of so many bytes goes in stages."""
        return self.staged_bytes is not None and nbytes >= self.staged_bytes

    def _allocate(self, nbytes: int) -> Any:
        folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
        mine = folder / f"lss-{os.getpid()}-{uuid.uuid4().hex}"
        own = torch.from_file(str(mine), shared=True, size=nbytes, dtype=torch.uint8)
        paths = gather_texts(str(mine), self.group, torch.device("cpu"))
        views = [
            own if rank == self.rank else torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
            for rank, path in enumerate(paths)
        ]
        dist.barrier(group=self.group)
        with suppress(OSError):
            mine.unlink()  # mapped by all: the name has served, and nothing is left behind whatever ends the run
        return views

    def barrier(self, step: str) -> None:
        """Wait until every rank of the group has come here; on a GPU the transfer stream waits, not the host.

        `step` is one of `STEPS`, the same on every rank, and never the same as that of the barrier before.
        """
        dist.barrier(group=self.group)

    def reach(self, step: str, *, aside: bool = True) -> None:
        """Come to a step of a transfer."""
        if self.pause is not None:
            self.pause(step)

    def follow(self) -> None:
        """Order the transfer stream behind what this rank has been told to compute so far."""

    def mark(self, *, aside: bool) -> Any:
        """A mark of everything issued so far, on the transfer stream or the current one, to wait for with `wait_for`."""
        return None

    def mark_read(self, name: str) -> None:
        """Everything issued so far that reads a buffer must be done before it is written again."""
        self.read[name] = self.mark(aside=False)

    def wait_for(self, mark: Any) -> None:
        """Order what is issued next behind a mark."""


class CudaPeerMemory(PeerMemory):
    """PeerMemory over torch's symmetric memory: peers' buffers are mapped, copies into them are done by copy engines."""

    def __init__(self, group: dist.ProcessGroup, pause: Callable[[str], None] | None = None) -> None:
        super().__init__(group, pause)
        # its number: torch looks a device up anew wherever none is named, and that takes longer than to issue a copy
        self._index = torch.cuda.current_device()
        self._device = torch.device("cuda", self._index)
        self._stream = torch.cuda.Stream(self._device)
        self._handle: Any = None
        self._signals: StreamSignals | None = None

    def _allocate(self, nbytes: int) -> Any:
        from torch.distributed import _symmetric_memory as symmetric_memory

        # torch would also bind the buffer to a multicast object, which nothing here uses
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        torch.cuda.synchronize(self._device)  # nobody may still read the buffer that this one replaces
        mine = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=self._device)
        handle = symmetric_memory.rendezvous(mine, self.group)
        views = [
            mine if rank == self.rank else handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self.size)
        ]
        self._handle = handle
        return views

    def signal_by_streams(self) -> None:
        """Let barriers be memory operations of the stream in place of kernels, where that works; collective.

        A kernel that waits for a peer holds a multiprocessor, and attention's last blocks then wait for that one.
        """
        signals = StreamSignals.opened(self.buffer("signals", 4 * len(STEPS) * self.size), self.rank, STEPS, self._stream)
        if not _agreed(signals is not None, self.group, self._device):
            return
        assert signals is not None
        if _agreed(signals.trial(), self.group, self._device):
            self._signals, self.staged_bytes = signals, STAGED_BYTES

    def copy(self, places: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, aside: bool) -> None:
        if not places:
            return
        # one launch where each copy is short; copy engines, which take no multiprocessor from attention, where it is long
        nbytes = sum(source.numel() * source.element_size() for source in sources)
        with self._on_transfer_stream() if aside else nullcontext():
            if nbytes <= SHORT_COPY:
                torch._foreach_copy_(list(places), list(sources))
            else:
                super().copy(places, sources, aside=aside)

    def exchange(
        self, name: str, places: list[torch.Tensor], sources: list[torch.Tensor], abroad: int,
        cleared: torch.Tensor | None = None,
    ) -> Any:  # fmt: skip
        """As of the CPU's; where copies are short, streams are looked up once and all copies are one launch."""
        # what is short travels sooner than it is issued: each call on the host counts
        nbytes = sum(source.numel() for source in sources[:abroad]) * (sources[0].element_size() if sources else 0)
        if self.pause is not None or self._signals is None or nbytes > SHORT_COPY:
            return super().exchange(name, places, sources, abroad, cleared)
        current, capturing = torch.cuda.current_stream(self._index), torch.cuda.is_current_stream_capturing()
        read = self.read.get(name)
        if read is not None and read[1] == capturing:
            current.wait_event(read[0])
        if cleared is not None:
            cleared.zero_()
        self._stream.wait_event(current.record_event())
        self._signals.barrier("free")
        if places:
            torch.cuda.set_stream(self._stream)
            try:
                torch._foreach_copy_(places, sources)
            finally:
                torch.cuda.set_stream(current)
        self._signals.barrier("arrived0")
        return self._stream.record_event(), capturing

    def barrier(self, step: str) -> None:
        if self._signals is not None:
            self._signals.barrier(step)
            return
        with self._on_transfer_stream():
            self._handle.barrier(channel=0)

    @contextmanager
    def _on_transfer_stream(self) -> Iterator[None]:
        before = torch.cuda.current_stream(self._index)
        torch.cuda.set_stream(self._stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(before)

    def reach(self, step: str, *, aside: bool = True) -> None:
        if self.pause is not None:
            with self._on_transfer_stream() if aside else nullcontext():
                self.pause(step)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._index))

    def mark(self, *, aside: bool) -> Any:
        event = torch.cuda.Event()
        event.record(self._stream if aside else torch.cuda.current_stream(self._index))
        return event, torch.cuda.is_current_stream_capturing()

    def mark_read(self, name: str) -> None:
        if not torch.cuda.is_current_stream_capturing():
            super().mark_read(name)

    def wait_for(self, mark: Any) -> None:
        # an event means nothing across the border of a CUDA graph; `follow` orders a transfer behind what its stream was
        # given before, the graph's replay as a whole
        if mark is not None and mark[1] == torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._index).wait_event(mark[0])


def open_peers(group: dist.ProcessGroup, device: torch.device) -> PeerMemory | None:
    """Peer memory over this group, or None where its ranks cannot reach one another's memory.

    Collective: every rank gets the same answer. They can where all are on one host and, on GPUs, each may access all
    others'.
    """
    mine = [socket.gethostname(), _boot_id(), device.type, torch.cuda.current_device() if device.type == "cuda" else -1,
            device.type == "cpu" or _has_symmetric_memory()]  # fmt: skip
    told = [json.loads(text) for text in gather_texts(json.dumps(mine), group, device)]
    one_host = len({(host, boot, kind) for host, boot, kind, *_ in told}) == 1 and all(ready for *_, ready in told)
    if not one_host:
        return None
    if device.type == "cpu":
        return PeerMemory(group)
    devices = [index for *_, index, _ in told]
    reached = len(set(devices)) == len(devices) and all(
        torch.cuda.can_device_access_peer(mine[3], other) for other in devices if other != mine[3]
    )
    if not _agreed(reached, group, device):
        return None
    peers = CudaPeerMemory(group)
    try:  # drivers and containers that forbid the mapping say so at the first buffer
        peers.buffer("trial", 4096)
        works = True
    except RuntimeError:
        works = False
    if not _agreed(works, group, device):
        return None
    peers.signal_by_streams()
    return peers


def _agreed(verdict: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether every rank says so."""
    every = torch.tensor([int(verdict)], dtype=torch.int64, device=device)
    dist.all_reduce(every, op=dist.ReduceOp.MIN, group=group)
    return bool(every)


def _boot_id() -> str:
    """Tells hosts of one name apart; containers of one host that share no memory are told apart by its namespace."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/ipc")
    return ""


def _has_symmetric_memory() -> bool:
    try:
        from torch.distributed import _symmetric_memory
    except ImportError:
        return False
    return hasattr(_symmetric_memory, "rendezvous")
