"""The mesh of ranks, dp x cp, the process groups behind it, and which of its ranks share a node."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from lss.config.errors import Refused, refuse
from lss.environment import rank_environment
from lss.hosts import interface_towards, is_loopback
from lss.meeting import RENDEZVOUS, first_to_say, meet


def world_size() -> int:
    """Ranks of this run: of the process group where one exists, else of the launcher, else 1."""
    if dist.is_initialized():
        return dist.get_world_size()
    environment = rank_environment()
    return environment.world_size if environment else 1


def pick_device_type(local_world_size: int = 1) -> str:
    """"cuda" where this host has a GPU for each of its ranks, else "cpu"."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_world_size else "cpu"


def _init_process_group(device_type: str | None, timeout: timedelta, rendezvous: timedelta) -> tuple[str, dist.Store | None]:
    """Returns the device type, and the store that the ranks met through."""
    environment = rank_environment()
    if device_type == "cuda" and not torch.cuda.is_available():
        raise refuse("device_type", '"cuda"', 'torch sees no GPU here; use "cpu", or a build and a driver for the GPU')
    device_type = device_type or pick_device_type(environment.local_world_size if environment else 1)
    backend = "nccl" if device_type == "cuda" else "gloo"
    if environment is None:
        # one rank talks to nobody: an in-process store, no port
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return device_type, None
    if device_type == "cuda":
        torch.cuda.set_device(environment.local_rank)
    # both would announce the address that the host's name stands for, often its loopback, and need not resolve at all
    interface = interface_towards(environment.address, environment.local_world_size < environment.world_size)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if is_loopback(environment.address):  # between hosts NCCL finds its own way, which may be a faster one
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    place = environment.place()
    store = meet(place, rendezvous)
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            backend, store=store, rank=environment.rank, world_size=environment.world_size, timeout=timeout
        )
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise Refused(
            f"{place}: rank {environment.rank} of {environment.world_size} could not join the others there ({reason})."
        ) from error
    return device_type, store


def first_to_refuse(mesh: DeviceMesh, text: str) -> bool:
    """Whether this rank is the first of the run to refuse with this sentence, and so is to tell it."""
    store, environment = _places(mesh).store, rank_environment()
    return store is None or environment is None or first_to_say(store, environment.place(), text)


def init_mesh(
    cp: int = 1,
    dp: int = 1,
    *,
    device_type: str | None = None,
    timeout: timedelta = timedelta(minutes=10),
    rendezvous: timedelta = RENDEZVOUS,
    ranks_per_node: int | None = None,
) -> DeviceMesh:
    """Make the mesh of dp x cp ranks, starting torch's process group where there is none yet.

    Ranks of one cp group are neighbours: rank = dp_index * cp + cp_index. Works under torchrun, srun and mpirun, and
    alone, as one rank.

    Args:
        cp: ranks that share one sequence.
        dp: groups that take different sequences.
        device_type: "cuda" (NCCL) or "cpu" (gloo); by default CUDA where the host has a GPU for each of its ranks.
        timeout: after which a collective that not all ranks reach is given up, in every group of the mesh.
        rendezvous: how long ranks wait for one another here.
        ranks_per_node: neighbours that share a host, which matters where a cp group spans several: keys and values then
            enter a host once. By default what the launcher says (LOCAL_WORLD_SIZE and its like), if it starts equally
            many neighbours on each host; otherwise all ranks count as one host's.

    Returns:
        A torch `DeviceMesh` with axes "dp" and "cp".

    Raises:
        Refused: the number of running ranks is not dp * cp, a launcher's variables are missing or wrong, not all ranks
            came in time, or a `ranks_per_node` of which a cp group would have unequal parts.

    Collectives: where `ranks_per_node` is not given, one all-gather of two numbers.
    """
    for name, value in (("cp", cp), ("dp", dp), ("ranks_per_node", 1 if ranks_per_node is None else ranks_per_node)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise refuse(name, value, "give a whole number of ranks, 1 or more")
    ranks = world_size()
    if cp * dp != ranks:
        raise Refused(
            f"cp={cp} x dp={dp} needs {cp * dp} ranks and {ranks} {'is' if ranks == 1 else 'are'} running: "
            f"start {cp * dp}, or choose cp and dp whose product is {ranks}."
        )
    store = None
    if dist.is_initialized():
        device_type = device_type or ("cuda" if dist.get_backend() == "nccl" else "cpu")
    else:
        device_type, store = _init_process_group(device_type, timeout, rendezvous)
    if ranks_per_node is not None and cp % ranks_per_node and ranks_per_node % cp:
        raise refuse("ranks_per_node", ranks_per_node, f"give a number that divides cp={cp}, or that cp divides")
    mesh = init_device_mesh(device_type, (dp, cp), mesh_dim_names=("dp", "cp"))
    rows = [list(range(first, first + cp)) for first in range(0, ranks, cp)]
    for axis in ("dp", "cp"):
        _limit(mesh.get_group(axis), timeout)
    setattr(mesh, _PLACES, _Places(ranks_per_node or _launched_per_node(device_type), rows, timeout, store=store))
    return mesh


def _limit(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Give a group its timeout: torch makes groups with its own, 10 to 30 minutes, whatever the first group's is."""
    if group is not dist.group.WORLD and dist.get_backend(group) in ("gloo", "nccl"):
        _set_pg_timeout(timeout, group)


# What is known of a mesh besides its axes is an attribute of it, and ends with it.
_PLACES = "_lss_places"


@dataclass
class _Places:
    """`per_node`: neighbours that share a node; `rows`: the ranks of each cp group; `timeout`: of every group of the mesh,
    where known; `groups`: the sub-groups of the cp axis made so far, by size and stride; `store`: what the ranks met
    through."""

    per_node: int
    rows: list[list[int]] | None = None
    timeout: timedelta | None = None
    groups: dict[tuple[int, int], dist.ProcessGroup] = field(default_factory=dict)
    store: dist.Store | None = None


def _places(mesh: DeviceMesh) -> _Places:
    if not hasattr(mesh, _PLACES):  # not made by init_mesh: its nodes are not known
        setattr(mesh, _PLACES, _Places(dist.get_world_size()))
    return getattr(mesh, _PLACES)


def _launched_per_node(device_type: str) -> int:
    """Ranks that the launcher started on each host; all of them where it says nothing, or hosts are not alike."""
    try:
        environment = rank_environment()
    except Refused:  # variables that are left over: torch's process group was started without them
        environment = None
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return 1
    mine = (rank, world) if environment is None else (environment.local_rank, environment.local_world_size)
    # every rank must come to the same answer, whatever its own host is like
    told = torch.zeros(world, 2, dtype=torch.int64, device=device_type)
    dist.all_gather(list(told.unbind(0)), torch.tensor(mine, dtype=torch.int64, device=device_type))
    return same_everywhere([(int(place), int(count)) for place, count in told.tolist()])


def same_everywhere(told: Sequence[tuple[int, int]]) -> int:
    """Ranks per node, from each rank's (place on its node, ranks on its node); all ranks where nodes are not alike."""
    world, count = len(told), told[0][1]
    alike = 0 < count <= world and world % count == 0
    return count if alike and all(pair == (rank % count, count) for rank, pair in enumerate(told)) else world


def cp_size(mesh: DeviceMesh) -> int:
    """Ranks that share a sequence."""
    return mesh["cp"].size()


def ranks_per_node(mesh: DeviceMesh) -> int:
    """How many ranks share a node; all of them where that is not known, or nodes are not alike."""
    return _places(mesh).per_node


def timeout_of(mesh: DeviceMesh) -> timedelta | None:
    """What `init_mesh` was given for every group of the mesh; None where it was not made by it."""
    return _places(mesh).timeout


def cp_ranks_per_node(mesh: DeviceMesh) -> int:
    """How many ranks of a cp group share a node; all where they lie on one, or unequally on several."""
    cp, per_node = cp_size(mesh), _places(mesh).per_node
    return per_node if per_node < cp and cp % per_node == 0 else cp


def rank_groups(ranks: Sequence[Sequence[int]], size: int, stride: int) -> list[list[int]]:
    """Each row cut into groups of `size` ranks, each `stride` after the one before."""
    block = size * stride
    return [
        list(row[start + offset : start + block : stride])
        for row in ranks
        for start in range(0, len(row), block)
        for offset in range(stride)
    ]


def sub_group(mesh: DeviceMesh, size: int, stride: int) -> dist.ProcessGroup | None:
    """The group of `size` cp ranks, each `stride` after the one before, that this rank is in; None for one rank.

    size * stride divides cp. Made when it is first asked for, by every rank of the mesh, and kept with the mesh.
    """
    axis_group(mesh, ("cp",))  # refuses a mesh without it
    if size == 1:
        return None
    if size == cp_size(mesh):
        return mesh.get_group("cp")
    groups = _places(mesh).groups
    if (size, stride) not in groups:
        ranks = _places(mesh).rows
        if ranks is None:
            axis = (mesh.mesh_dim_names or ()).index("cp")
            ranks = mesh.mesh.movedim(axis, -1).reshape(-1, cp_size(mesh)).tolist()
        if sum(map(len, ranks)) != dist.get_world_size():
            raise refuse("mesh", tuple(mesh.mesh.shape), "part of one cannot be cut further; give the whole mesh")
        for members in rank_groups(ranks, size, stride):  # every rank takes part in making every group
            group = dist.new_group(members, timeout=_places(mesh).timeout)
            if dist.get_rank() in members:
                groups[size, stride] = cast(dist.ProcessGroup, group)
    return groups[size, stride]


def axis_group(mesh: DeviceMesh, axes: Sequence[str]) -> dist.ProcessGroup | None:
    """The process group over these axes of the mesh; None where they hold one rank together.

    `axes` is ("cp",), ("dp",) or ("dp", "cp"), the last flattened into one group, so that a sum over both is one
    collective.
    """
    names = mesh.mesh_dim_names or ()
    missing = [axis for axis in axes if axis not in names]
    if missing:
        raise refuse("mesh", tuple(names), f"it has no axis {missing[0]!r}; make it with lss.init_mesh(cp, dp)")
    wide = [axis for axis in axes if mesh[axis].size() > 1]
    if not wide:
        return None
    if len(wide) == 1:
        return mesh.get_group(wide[0])
    return flat_mesh(mesh, axes).get_group()


def flat_mesh(mesh: DeviceMesh, axes: Sequence[str]) -> DeviceMesh:
    """These axes of the mesh as one, ranks in their order; the group behind it is `axis_group`'s."""
    wide = [axis for axis in axes if mesh[axis].size() > 1] or list(axes[:1])
    if len(wide) == 1:
        return mesh[wide[0]]
    flat = mesh[tuple(axes)]._flatten("_".join(axes))
    if (timeout := _places(mesh).timeout) is not None:
        _limit(flat.get_group(), timeout)
    return flat


def close() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # groups that garbage still holds (models and their hooks are cycles) would end with the interpreter, when gloo's
        # threads can no longer be joined, and abort the process
        gc.collect()


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on the device; through pinned memory, since a copy from any other would wait for all that the device does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.device.type == "cpu" else x.to(device)
