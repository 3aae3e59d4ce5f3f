"""The gather of K, V and the return of dK, dV by writing straight into the other ranks' memory.

Each rank copies its own keys and values to where they stand *in sequence order* in every other rank's buffer, and only
those that the rank there sees: no staging, no reordering, no key that nobody looks at. Gradients travel the same way
back, into a slot per sender and kernel call, and the owner sums the slots that hold something, in float32 inside one
kernel: no rank adds up half precision on the way, and no zeros travel. On GPUs the copies run on a side stream, long ones
by the copy engines, beside the attention that computes meanwhile.

A transfer is four steps, in the same order on every rank:

    1. the barrier "free": nobody reads any more what is about to be written;
    2. the copies;
    3. the barrier "arrived": everything has been written;
    4. the reader computes, and then marks the buffer as read, which the next "free" waits for.

Without 1 a fast rank overwrites keys that a slow one is still reading (the next layer's, or the next head chunk's);
without 3 a rank reads what has not come. Tests run both faults, with delays between the steps.

Long transfers (`PeerMemory.staged_bytes`) travel beside the kernels: a gather comes in two stages, what a rank's first
kernel call reads and the rest (2 and 3 twice), and gradients leave room by room, each as soon as the call that computes
it has been issued (2 for each). Short ones go at once, and both calls of a rank may then be one (`together`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lss.comm.collectives import KV, Pending
from lss.comm.counter import record, waiting_inside
from lss.comm.peers import PeerMemory
from lss.comm.routes import Copy, Leg, Route, Way, exchange_all
from lss.segment import Push

MOST_ROUTES = 64


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

    Memory: `depth` buffers of the fetched K and V, and as many of a segment's dK and dV for each slot (2 cp - 1 of them at
    most); they stay for the next call.
    """

    volatile = True  # the buffers are written again by the next gathers

    def __init__(self, peers: PeerMemory, push: Push, depth: int, dkv_dtype: torch.dtype) -> None:
        self.runs, self.length = push.runs, push.length
        self._peers, self._push, self._depth, self._dkv_dtype = peers, push, depth, dkv_dtype
        self._next = self._sent = 0
        self._reading: tuple[str, _Arriving] | None = None
        self._leaving: Way | None = None

    def gather(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> Pending[KV]:
        """Fetch the keys and values that this rank sees, (B, push.length, K, H), in sequence order.

        Counted as one all-gather whose payload is what this rank holds afterwards.
        """
        name = f"kv{self._next % self._depth}"
        self._next += 1
        kv = k_BTKH.contiguous(), v_BTKH.contiguous()  # a slice of heads is gathered to be copied in long runs
        route = self._route(name, self._kv_route, (k_BTKH.shape[0], *k_BTKH.shape[2:]), k_BTKH.dtype)
        record("all_gather", "kv", route.counted)

        def result() -> KV:
            self._reading = name, arriving
            self._peers.reach("read", aside=False)
            return route.mine[0], route.mine[1]

        marks = []
        with waiting_inside():
            if len(route.legs) == 1:
                marks.append((self.length, exchange_all(self._peers, name, route, kv)))
            else:
                way = Way(self._peers, name, route, kv)
                for leg, come in enumerate(route.stages):
                    way.go(leg)
                    marks.append((come, way.arrived(leg)))
        arriving = _Arriving(self._peers, marks, result, kv)
        return arriving

    def release(self) -> None:
        """The keys and values gathered last have been read: everything that reads them has been issued."""
        assert self._reading is not None
        name, arriving = self._reading
        arriving.finish()
        self._peers.mark_read(name)

    def together(self, like_BTKH: torch.Tensor) -> bool:
        """Whether all keys come, and all gradients leave, at once: it is then no loss to compute all in one call."""
        push, (B, _, K, H) = self._push, like_BTKH.shape
        return not self._peers.in_stages(2 * B * max(push.lengths) * K * H * like_BTKH.element_size())

    def new_dkv(self, like_BTKH: torch.Tensor) -> list[torch.Tensor]:
        """Rooms for the dK and dV of the fetched tokens; nothing stands there yet, and what no call writes never leaves.

        Where calls may be one, rooms are equally long and lie in one buffer, so that one call can write into both: the
        first room, that of the queries that see most, behind the second, as these queries stand behind the others.
        """
        B, _, K, H = like_BTKH.shape
        how = {"dtype": self._dkv_dtype, "device": like_BTKH.device}
        ends = [max((at + b - a for pieces in room for at, a, b in pieces), default=0) for room in self._push.returns]
        if len(ends) == 1:
            return [torch.empty(2, B, self._push.length, K, H, **how)]
        if self.together(like_BTKH):
            return list(torch.empty(len(ends), 2, B, self._push.length, K, H, **how))[::-1]
        return [torch.empty(2, B, length, K, H, **how) for length in ends]

    def split(self, dkv: torch.Tensor) -> KV:
        """dK and dV, (B, push.length, K, H) each, of such a room."""
        return dkv[0], dkv[1]

    def leave(self, rooms: list[torch.Tensor], room: int) -> None:
        """What this room holds has been computed: where that is worth it, it travels already. `scatter` sends the rest."""
        if self._peers.in_stages(rooms[room].numel() * rooms[room].element_size()):
            if self._leaving is None:
                name, route, planes = self._home(rooms)
                self._leaving = Way(self._peers, name, route, planes, clear=self._push.sums is None)
            self._leaving.go(room, beside=True)

    def scatter(self, rooms: list[torch.Tensor]) -> Pending[KV]:
        """Bring the gradients home: returns dk, dv (B, T, K, H), summed over rooms and ranks, in `dkv_dtype`.

        Counted as one reduce-scatter whose payload is what this rank has for all ranks, itself included.
        """
        leaving, self._leaving = self._leaving, None
        name, route, planes = self._home(rooms) if leaving is None else (leaving.name, leaving.route, ())
        with waiting_inside():
            if leaving is None:
                mark = exchange_all(self._peers, name, route, planes, clear=self._push.sums is None)
            else:
                self._peers.follow()
                for room in range(len(rooms)):
                    leaving.go(room)
                mark = leaving.arrived(0)
        _, B, _, K, H = rooms[0].shape
        T = self._push.local_len

        def result() -> KV:
            self._peers.reach("read", aside=False)
            total = rooms[0].new_empty(2, B, T, K, H)
            for a, b, slots in route.sums:
                _sum_slots(total[:, :, a:b], slots)
            self._peers.mark_read(name)
            return total[0], total[1]

        return _Arriving(self._peers, [(T, mark)], result, rooms)

    def _home(self, rooms: list[torch.Tensor]) -> tuple[str, Route, list[torch.Tensor]]:
        """Tells of the call; the buffer's name, the route and the planes of these rooms' gradients."""
        name = f"dkv{self._sent % self._depth}"
        self._sent += 1
        _, B, _, K, H = rooms[0].shape
        route = self._route(name, self._dkv_route, (B, K, H), self._dkv_dtype)
        record("reduce_scatter", "dkv", route.counted)
        return name, route, [plane for room in rooms for plane in room.unbind()]

    # -- how both travel ---------------------------------------------------------------------------------------------

    def _route(self, name: str, make: Callable[..., Route], shape: tuple[int, ...], dtype: torch.dtype) -> Route:
        """The route of this transfer, made once for all calls of one cut, shape and dtype."""
        routes, key = self._peers.routes, (name, id(self._push), shape, dtype, self._peers.staged_bytes)
        if key not in routes:
            # the plan is kept with it: its identity stands for it
            routes[key] = make(name, *shape, dtype), self._push
            if len(routes) > MOST_ROUTES:  # documents make another plan of every batch
                del routes[next(iter(routes))]
        return routes[key][0]

    def _kv_route(self, name: str, B: int, K: int, H: int, dtype: torch.dtype) -> Route:
        push, me = self._push, self._peers.rank
        buffers = _typed(self._peers, name, [(2, B, length, K, H) for length in push.lengths], dtype)
        longest = max(2 * B * length * K * H * dtype.itemsize for length in push.lengths)
        staged = self._peers.in_stages(longest) and any(f < n for f, n in zip(push.firsts, push.lengths, strict=True))

        def copies(peer: int, start: int, stop: int) -> list[Copy]:
            """This rank's part of places [start, stop) of a peer's buffer."""
            cut = [(a + max(start - at, 0), min(b, a + stop - at), max(at, start)) for a, b, at in push.sends[peer]]
            return [
                Copy(buffers[peer][plane, row, at : at + b - a], plane, row, a, b)
                for a, b, at in cut if a < b for plane in range(2) for row in range(B)
            ]  # fmt: skip

        ends = zip(push.firsts, push.lengths, strict=True)
        edges = [[0, first, length] if staged else [0, length] for first, length in ends]
        legs = tuple(
            Leg(
                tuple(copies(me, 0, push.length)) if i == 0 else (),
                tuple(c for peer in _others(self._peers) for c in copies(peer, *edges[peer][i : i + 2])),
            )
            for i in range(2 if staged else 1)
        )
        return Route(buffers[me], legs, buffers[me], tuple(edges[me][1:]))

    def _dkv_route(self, name: str, B: int, K: int, H: int, dtype: torch.dtype) -> Route:
        push, me, size = self._push, self._peers.rank, self._peers.size
        buffers = _typed(self._peers, name, [(push.n_slots, 2, B, push.local_len, K, H)] * size, dtype)

        def copies(room: int, peer: int) -> list[Copy]:
            return [
                Copy(buffers[peer][push.slots[room], plane, row, a:b], 2 * room + plane, row, at, at + b - a)
                for at, a, b in push.returns[room][peer] for plane in range(2) for row in range(B)
            ]  # fmt: skip

        legs = tuple(
            Leg(tuple(copies(room, me)), tuple(c for peer in _others(self._peers) for c in copies(room, peer)))
            for room in range(len(push.slots))
        )
        tokens = sum(b - a for room in push.returns for pieces in room for _, a, b in pieces)
        # where the senders of a token are not neighbours, absent ones are summed as zeros
        sums = push.sums or ((0, push.local_len, 0, push.n_slots),)
        return Route(
            buffers[me], legs, torch.empty(2, B, tokens, K, H, dtype=dtype, device="meta"),
            sums=tuple((a, b, buffers[me][first:end, :, :, a:b]) for a, b, first, end in sums),
        )  # fmt: skip


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
