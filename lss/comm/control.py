"""Small numbers and texts that all ranks agree on, from host to host, beside what the devices send one another.

A verdict must not wait for a device, nor stand in line behind its transfers: it goes over a gloo group of its own. Each
purpose has its own group too, so that a thread that writes a checkpoint and the loop that trains never mix their calls.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lss.comm.collectives import Pending
from lss.comm.counter import record
from lss.comm.texts import pack, unpack
from lss.mesh import timeout_of

_KEPT = "_lss_controls"


class Control:
    """The ranks of a run, agreeing. Every call is made by all ranks, in the same order, from one thread at a time.

    Args:
        mesh: of all ranks; on a mesh of one rank nothing is sent.
        timeout: how long a call waits for the others; by default as long as the mesh's collectives.

    Collectives: making one makes a gloo group of all ranks, which all must do together.
    """

    def __init__(self, mesh: DeviceMesh, timeout: timedelta | None = None) -> None:
        self.size, self.rank = mesh.size(), mesh.get_rank()
        self._group = dist.new_group(backend="gloo", timeout=timeout or timeout_of(mesh)) if self.size > 1 else None

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest that any rank gave for each of these. Collectives: one all-reduce of so many int64."""
        if self._group is None:
            return values
        told = torch.tensor(values, dtype=torch.int64)
        record("all_reduce", "control", told)
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        Pending((work,), lambda: told).wait()
        return tuple(told.tolist())

    def gather(self, text: str) -> list[str]:
        """Every rank's text, by rank. Collectives: one all-reduce of one number, one all-gather of the longest text."""
        if self._group is None:
            return [text]
        raw = text.encode()
        (longest,) = self.largest(len(raw))
        mine = pack(raw, longest)
        gathered = mine.new_empty(self.size, len(mine))
        record("all_gather", "control", gathered)
        work = dist.all_gather(list(gathered.unbind(0)), mine, group=self._group, async_op=True)
        return unpack(Pending((work,), lambda: gathered.unbind(0)).wait())


def control(mesh: DeviceMesh, purpose: str) -> Control:
    """The mesh's `Control` for a purpose, such as "loop" or "save"; made at the first call, by all ranks together."""
    kept: dict[str, Control] | None = getattr(mesh, _KEPT, None)
    if kept is None:
        kept = {}
        object.__setattr__(mesh, _KEPT, kept)
    if purpose not in kept:
        kept[purpose] = Control(mesh)
    return kept[purpose]
