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
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lss.comm.collectives import KV, Pending
from lss.comm.counter import record
from lss.comm.peers import PeerMemory
from lss.segment import Push


class _Arrival:
    """What `Pending.wait` waits for: the mark of a transfer's last step."""

    def __init__(self, peers: PeerMemory, mark: Any) -> None:
        self._peers, self._mark = peers, mark

    def wait(self) -> None:
        self._peers.wait_for(self._mark)


class SymmetricTransport:
    """`Transport` over peer memory.

    Args:
        peers: the ranks' memory.
        push: which of this rank's tokens go where, and what comes back.
        depth: how many gathers may be under way or being read at a time.
        dkv_dtype: the dtype that dK and dV travel and are summed within a rank in; the sum over ranks is in float32.

    Memory: `depth` buffers of the fetched K and V, one of cp segments' dK and dV; they stay for the next call.
    """

    volatile = True  # the buffers are written again by the next gathers

    def __init__(self, peers: PeerMemory, push: Push, depth: int, dkv_dtype: torch.dtype) -> None:
        self.runs = push.runs
        self._peers, self._push, self._depth, self._dkv_dtype = peers, push, depth, dkv_dtype
        self._next = 0
        # marks of the last reads: of each buffer of keys, and of the slots that gradients come in
        self._read: dict[str, Any] = peers.__dict__.setdefault("read_marks", {})

    def gather(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> Pending[KV]:
        """Fetch the keys and values that this rank sees, (B, push.length, K, H), in sequence order.

        Counted as one all-gather whose payload is what this rank holds afterwards.
        """
        name = f"kv{self._next % self._depth}"
        self._next += 1
        B, _, K, H = k_BTKH.shape
        kv = k_BTKH.contiguous(), v_BTKH.contiguous()  # a slice of heads is gathered to be copied in long runs
        views = _typed(self._peers, name, [(2, B, length, K, H) for length in self._push.lengths], k_BTKH.dtype)
        mine = views[self._peers.rank]
        record("all_gather", "kv", mine)

        def copies() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for peer in _around(self._peers):
                for a, b, at in self._push.sends[peer]:
                    for plane, x in enumerate(kv):
                        for row in range(B):
                            yield views[peer][plane, row, at : at + b - a], x[row, a:b]

        arrival = self._transfer(name, copies())

        def result() -> KV:
            self._reading = name
            self._peers.pause("read")
            return mine[0], mine[1]

        return Pending((arrival,), result, kv)

    def release(self) -> None:
        """The keys and values gathered last have been read: everything that reads them has been issued."""
        self._read[self._reading] = self._peers.mark()

    def new_dkv(self, like_BTKH: torch.Tensor) -> torch.Tensor:
        """Room for the dK and dV of all fetched tokens; nothing stands there yet."""
        B, _, K, H = like_BTKH.shape
        return torch.empty(2, B, self._push.length, K, H, dtype=self._dkv_dtype, device=like_BTKH.device)

    def split(self, dkv: torch.Tensor) -> KV:
        """dK and dV, (B, push.length, K, H) each, of such a room."""
        return dkv[0], dkv[1]

    def scatter(self, dkv: torch.Tensor) -> Pending[KV]:
        """Bring the gradients home: returns dk, dv (B, T, K, H), summed over the ranks, in `dkv_dtype`.

        Counted as one reduce-scatter whose payload is what this rank has for all ranks, itself included.
        """
        name, push, rank = "dkv", self._push, self._peers.rank
        _, B, _, K, H = dkv.shape
        T = push.local_len
        views = _typed(self._peers, name, [(self._peers.size, 2, B, T, K, H)] * self._peers.size, dkv.dtype)
        mine = views[rank]
        record("reduce_scatter", "dkv", dkv)

        def copies() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for peer in _around(self._peers):
                for at, a, b in push.returns[peer]:
                    for plane in range(2):
                        for row in range(B):
                            yield views[peer][rank, plane, row, a:b], dkv[plane, row, at : at + b - a]

        # where the senders of a token are not neighbours, absent ones are summed as zeros
        arrival = self._transfer(name, copies(), clear=mine if push.sums is None else None)

        def result() -> KV:
            self._peers.pause("read")
            total = dkv.new_empty(2, B, T, K, H)
            for a, b, first, end in push.sums or ((0, T, 0, self._peers.size),):
                if first == end:
                    total[:, :, a:b].zero_()
                elif end - first == 1:
                    total[:, :, a:b].copy_(mine[first, :, :, a:b])
                elif end - first == 2:  # half precision is added in float32 inside, here and below
                    torch.add(mine[first, :, :, a:b], mine[first + 1, :, :, a:b], out=total[:, :, a:b])
                else:
                    torch.sum(mine[first:end, :, :, a:b], 0, out=total[:, :, a:b])
            self._read[name] = self._peers.mark()
            return total[0], total[1]

        return Pending((arrival,), result, dkv)

    def _transfer(
        self, name: str, copies: Iterator[tuple[torch.Tensor, torch.Tensor]], clear: torch.Tensor | None = None
    ) -> _Arrival:
        peers = self._peers
        peers.follow()
        with peers.transfers():
            peers.wait_for(self._read.get(name))
            if clear is not None:
                clear.zero_()
            peers.pause("free")
            peers.barrier()
            peers.pause("copy")
            for place, source in copies:
                place.copy_(source)
            peers.pause("arrived")
            peers.barrier()
            return _Arrival(peers, peers.mark())


def _around(peers: PeerMemory) -> Iterator[int]:
    """All ranks, the next one first and this one last, so that not all write to the same one at a time."""
    for step in range(1, peers.size + 1):
        yield (peers.rank + step) % peers.size


def _typed(
    peers: PeerMemory, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Each rank's buffer as a tensor of its shape; room for the largest on all of them."""
    counts = [torch.Size(shape).numel() for shape in shapes]
    buffers = peers.buffer(name, max(counts) * dtype.itemsize)
    return [
        buffer[: count * dtype.itemsize].view(dtype).view(shape)
        for buffer, count, shape in zip(buffers, counts, shapes, strict=True)
    ]
