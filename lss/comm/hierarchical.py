"""Groups of ranks that span nodes: keys and values enter a node once, then spread inside it; gradients leave likewise.

With n nodes of p ranks, a flat all-gather brings every rank's part to every rank over whatever lies between. In two
stages the ranks with equal place in their nodes gather across nodes, S / p tokens each, and the ranks of a node then
gather those inside it. Each byte crosses into a node once, over all of its ranks' links at the same time. The scatter of
gradients is the mirror image: sums inside the node first, so that a node sends one sum and not p parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lss.comm.collectives import KV, Communicator, Pending, _all_gather, _reduce_scatter, kept_with, split_kv
from lss.comm.counter import record
from lss.mesh import cp_ranks_per_node, cp_size, sub_group


class NodesCommunicator(Communicator):
    """A group of n nodes x p ranks, neighbours on one node, whose keys and values travel in two stages.

    All other collectives are those of the whole group.

    Args:
        group: the whole group.
        inside: the p ranks on this rank's node.
        across: the n ranks at this rank's place in their nodes.
    """

    def __init__(self, group: dist.ProcessGroup | None, inside: Communicator, across: Communicator) -> None:
        super().__init__(group)
        assert inside.size * across.size == self.size
        self.inside, self.across = inside, across
        # each stage concatenates: the outermost index is the last stage's, the place in the node
        self.arrival = tuple(node * inside.size + place for place in range(inside.size) for node in range(across.size))
        self._side: torch.cuda.Stream | None = None

    def all_gather_kv(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> Pending[KV]:
        """`Communicator.all_gather_kv` in two stages.

        Collectives: an all-gather across nodes of 2*B*(S/p)*K*H elements, then one inside of 2*B*S*K*H. Memory: both
        results and a staging copy of the local part.
        """
        kv_T2BKH = torch.stack((k_BTKH.transpose(0, 1), v_BTKH.transpose(0, 1)), dim=1)
        T, *rest = kv_T2BKH.shape
        # both on the caller's stream, whose kernels will read or reuse them
        crossed = kv_T2BKH.new_empty(self.across.size * T, *rest)
        kv_S2BKH = kv_T2BKH.new_empty(self.size * T, *rest)
        work = self._in_two_stages(
            partial(_gather, self.across, crossed, kv_T2BKH), partial(_gather, self.inside, kv_S2BKH, crossed)
        )
        return Pending((work,), lambda: split_kv(kv_S2BKH), (kv_T2BKH, crossed))

    def reduce_scatter_dkv(self, dkv_S2BKH: torch.Tensor) -> Pending[KV]:
        """`Communicator.reduce_scatter_dkv` in two stages.

        Collectives: a reduce-scatter inside the node of 2*B*S*K*H elements, then one across of 2*B*(S/p)*K*H.
        """
        S, *rest = dkv_S2BKH.shape
        summed = dkv_S2BKH.new_empty(S // self.inside.size, *rest)
        dkv_T2BKH = dkv_S2BKH.new_empty(S // self.size, *rest)
        work = self._in_two_stages(
            partial(_scatter, self.inside, summed, dkv_S2BKH), partial(_scatter, self.across, dkv_T2BKH, summed)
        )
        return Pending((work,), lambda: split_kv(dkv_T2BKH), (dkv_S2BKH, summed))

    def _in_two_stages(self, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
        """Issue the first stage, and the second behind it.

        On a GPU at once, from a stream that waits for the first, so that both run beside what the caller computes. On
        the CPU the second begins when the caller waits.
        """
        work = first()
        if dist.get_backend(self.group) != "nccl":
            return _Then(work, second)
        self._side = self._side or torch.cuda.Stream()
        with torch.cuda.stream(self._side):
            work.wait()
            return second()


class _Then:
    """A collective that can begin only when another has ended."""

    def __init__(self, first: Any, second: Callable[[], Any]) -> None:
        self._first, self._second = first, second

    def wait(self) -> None:
        self._first.wait()
        self._second().wait()


def _gather(comm: Communicator, out: torch.Tensor, part: torch.Tensor) -> Any:
    record("all_gather", "kv", out, comm.link)
    return _all_gather(out, part, group=comm.group, async_op=True)


def _scatter(comm: Communicator, part: torch.Tensor, whole: torch.Tensor) -> Any:
    record("reduce_scatter", "dkv", whole, comm.link)
    return _reduce_scatter(part, whole, group=comm.group, async_op=True)


def cp_communicator(mesh: DeviceMesh) -> Communicator:
    """The mesh's "cp" axis: in two stages where it spans nodes, and able to be cut into `levels`; one for all calls."""

    def make() -> Communicator:
        cp = cp_size(mesh)
        comm = _communicator(mesh, cp, 1)
        comm.per_node = cp_ranks_per_node(mesh)
        comm.cut = lambda inner: (_communicator(mesh, inner, 1), _communicator(mesh, cp // inner, inner))
        return comm

    return kept_with(mesh, ("cp",), make)


def _communicator(mesh: DeviceMesh, size: int, stride: int) -> Communicator:
    """The group of `size` cp ranks, each `stride` after the one before, that this rank is in."""
    group, per_node = sub_group(mesh, size, stride), cp_ranks_per_node(mesh)
    if per_node == cp_size(mesh):
        return Communicator(group)
    if per_node % (size * stride) == 0:
        return Communicator(group, "inside")
    if stride % per_node == 0:
        return Communicator(group, "across")
    if per_node % stride or size * stride % per_node:
        return Communicator(group)  # other numbers of its ranks on some nodes than on others
    places, nodes = per_node // stride, size * stride // per_node
    across = Communicator(sub_group(mesh, nodes, per_node), "across")
    return NodesCommunicator(group, Communicator(sub_group(mesh, places, stride), "inside"), across)
