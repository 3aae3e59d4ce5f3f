"""What the ranks read and write of one another's buffers, and between which barriers: races are found without any delay.

A rank's accesses between two barriers may meet those of all others between the same two, however rarely they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lss.comm.peers import PeerMemory

# (how many barriers came before, name of the buffer, rank that it belongs to, whether it is written) -> its bytes
Accesses = dict[tuple[int, str, int, bool], torch.Tensor]


class Recorded(TorchDispatchMode):
    """Within it every access of the CPU's operators to the buffers that there are is kept, element by element."""

    def __init__(self, peers: PeerMemory) -> None:
        super().__init__()
        self.accesses: Accesses = {}
        self.barriers = 0
        self._peers, self._barrier = peers, peers.barrier
        self._buffers = {
            view.untyped_storage().data_ptr(): (name, owner)
            for name, (_, views) in peers._buffers.items()
            for owner, view in enumerate(views)
        }

    def __enter__(self):
        def barrier(step: str) -> None:
            self._barrier(step)
            self.barriers += 1

        self._peers.barrier = barrier
        return super().__enter__()

    def __exit__(self, *error):
        self._peers.barrier = self._barrier
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for number, argument in enumerate(() if func.is_view else func._schema.arguments):
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(given):
                if isinstance(x, torch.Tensor):
                    self._keep(x, written)
        return func(*args, **kwargs)

    def _keep(self, x: torch.Tensor, written: bool) -> None:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._buffers:
            return
        elements = torch.arange(len(storage) // x.itemsize).as_strided(x.shape, x.stride(), x.storage_offset())
        key = (self.barriers, *self._buffers[storage.data_ptr()], written)
        place = self.accesses.setdefault(key, torch.zeros(len(storage), dtype=torch.bool))
        place.view(-1, x.itemsize)[elements.flatten()] = True


def races(ranks: Sequence[Accesses]) -> list[str]:
    """Every buffer that one rank writes while another may read or write the same bytes."""
    found = []
    for writer, mine in enumerate(ranks):
        for (barriers, name, owner, written), place in mine.items():
            for other, theirs in enumerate(ranks):
                for theirs_written in (False, True) if written and other != writer else ():
                    seen = theirs.get((barriers, name, owner, theirs_written))
                    if seen is not None and bool((place & seen).any()):
                        how = "writes" if theirs_written else "reads"
                        found.append(f"{writer} writes {name} of {owner} after {barriers} barriers, and {other} {how} it")
    return found
