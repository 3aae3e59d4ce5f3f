"""The collectives, over one process group: asynchronous, counted, and nothing at all on a group of one rank.

This is the only file that moves tensors between ranks. Each call returns a `Pending` whose `wait()` gives the result;
between the two the caller computes. Tensors handed in must not be written until `wait()` has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lss.comm.counter import issued, record
from lss.comm.peers import PeerMemory, open_peers
from lss.mesh import axis_group
from lss.segment import Fetch

# torch 2.13 renamed these two and warns about the old names, which are the only ones before it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

R = TypeVar("R")
KV = tuple[torch.Tensor, torch.Tensor]


class Pending(Generic[R]):
    """A collective under way. `wait()` returns its result, on a GPU by ordering the current stream behind it.

    Attributes:
        waiting: somebody is inside `wait()`, for the transfer itself; stays so where the transfer fails.
    """

    def __init__(self, works: Sequence[Any], result: Callable[[], R], keep: object = None) -> None:
        self._works = works
        self._result = result
        self._keep = keep  # the input must outlive the transfer
        self.waiting = False
        if works:
            issued(self)

    def begin(self) -> R:
        """The result, whose parts may not all have come: `upto` says which are read next. Here all have."""
        return self.wait()

    def upto(self, length: int) -> None:
        """Wait until the first `length` tokens of the result have come."""

    def wait(self) -> R:
        """Wait for the transfer and return the result."""
        self.waiting = bool(self._works)
        for work in self._works:
            work.wait()
        self.waiting, self._works = False, ()
        self._keep = None
        return self._result()


class Communicator:
    """The collectives of one process group, from the point of view of this rank.

    Args:
        group: the process group, or None for a group of one rank, where every call returns its input and issues nothing.
        link: "inside" or "across" nodes, for the counters; None where it is neither or nodes are not told apart.

    Attributes:
        arrival: the ranks in the order in which `all_gather_kv` lays out their parts and `reduce_scatter_dkv` takes them;
            None where that is 0, 1, 2, ...
        per_node: ranks of the group that share a node, as far as that is known; they are neighbours.
    """

    arrival: tuple[int, ...] | None = None

    def __init__(self, group: dist.ProcessGroup | None = None, link: str | None = None) -> None:
        alone = group is None or dist.get_world_size(group) == 1
        self.group = None if alone else group
        self.size = 1 if self.group is None else dist.get_world_size(self.group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.link = link
        self.per_node = self.size
        self.cut: Callable[[int], tuple[Communicator, Communicator]] | None = None
        self._levels: dict[int, tuple[Communicator, Communicator]] = {}
        self._peers: dict[str, PeerMemory | None] = {}

    def peers(self, device: torch.device) -> PeerMemory | None:
        """The ranks' memory as they reach one another's, or None where they do not; opened at the first call.

        Collective then: all ranks come here together, and get the same answer.
        """
        if self.group is None:
            return None
        if device.type not in self._peers:
            self._peers[device.type] = open_peers(self.group, device)
        return self._peers[device.type]

    def levels(self, inner: int) -> tuple[Communicator, Communicator]:
        """(this rank's group of `inner` neighbours, the ranks at its place in every such group), where `cut` makes them."""
        if self.cut is None:
            assert self.size == inner == 1, "only the groups of cp_communicator can be cut"
            return self, self
        if inner not in self._levels:
            self._levels[inner] = self.cut(inner)
        return self._levels[inner]

    # -- the two collectives of a layer ------------------------------------------------------------------------------

    def all_gather_kv(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> Pending[KV]:
        """Gather every rank's keys and values in one all-gather.

        Returns k and v of shape (B, cp*T, K, H), ranks in the order of `arrival`, as views of one buffer (tokens outermost,
        so that the ranks' parts lie behind one another for any batch and no copy follows).
        Collectives: one all-gather of 2*B*S*K*H elements. Memory: that buffer and a staging copy of the local part.
        """
        if self.group is None:
            return Pending((), lambda: (k_BTKH, v_BTKH))
        kv_T2BKH = torch.stack((k_BTKH.transpose(0, 1), v_BTKH.transpose(0, 1)), dim=1)
        kv_S2BKH = kv_T2BKH.new_empty(self.size * kv_T2BKH.shape[0], *kv_T2BKH.shape[1:])
        record("all_gather", "kv", kv_S2BKH, self.link)
        work = _all_gather(kv_S2BKH, kv_T2BKH, group=self.group, async_op=True)
        return Pending((work,), lambda: split_kv(kv_S2BKH), kv_T2BKH)

    def reduce_scatter_dkv(self, dkv_S2BKH: torch.Tensor) -> Pending[KV]:
        """Sum every rank's dK and dV and hand each rank its own tokens' part, in one reduce-scatter.

        Takes a buffer (cp*T, 2, B, K, H), ranks in the order of `arrival`. Returns dk and dv of shape (B, T, K, H).
        Collectives: one reduce-scatter of 2*B*S*K*H elements.
        """
        if self.group is None:
            return Pending((), lambda: split_kv(dkv_S2BKH))
        dkv_T2BKH = dkv_S2BKH.new_empty(dkv_S2BKH.shape[0] // self.size, *dkv_S2BKH.shape[1:])
        record("reduce_scatter", "dkv", dkv_S2BKH, self.link)
        work = _reduce_scatter(dkv_T2BKH, dkv_S2BKH, group=self.group, async_op=True)
        return Pending((work,), lambda: split_kv(dkv_T2BKH), dkv_S2BKH)

    # -- the same where no rank needs all keys --------------------------------------------------------------------------

    def exchange_kv(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, fetch: Fetch) -> Pending[KV]:
        """Fetch the keys and values that this rank's queries see, and no others, in one all-to-all.

        Returns k and v of shape (B, fetch.length, K, H), tokens in the order of the sequence (`fetch.runs` says which).
        Collectives: one all-to-all; its payload counted here is what this rank receives, its own part included.
        """
        kv_T2BKH = torch.stack((k_BTKH.transpose(0, 1), v_BTKH.transpose(0, 1)), dim=1)
        sent = torch.cat([kv_T2BKH[a:b] for runs in fetch.sends for a, b in runs] or [kv_T2BKH[:0]])
        received = kv_T2BKH.new_empty(fetch.length, *kv_T2BKH.shape[1:])
        record("all_to_all", "kv", received, self.link)
        sizes = [sum(b - a for a, b in runs) for runs in fetch.sends]
        work = dist.all_to_all_single(received, sent, list(fetch.counts), sizes, group=self.group, async_op=True)
        return Pending((work,), lambda: split_kv(_reordered(received, fetch)), sent)

    def return_dkv(self, dkv_S2BKH: torch.Tensor, fetch: Fetch) -> Pending[KV]:
        """The adjoint of `exchange_kv`: every rank's dK and dV go back to the tokens' owners, which add them up.

        Takes a buffer (L, 2, B, K, H), tokens as `exchange_kv` returned them; returns dk and dv (B, T, K, H).
        Collectives: one all-to-all; its payload counted here is what this rank sends, its own part included.
        """
        sent = dkv_S2BKH if fetch.sorted else torch.empty_like(dkv_S2BKH)
        at = 0
        for a, b in () if fetch.sorted else fetch.pieces:
            sent[a:b] = dkv_S2BKH[at : at + b - a]
            at += b - a
        sizes = [sum(b - a for a, b in runs) for runs in fetch.sends]
        received = dkv_S2BKH.new_empty(sum(sizes), *dkv_S2BKH.shape[1:])
        record("all_to_all", "dkv", sent, self.link)
        work = dist.all_to_all_single(received, sent, sizes, list(fetch.counts), group=self.group, async_op=True)

        def result() -> KV:
            total = received.new_zeros(fetch.local_len, *received.shape[1:])
            at = 0
            for a, b in (run for runs in fetch.sends for run in runs):
                total[a:b] += received[at : at + b - a]
                at += b - a
            return split_kv(total)

        return Pending((work,), result, sent)

    # -- the rivals' collectives -------------------------------------------------------------------------------------

    def all_gather(self, x: torch.Tensor, dim: int, purpose: str) -> Pending[torch.Tensor]:
        """Concatenate every rank's `x` along `dim`, in rank order."""
        if self.group is None:
            return Pending((), lambda: x)
        local = x.movedim(dim, 0).contiguous()
        gathered = local.new_empty(self.size * local.shape[0], *local.shape[1:])
        record("all_gather", purpose, gathered, self.link)
        work = _all_gather(gathered, local, group=self.group, async_op=True)
        return Pending((work,), lambda: gathered.movedim(0, dim), local)

    def reduce_scatter(self, x: torch.Tensor, dim: int, purpose: str) -> Pending[torch.Tensor]:
        """Sum every rank's `x`, cut the sum along `dim` in rank order and return this rank's part."""
        if self.group is None:
            return Pending((), lambda: x)
        whole = x.movedim(dim, 0).contiguous()
        part = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
        record("reduce_scatter", purpose, whole, self.link)
        work = _reduce_scatter(part, whole, group=self.group, async_op=True)
        return Pending((work,), lambda: part.movedim(0, dim), whole)

    def all_to_all(self, parts: Sequence[torch.Tensor], sizes: Sequence[int], purpose: str) -> Pending[list[torch.Tensor]]:
        """Send `parts[d]` to rank d; return what each rank sent here, flat, `sizes[s]` elements from rank s."""
        if self.group is None:
            return Pending((), lambda: [parts[0].reshape(-1)])
        sent = torch.cat([part.reshape(-1) for part in parts])
        received = sent.new_empty(sum(sizes))
        record("all_to_all", purpose, sent, self.link)
        work = dist.all_to_all_single(
            received, sent, list(sizes), [part.numel() for part in parts], group=self.group, async_op=True
        )
        return Pending((work,), lambda: list(received.split(list(sizes))), sent)

    def shift(self, x: torch.Tensor, purpose: str) -> Pending[torch.Tensor]:
        """Send `x` to the next rank of the ring and return what the previous one sent."""
        if self.group is None:
            return Pending((), lambda: x)
        x = x.contiguous()
        received = torch.empty_like(x)
        # peers are named by their global rank, which is not their rank in this group
        to = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        source = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        record("send_recv", purpose, x, self.link)
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, to, self.group), dist.P2POp(dist.irecv, received, source, self.group)]
        )
        return Pending(works, lambda: received, x)

    # -- sums and copies ---------------------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor, purpose: str) -> Pending[torch.Tensor]:
        """Sum `x` over the ranks, in place."""
        if self.group is None:
            return Pending((), lambda: x)
        record("all_reduce", purpose, x, self.link)
        work = dist.all_reduce(x, group=self.group, async_op=True)
        return Pending((work,), lambda: x)

    def all_reduce_max(self, x: torch.Tensor, purpose: str) -> Pending[torch.Tensor]:
        """The largest of every element of `x` over the ranks, in place."""
        if self.group is None:
            return Pending((), lambda: x)
        record("all_reduce", purpose, x)
        work = dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return Pending((work,), lambda: x)

    def broadcast(self, x: torch.Tensor, purpose: str) -> Pending[torch.Tensor]:
        """Copy the first rank's `x` to every rank, in place."""
        if self.group is None:
            return Pending((), lambda: x)
        record("broadcast", purpose, x, self.link)
        work = dist.broadcast(x, dist.get_global_rank(self.group, 0), group=self.group, async_op=True)
        return Pending((work,), lambda: x)


def communicator(mesh: DeviceMesh, axes: Sequence[str]) -> Communicator:
    """The communicator over these axes of a mesh, but for "cp" alone, which is `cp_communicator`'s."""
    return kept_with(mesh, tuple(axes), lambda: Communicator(axis_group(mesh, axes)))


def kept_with(mesh: DeviceMesh, axes: tuple[str, ...], make: Callable[[], Communicator]) -> Communicator:
    """One communicator for all calls on a mesh, kept with it: memory that ranks share is opened once."""
    opened: dict[tuple[str, ...], Communicator] | None = getattr(mesh, "_lss_communicators", None)
    if opened is None:
        opened = {}
        object.__setattr__(mesh, "_lss_communicators", opened)
    if axes not in opened:
        opened[axes] = make()
    return opened[axes]


def _reordered(received: torch.Tensor, fetch: Fetch) -> torch.Tensor:
    """What came in the order of the ranks, in the order of the sequence; no copy where the two agree."""
    return received if fetch.sorted else torch.cat([received[a:b] for a, b in fetch.pieces])


def split_kv(kv_T2BKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a fused buffer (T, 2, B, K, H) as k and v of shape (B, T, K, H)."""
    return kv_T2BKH[:, 0].transpose(0, 1), kv_T2BKH[:, 1].transpose(0, 1)
