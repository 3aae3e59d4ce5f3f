"""What a launcher told this process: torchrun, mpirun or srun, by their environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lss.config.errors import Refused, refuse
from lss.hosts import first_host, tasks_of_nodes
from lss.meeting import Place, agent_round


@dataclass(frozen=True)
class RankEnvironment:
    """What a launcher told this process: its place among all ranks and where they meet."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int

    def place(self) -> Place:
        """Where this rank meets the others."""
        return Place(self.rank, self.world_size, self.address, self.port, agent_round())


# (name, variable that says it is this launcher, rank, world size, local rank, local world size). The first whose mark is
# set is the one: torchrun may run under srun, and so may mpirun's daemons; srun itself may set PMI_RANK, without a place.
_LAUNCHERS = (
    ("torchrun", "RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpirun", "MPI_LOCALRANKID", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("srun", "SLURM_PROCID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE"),
    ("mpirun", "PMI_RANK", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)  # fmt: skip
_DEFAULT_PORT = 29500


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None:
        raise Refused(f"{name} is not set, though the other variables of its launcher are; start every rank through it.")
    try:
        return int(text)
    except ValueError:
        raise refuse(name, repr(text), "not a whole number") from None


def _tasks_of_this_node(environ: Mapping[str, str]) -> int | None:
    """Ranks that srun started on this node; None where it does not say."""
    name = next((n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if environ.get(n)), None)
    if name is None:
        return None
    try:
        counts = tasks_of_nodes(environ[name])
    except ValueError:
        raise refuse(name, repr(environ[name]), 'not counts of tasks such as "4(x2),3"') from None
    node = _number(environ, "SLURM_NODEID") if environ.get("SLURM_NODEID") else 0
    if not 0 <= node < len(counts):
        raise refuse("SLURM_NODEID", node, f"outside the {len(counts)} nodes of {name}={environ[name]}")
    return counts[node]


def _is_rank_of(launcher: str, environ: Mapping[str, str]) -> bool:
    """Whether this process is a rank; a batch script is not, though Slurm gives it the number 0 among its tasks."""
    in_step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEP_NUM_TASKS")
    return launcher != "srun" or environ.get("ENVIRONMENT") != "BATCH" or bool(in_step)


def _address(environ: Mapping[str, str], launcher: str, one_host: bool) -> str:
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    if launcher == "torchrun":
        raise Refused("MASTER_ADDR is not set, though RANK is: name the host of rank 0 in it, 127.0.0.1 for one host.")
    if one_host:
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if launcher == "srun" and nodes:
        return first_host(nodes)
    raise Refused(f"MASTER_ADDR is not set: {launcher} started ranks on several hosts; name the host of rank 0 in it.")


def _port(environ: Mapping[str, str], launcher: str) -> int:
    if environ.get("MASTER_PORT"):
        port = _number(environ, "MASTER_PORT")
        if not 0 < port < 65536:
            raise refuse("MASTER_PORT", port, "not a port; use 1 to 65535, better 1024 or more")
        return port
    if launcher == "torchrun":
        raise Refused("MASTER_PORT is not set, though RANK is: give every rank the same free port, 1024 to 65535.")
    # every rank of a job knows its number, and two jobs on one host then meet at different ports
    job = environ.get("SLURM_JOB_ID", "0")
    return _DEFAULT_PORT + (int(job) % 10000 if job.isdigit() else 0)


def _refuse_places(launcher: str, ranks: tuple[int, str, int], local: tuple[str, int], on_host: tuple[str, int]) -> None:
    """Refuse a place on this host that contradicts itself, or the place among all ranks."""
    rank, world_name, world = ranks
    if launcher == "srun":  # which counts the job's tasks, and these may be a step's
        return
    if not 1 <= on_host[1] <= world:
        raise refuse(on_host[0], on_host[1], f"a host has 1 rank or more, and at most all of {world_name}={world}")
    if not 0 <= local[1] < on_host[1]:
        raise refuse(local[0], local[1], f"outside {on_host[0]}={on_host[1]}; ranks of a host count from 0")
    if launcher == "torchrun" and local[1] > rank:
        raise refuse(local[0], local[1], f"more than this rank's number among all, RANK={rank}")


def rank_environment(environ: Mapping[str, str] | None = None) -> RankEnvironment | None:
    """Read the variables of torchrun, mpirun (Open MPI, MPICH, Intel MPI) or srun; None where no launcher set any.

    Raises:
        Refused: a variable is missing, not a number or out of range.
    """
    environ = os.environ if environ is None else environ
    for launcher, mark, rank_name, world_name, local_name, local_world_name in _LAUNCHERS:
        if not environ.get(mark) or not _is_rank_of(launcher, environ):
            continue
        if launcher == "srun" and environ.get("SLURM_STEP_NUM_TASKS"):
            world_name = "SLURM_STEP_NUM_TASKS"
        rank, world = _number(environ, rank_name), _number(environ, world_name)
        if launcher == "srun":
            local_world = _tasks_of_this_node(environ) or world
        else:
            local_world = _number(environ, local_world_name) if environ.get(local_world_name) else world
        local_rank = _number(environ, local_name) if environ.get(local_name) else rank % max(local_world, 1)
        if world < 1:
            raise refuse(world_name, world, "a run has 1 rank or more")
        if not 0 <= rank < world:
            raise refuse(rank_name, rank, f"outside {world_name}={world}; ranks count from 0 to {world - 1}")
        _refuse_places(launcher, (rank, world_name, world), (local_name, local_rank), (local_world_name, local_world))
        address = _address(environ, launcher, one_host=local_world >= world)
        return RankEnvironment(launcher, rank, world, local_rank, local_world, address, _port(environ, launcher))
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        if environ.get(name) and (name == "LOCAL_RANK" or environ[name] != "1"):
            raise refuse(name, environ[name], "RANK is not set beside it; start every rank through a launcher, or unset it")
    if environ.get("PMIX_RANK"):
        fit = "its launcher does not say how many ranks it started; use mpirun, srun or torchrun, or set RANK, WORLD_SIZE, "
        raise refuse("PMIX_RANK", environ["PMIX_RANK"], fit + "LOCAL_RANK and LOCAL_WORLD_SIZE for every rank")
    return None
