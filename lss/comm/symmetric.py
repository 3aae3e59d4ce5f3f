"""The gather of K, V and the return of dK, dV by writing straight into the other ranks' memory.

Each rank copies its own keys and values to where they stand *in sequence order* in every other rank's buffer, and only
those that the rank there sees: no staging, no reordering, no key that nobody looks at. Gradients travel the same way
back, into a slot per sender, and the owner sums the slots that hold something, in float32 inside one kernel. On GPUs the
copies run on a side stream by the copy engines, beside the attention that computes meanwhile.

A transfer is four steps, in the same order on every rank:

    1. the barrier "free": nobody reads any more what is about to be written;
    2. the copies;
    3. the barrier "arrived": everything has been written;
    4. the reader computes, and then marks the buffer as read, which the next "free" waits for.

Without 1 a fast rank overwrites keys that a slow one is still reading (the next layer's, or the next head chunk's);
without 3 a rank reads what has not come. Tests run both faults, with delays between the steps.

A gather may come in two stages, what a rank's first kernel call reads and the rest (2 and 3 twice), and gradients may leave
in parts, as soon as nothing more is added to them, where `PeerMemory.staged_bytes` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lss.comm.collectives import KV, Pending
from lss.comm.counter import record
from lss.comm.peers import PeerMemory
from lss.segment import Push


@dataclass(frozen=True)
class _Copy:
    """One copy between this rank's tensors and a rank's buffer: which plane (k or v), row and tokens of them."""

    place: torch.Tensor
    plane: int
    row: int
    start: int
    stop: int

    def source(self, planes: Sequence[torch.Tensor]) -> torch.Tensor:
        return planes[self.plane][self.row, self.start : self.stop]


@dataclass(frozen=True)
class _Route:
    """Where one kind of transfer goes: this rank's own buffer, copies that stay here, and those of each stage."""

    mine: torch.Tensor
    here: tuple[_Copy, ...]
    stages: tuple[tuple[int, tuple[_Copy, ...]], ...]  # (tokens of this rank's buffer that have come then, copies)


class _Arriving(Pending[KV]):
    """A transfer into this rank's memory, in stages."""

    def __init__(self, peers: PeerMemory, marks: list[tuple[int, Any]], result: Callable[[], KV], keep: object) -> None:
        super().__init__((), result, keep)
        self._peers, self._marks = peers, marks

    def begin(self) -> KV:
        return self._result()

    def upto(self, length: int) -> None:
        while self._marks:
            come, mark = self._marks.pop(0)
            self._peers.wait_for(mark)
            if come >= length:
                return

    def wait(self) -> KV:
        self.finish()
        return self._result()

    def finish(self) -> None:
        """Wait for the last stage."""
        for _, mark in self._marks[-1:]:
            self._peers.wait_for(mark)
        self._marks.clear()
        self._keep = None


class SymmetricTransport:
    """`Transport` over peer memory.

    Args:
        peers: the ranks' memory.
        push: which of this rank's tokens go where, and what comes back.
        depth: how many gathers, and how many returns, may be under way or being read at a time.
        dkv_dtype: the dtype that dK and dV travel and are summed within a rank in; the sum over ranks is in float32.

    Memory: `depth` buffers of the fetched K and V, and as many of cp segments' dK and dV; they stay for the next call.
    """

    volatile = True  # the buffers are written again by the next gathers

    def __init__(self, peers: PeerMemory, push: Push, depth: int, dkv_dtype: torch.dtype) -> None:
        self.runs, self.length = push.runs, push.length
        self._peers, self._push, self._depth, self._dkv_dtype = peers, push, depth, dkv_dtype
        self._next = self._left = 0
        self._reading: tuple[str, _Arriving] | None = None

    def gather(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> Pending[KV]:
        """Fetch the keys and values that this rank sees, (B, push.length, K, H), in sequence order.

        Counted as one all-gather whose payload is what this rank holds afterwards.
        """
        name = f"kv{self._next % self._depth}"
        self._next += 1
        kv = k_BTKH.contiguous(), v_BTKH.contiguous()  # a slice of heads is gathered to be copied in long runs
        route = self._route(name, self._kv_route, (k_BTKH.shape[0], *k_BTKH.shape[2:]), k_BTKH.dtype)
        record("all_gather", "kv", route.mine)

        def result() -> KV:
            self._reading = name, arriving
            self._peers.pause("read")
            return route.mine[0], route.mine[1]

        arriving = _Arriving(self._peers, self._transfer(name, route, kv), result, kv)
        return arriving

    def release(self) -> None:
        """The keys and values gathered last have been read: everything that reads them has been issued."""
        assert self._reading is not None
        name, arriving = self._reading
        arriving.finish()
        self._peers.mark_read(name)

    def new_dkv(self, like_BTKH: torch.Tensor) -> torch.Tensor:
        """Room for the dK and dV of all fetched tokens; nothing stands there yet."""
        B, _, K, H = like_BTKH.shape
        return torch.empty(2, B, self._push.length, K, H, dtype=self._dkv_dtype, device=like_BTKH.device)

    def split(self, dkv: torch.Tensor) -> KV:
        """dK and dV, (B, push.length, K, H) each, of such a room."""
        return dkv[0], dkv[1]

    def leave(self, dkv: torch.Tensor) -> _Leaving:
        """The way home of gradients that are about to be computed into such a room."""
        name = f"dkv{self._left % self._depth}"
        self._left += 1
        return _Leaving(self, name, dkv)

    def scatter(self, dkv: torch.Tensor) -> Pending[KV]:
        """Bring the gradients home: returns dk, dv (B, T, K, H), summed over the ranks, in `dkv_dtype`.

        Counted as one reduce-scatter whose payload is what this rank has for all ranks, itself included.
        """
        return self.leave(dkv).finish()

    # -- how both travel ---------------------------------------------------------------------------------------------

    def _transfer(self, name: str, route: _Route, planes: Sequence[torch.Tensor]) -> list[tuple[int, Any]]:
        """Issue a gather; returns (tokens that have come, mark) of each stage."""
        peers, marks = self._peers, []
        _issue(peers, route.here, planes)
        peers.follow()
        with peers.transfers():
            self._free(name)
            for come, copies in route.stages:
                peers.pause("copy")
                _issue(peers, copies, planes)
                marks.append((come, self._arrived()))
        return marks

    def _free(self, name: str) -> None:
        """Wait until nobody reads this buffer any more, on any rank."""
        self._peers.wait_for(self._peers.read.get(name))
        self._peers.pause("free")
        self._peers.barrier()

    def _arrived(self) -> Any:
        """Wait until every rank has written; returns the mark of it."""
        self._peers.pause("arrived")
        self._peers.barrier()
        return self._peers.mark()

    def _route(self, name: str, make: Callable[..., _Route], shape: tuple[int, ...], dtype: torch.dtype) -> _Route:
        """The route of this transfer, made once for all calls of one cut, shape and dtype."""
        key = name, id(self._push), shape, dtype, self._peers.staged_bytes
        if key not in self._peers.routes:
            # the plan is kept with it: its identity stands for it
            route = make(name, *shape, dtype)
            self._peers.routes[key] = route, self._push
        return self._peers.routes[key][0]

    def _kv_route(self, name: str, B: int, K: int, H: int, dtype: torch.dtype) -> _Route:
        push, me = self._push, self._peers.rank
        buffers = _typed(self._peers, name, [(2, B, length, K, H) for length in push.lengths], dtype)
        longest = max(2 * B * length * K * H * dtype.itemsize for length in push.lengths)
        staged = self._peers.in_stages(longest) and any(f < n for f, n in zip(push.firsts, push.lengths, strict=True))

        def copies(peer: int, start: int, stop: int) -> list[_Copy]:
            """This rank's part of places [start, stop) of a peer's buffer."""
            cut = [(a + max(start - at, 0), min(b, a + stop - at), max(at, start)) for a, b, at in push.sends[peer]]
            return [
                _Copy(buffers[peer][plane, row, at : at + b - a], plane, row, a, b)
                for a, b, at in cut if a < b for plane in range(2) for row in range(B)
            ]  # fmt: skip

        edges = [[0, push.firsts[peer], push.lengths[peer]] if staged else [0, push.lengths[peer]] for peer in range(len(buffers))]
        stages = tuple(
            (edges[me][i + 1], tuple(c for peer in _others(self._peers) for c in copies(peer, *edges[peer][i : i + 2])))
            for i in range(2 if staged else 1)
        )
        return _Route(buffers[me], tuple(copies(me, 0, push.length)), stages)

    def _dkv_route(self, name: str, first: int, end: int, B: int, K: int, H: int, dtype: torch.dtype) -> _Route:
        """Where gradients of places [first, end) of this rank's buffer go."""
        push, me, size = self._push, self._peers.rank, self._peers.size
        buffers = _typed(self._peers, name, [(size, 2, B, push.local_len, K, H)] * size, dtype)

        def copies(peer: int) -> list[_Copy]:
            cut = [(max(at, first), min(at + b - a, end), a - at) for at, a, b in push.returns[peer]]
            return [
                _Copy(buffers[peer][me, plane, row, start + shift : stop + shift], plane, row, start, stop)
                for start, stop, shift in cut if start < stop for plane in range(2) for row in range(B)
            ]  # fmt: skip

        abroad = tuple(c for peer in _others(self._peers) for c in copies(peer))
        return _Route(buffers[me], tuple(copies(me)), ((push.local_len, abroad),))


class _Leaving:
    """Gradients on their way home, in parts, each as soon as no call will add to it any more."""

    def __init__(self, transport: SymmetricTransport, name: str, dkv: torch.Tensor) -> None:
        self._transport, self._name, self._dkv = transport, name, dkv
        self._peers, self._push = transport._peers, transport._push
        self._sent: int | None = None  # from where on places have left; None before the first
        self._parts = self._push.length > 0 and self._peers.in_stages(dkv.numel() * dkv.element_size())

    def upfrom(self, place: int) -> None:
        """Nothing more is added to places from this one on. Where all is little, it leaves together in the end."""
        if place < (self._push.length if self._sent is None else self._sent) and (self._parts or place == 0):
            self._send(place)

    def _send(self, place: int) -> None:
        peers, dkv, first = self._peers, self._dkv, self._sent is None
        end = self._push.length if first else self._sent
        assert end is not None
        route = self._route(place, end)
        if first and self._push.sums is None:
            route.mine.zero_()  # where the senders of a token are not neighbours, absent ones are summed as zeros
        _issue(peers, route.here, dkv)
        peers.follow()
        with peers.transfers():
            if first:
                self._transport._free(self._name)
            peers.pause("copy")
            _issue(peers, route.stages[0][1], dkv)
        self._sent = place

    def _route(self, first: int, end: int) -> _Route:
        _, B, _, K, H = self._dkv.shape
        return self._transport._route(self._name, self._transport._dkv_route, (first, end, B, K, H), self._dkv.dtype)

    def finish(self) -> Pending[KV]:
        """All has been computed: returns dk, dv (B, T, K, H), summed over the ranks."""
        if self._sent != 0:
            self._send(0)
        peers, dkv, name, T = self._peers, self._dkv, self._name, self._push.local_len
        record("reduce_scatter", "dkv", dkv)
        mine, sums = self._route(0, self._push.length).mine, self._push.sums
        with peers.transfers():
            marks = [(T, self._transport._arrived())]

        def result() -> KV:
            peers.pause("read")
            total = dkv.new_empty(2, dkv.shape[1], T, *dkv.shape[3:])
            for a, b, first, end in sums or ((0, T, 0, peers.size),):
                _sum_slots(total[:, :, a:b], mine[first:end, :, :, a:b])
            peers.mark_read(name)
            return total[0], total[1]

        return _Arriving(peers, marks, result, dkv)


def _issue(peers: PeerMemory, copies: Sequence[_Copy], planes: Sequence[torch.Tensor]) -> None:
    peers.copy([copy.place for copy in copies], [copy.source(planes) for copy in copies])


def _sum_slots(total: torch.Tensor, slots: torch.Tensor) -> None:
    """Sum over the first dimension into `total`; half precision is added in float32 inside."""
    if len(slots) == 0:
        total.zero_()
    elif len(slots) == 1:
        total.copy_(slots[0])
    elif len(slots) == 2:
        torch.add(slots[0], slots[1], out=total)
    else:
        torch.sum(slots, 0, out=total)


def _others(peers: PeerMemory) -> list[int]:
    """All other ranks, the next one first, so that not all write to the same one at a time."""
    return [(peers.rank + step) % peers.size for step in range(1, peers.size)]


def _typed(peers: PeerMemory, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Each rank's buffer as a tensor of its shape; room for the largest on all of them."""
    counts = [torch.Size(shape).numel() for shape in shapes]
    buffers = peers.buffer(name, max(*counts, 1) * dtype.itemsize)
    return [
        buffer[: count * dtype.itemsize].view(dtype).view(shape)
        for buffer, count, shape in zip(buffers, counts, shapes, strict=True)
    ]
