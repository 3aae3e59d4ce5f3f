"""What autograd saves, sent away and brought back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lss.offload.host import Slot, Tier

# Smaller tensors stay: a copy costs a launch, and there is little to win.
LEAST_BYTES = 1 << 20
# A layer that is larger comes back only at the last use of the one after it, whose projections are still to be computed.
EARLY_BYTES = 1 << 31
# And one that is larger than this when it is asked for. The copy then stands alone, but copies grow with the sequence and
# attention with its square: 8 GiB take 0.2 s where attention's backward takes ten.
LATE_BYTES = 1 << 32


class Kept:
    """A tensor that was saved: where its bytes are, how often they will be asked for, and in which group it was saved."""

    def __init__(self, slot: Slot, like: torch.Tensor, group: int) -> None:
        self.slot: Slot | None = slot
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.nbytes = like.numel() * like.element_size()
        self.group, self.uses = group, 1
        self.back: torch.Tensor | None = None
        self.waiting = False

    def __del__(self) -> None:
        self.release()

    def begin(self) -> None:
        """Set it on its way back, if it is not already."""
        if self.back is None and self.slot is not None:
            self.back, self.waiting = torch.empty(self.shape, dtype=self.dtype, device=self.device), True
            self.slot.fetch(self.back)

    def hand_out(self) -> torch.Tensor:
        """The tensor; at its last use the room is given back."""
        assert self.slot is not None
        assert self.back is not None
        if self.waiting:
            self.slot.wait()
            self.waiting = False
        x, self.uses = self.back, self.uses - 1
        if not self.uses:
            self.release()
        return x

    def release(self) -> None:
        """Give the room back."""
        slot, self.slot, self.back = self.slot, None, None
        if slot is not None:
            slot.free()


@dataclass
class Tally:
    """Bytes of what was saved since the last backward: `away` from the device, and `here` where no tier had room."""

    away: int = 0
    here: int = 0


class Offloader:
    """Puts what autograd saves into tiers, and brings it back ahead of backward.

    Args:
        tiers: tried in order for each tensor.
        least_bytes: smaller tensors stay on the device.
        early_bytes, late_bytes: groups of more are set on their way at the last use of the group saved after them, smaller
            ones at its first; of more than `late_bytes` when they are asked for, so that no two are on the device together.

    Attributes:
        tally: bytes of the last forward pass.
        again: blocks of it that compute their attention again, since there is no room for its output.
    """

    def __init__(
        self, tiers: Sequence[Tier], least_bytes: int = LEAST_BYTES, early_bytes: int = EARLY_BYTES,
        late_bytes: int = LATE_BYTES,
    ) -> None:  # fmt: skip
        self.tiers, self.least_bytes, self.tally = tiers, least_bytes, Tally()
        self.early_bytes, self.late_bytes = early_bytes, late_bytes
        self.again = 0
        self._order: list[weakref.ref[Kept]] = []  # as saved; backward asks from the end
        self._known: dict[tuple, tuple[StorageWeakRef, weakref.ref[Kept]]] = {}
        self._group = 0

    @property
    def room(self) -> int | None:
        """Bytes that all tiers may take together; None where one has no bound of its own."""
        limits = [tier.limit for tier in self.tiers]
        return None if None in limits else sum(limit for limit in limits if limit is not None)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """What autograd saves inside is kept by `keep` and found again by `restore`."""
        with torch.autograd.graph.saved_tensors_hooks(self.keep, self.restore):
            yield

    def next_group(self) -> None:
        """What is saved from here on is brought back together, while the group saved after it is in use: a layer."""
        self._group += 1

    def keep(self, x: torch.Tensor) -> Kept | torch.Tensor:
        """Send a saved tensor away, or keep it where it is small, no whole piece of memory, or finds no room."""
        nbytes = x.numel() * x.element_size()
        if nbytes < self.least_bytes or isinstance(x, torch.nn.Parameter) or not x.is_contiguous():
            return x.detach()
        x = x.detach()
        key = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.dtype, x._version)
        storage, known = self._known.get(key, (None, None))
        kept = None if known is None else known()
        same = storage is not None and not storage.expired()  # the memory has not been another tensor's since
        if same and kept is not None and kept.back is None and kept.slot is not None:
            kept.uses += 1
            return kept
        slot = next((slot for tier in self.tiers if (slot := tier.take(nbytes)) is not None), None)
        self._count(nbytes, away=slot is not None)
        if slot is None:
            return x
        slot.store(x)
        kept = Kept(slot, x, self._group)
        self._known[key] = StorageWeakRef(x.untyped_storage()), weakref.ref(kept)
        self._order.append(weakref.ref(kept))
        return kept

    def restore(self, kept: Kept | torch.Tensor) -> torch.Tensor:
        """The tensor again; those of its group and of the one saved before are set on their way.

        Raises:
            RuntimeError: it has been asked for as often as it was saved: a second backward through one graph.
        """
        if isinstance(kept, torch.Tensor):
            return kept
        if kept.slot is None:
            raise RuntimeError("backward() went through one graph twice, and what it saved was given up after the first.")
        kept.begin()
        alive = [k for ref in self._order if (k := ref()) is not None and k.slot is not None]
        before = max((k.group for k in alive if k.group < kept.group), default=kept.group)
        nbytes = sum(k.nbytes for k in alive if k.group == before)
        early, late = nbytes <= self.early_bytes, nbytes <= self.late_bytes
        _begin(alive, before if early else kept.group, kept.group)
        x = kept.hand_out()
        alive = [k for k in alive if k.slot is not None]
        if late and not early and all(k.group != kept.group for k in alive):
            _begin(alive, before, before)
        self._order = [weakref.ref(k) for k in alive]
        if not self._order:
            self._known.clear()
        return x

    def _count(self, nbytes: int, *, away: bool) -> None:
        if not self._order:
            self.tally = Tally()
        if away:
            self.tally.away += nbytes
        else:
            self.tally.here += nbytes


def _begin(kept: Sequence[Kept], first: int, last: int) -> None:
    """Set on their way, the last saved first, those of these groups."""
    for one in reversed(kept):
        if first <= one.group <= last:
            one.begin()
