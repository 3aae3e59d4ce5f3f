"""How keys and values reach the ranks that see them, and their gradients come home: the table, and the choice.

A transport serves one attention call. Its user gathers, computes, releases, and scatters, one head chunk after another;
the next gather and the last scatter may be under way meanwhile, never two scatters.
"""

from __future__ import annotations

from typing import Protocol

import torch

from lss.comm.collectives import KV, Communicator, Pending, split_kv
from lss.comm.symmetric import SymmetricTransport
from lss.config.errors import refuse
from lss.segment import Fetch, LocalRun, Mask, Segment, plan_all, plan_fetch, plan_push

TRANSPORTS = ("auto", "collective", "symmetric")
DKV_DTYPES = ("auto", "float32", "inputs")


class Transport(Protocol):
    """What every transport offers.

    Attributes:
        runs: where the fetched tokens lie in the tensors that `gather` gives.
        length: how many tokens those tensors have, L.
        volatile: whether those tensors are overwritten by later gathers, so that who keeps them must copy them.
    """

    runs: tuple[LocalRun, ...]
    length: int
    volatile: bool

    def gather(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> Pending[KV]:
        """Fetch keys and values, (B, L, K, H) each."""
        ...

    def release(self) -> None:
        """The tensors that were waited for last have been read."""
        ...

    def together(self, like_BTKH: torch.Tensor) -> bool:
        """Whether all keys like these come at once, and their gradients go at once from rooms in one buffer."""
        ...

    def new_dkv(self, like_BTKH: torch.Tensor) -> list[torch.Tensor]:
        """Uninitialised rooms for dK and dV of all fetched tokens; one, or as many as `Schedule.rooms`."""
        ...

    def split(self, dkv: torch.Tensor) -> KV:
        """dK and dV, (B, L, K, H) each, of a room."""
        ...

    def leave(self, rooms: list[torch.Tensor], room: int) -> None:
        """One of several rooms has been computed, while others have not: it may leave before `scatter`."""
        ...

    def scatter(self, rooms: list[torch.Tensor]) -> Pending[KV]:
        """Bring home what has been computed into such rooms: dk, dv (B, T, K, H), summed over rooms and ranks."""
        ...


class _AtOnce:
    """What transports with one room have in common: nothing leaves early."""

    def together(self, like_BTKH: torch.Tensor) -> bool:
        return False

    def leave(self, rooms: list[torch.Tensor], room: int) -> None:
        pass


class CollectiveTransport(_AtOnce):
    """One all-gather and one reduce-scatter, or two all-to-alls of only what is seen; the plain twin of all others.

    A gather comes in the order of the ranks: where that is not the sequence's, it is reordered by a copy, and dK and dV
    before their scatter by another.
    """

    volatile = False

    def __init__(self, comm: Communicator, keys: Segment, fetch: Fetch | None, dkv_dtype: torch.dtype) -> None:
        self._comm, self._keys, self._fetch, self._dkv_dtype = comm, keys, fetch, dkv_dtype
        self.runs = keys.alone().local_runs if fetch is None else fetch.runs
        self.length = keys.padded_len if fetch is None else fetch.length

    def gather(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> Pending[KV]:
        if self._fetch is not None:
            return self._comm.exchange_kv(k_BTKH, v_BTKH, self._fetch)
        pending, keys = self._comm.all_gather_kv(k_BTKH, v_BTKH), self._keys
        in_sequence = keys.orders(self._comm.arrival)[0]

        def result() -> KV:
            k, v = pending.wait()
            return keys.reorder(k, 1, in_sequence), keys.reorder(v, 1, in_sequence)

        return Pending((), result)

    def release(self) -> None:
        pass

    def new_dkv(self, like_BTKH: torch.Tensor) -> list[torch.Tensor]:
        B, _, K, H = like_BTKH.shape
        return [torch.empty(self.length, 2, B, K, H, dtype=self._dkv_dtype, device=like_BTKH.device)]

    def split(self, dkv: torch.Tensor) -> KV:
        return split_kv(dkv)

    def scatter(self, rooms: list[torch.Tensor]) -> Pending[KV]:
        (dkv,) = rooms
        if self._fetch is not None:
            return self._comm.return_dkv(dkv, self._fetch)
        return self._comm.reduce_scatter_dkv(self._keys.reorder(dkv, 0, self._keys.orders(self._comm.arrival)[1]))


class LocalTransport(_AtOnce):
    """Keys that this rank holds whole already: nothing travels, and dK, dV are its share of a sum over ranks."""

    volatile = False

    def __init__(self, keys: Segment, dkv_dtype: torch.dtype) -> None:
        self.runs = keys.alone().local_runs
        self.length, self._dkv_dtype = keys.padded_len, dkv_dtype

    def gather(self, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> Pending[KV]:
        return Pending((), lambda: (k_BTKH, v_BTKH))

    def release(self) -> None:
        pass

    def new_dkv(self, like_BTKH: torch.Tensor) -> list[torch.Tensor]:
        B, _, K, H = like_BTKH.shape
        return [torch.empty(2, B, self.length, K, H, dtype=self._dkv_dtype, device=like_BTKH.device)]

    def split(self, dkv: torch.Tensor) -> KV:
        return dkv[0], dkv[1]

    def scatter(self, rooms: list[torch.Tensor]) -> Pending[KV]:
        (dkv,) = rooms
        return Pending((), lambda: self.split(dkv))


def make_transport(
    name: str,
    comm: Communicator,
    queries: Segment,
    keys: Segment,
    masks: tuple[Mask, ...],
    k_BTKH: torch.Tensor,
    *,
    dkv_dtype: str,
    head_chunks: int,
    placed: bool = True,
    summed: bool = True,
) -> Transport:
    """The transport of one attention call.

    Args:
        name: "collective" or "symmetric"; "auto" is symmetric on GPUs that reach one another's memory, else collective.
        masks: of the whole sequence, which every rank plans by.
        dkv_dtype: what dK and dV of half precision travel in: "float32", or "inputs", their own dtype. "auto" is "inputs"
            where nothing is added in it: on GPUs, with symmetric transport and calls that write apart, all sums are the
            owner's, in float32. Else it is float32.
        placed: as in `lss.segment.make_blocks`.
        summed: whether several calls of this rank see the same key.

    Raises:
        Refused: an unknown name, or "symmetric" where ranks do not reach one another's memory.
    """
    for setting, value, choices in (("transport", name, TRANSPORTS), ("dkv_dtype", dkv_dtype, DKV_DTYPES)):
        if value not in choices:
            raise refuse(setting, value, f"unknown; use one of {', '.join(choices)}")
    wide = torch.promote_types(k_BTKH.dtype, torch.float32)
    if comm.size == 1 or keys.cp == 1:
        return LocalTransport(keys, k_BTKH.dtype if dkv_dtype == "inputs" or not summed else wide)
    peers = comm.peers(k_BTKH.device) if name == "symmetric" or (name == "auto" and k_BTKH.is_cuda) else None
    if name == "symmetric" and peers is None:
        fit = "the ranks of the cp group do not reach one another's memory; use 'auto' or 'collective'"
        raise refuse("transport", name, fit)
    if peers is not None:
        apart = plan_all(queries, keys, masks, placed).apart
        # kernels on GPUs round each call's gradients to half precision anyway; those on the CPU do not
        narrow = dkv_dtype == "inputs" or (dkv_dtype == "auto" and apart and k_BTKH.is_cuda)
        dtype = k_BTKH.dtype if narrow else wide
        # float32 sums lose nothing that counts, and one room is half the memory
        push = plan_push(queries, keys, masks, placed, narrow and (dtype != wide or dkv_dtype == "inputs"))
        return SymmetricTransport(peers, push, depth=min(head_chunks, 2), dkv_dtype=dtype)
    fetch = plan_fetch(queries, keys, masks)
    return CollectiveTransport(comm, keys, fetch, k_BTKH.dtype if dkv_dtype == "inputs" else wide)
