"""Launchers' variables, and worlds that do not fit."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import lss
from lss.config.errors import Refused
from lss.environment import rank_environment
from lss.mesh import rank_groups, same_everywhere, sub_group
from tests.distributed.pool import pool

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
            "MASTER_PORT": "1234"}  # fmt: skip
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NODELIST": "gpu[003-004,9]", "SLURM_JOB_ID": "77"}  # fmt: skip
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
BATCH = SRUN | {"SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    "environ, expected",
    [
        (TORCHRUN, ("torchrun", 3, 4, 1, 2, "node1", 1234)),
        (SRUN, ("srun", 5, 8, 1, 4, "gpu003", 29577)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "6"}, ("srun", 5, 6, 1, 4, "gpu003", 29577)),
        (OPENMPI, ("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),
        (HYDRA, ("mpirun", 0, 2, 0, 2, "127.0.0.1", 29500)),
        (HYDRA | {"MASTER_ADDR": "h", "MASTER_PORT": "99"}, ("mpirun", 0, 2, 0, 2, "h", 99)),
        # nodes of unequal size, and a step on other nodes than the job's first
        (SRUN | {"SLURM_NTASKS": "11", "SLURM_TASKS_PER_NODE": "4(x2),3", "SLURM_PROCID": "9", "SLURM_NODEID": "2"},
         ("srun", 9, 11, 1, 3, "gpu003", 29577)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_STEP_NODELIST": "rack[2-3]node[01-02]"},
         ("srun", 5, 8, 1, 2, "rack2node01", 29577)),
        # mpirun of either kind whose daemons srun started, srun with PMI-2 or PMIx, and torchrun under srun
        (SRUN | OPENMPI | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, ("mpirun", 1, 2, 1, 2, "h", 1)),
        (SRUN | HYDRA | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, ("mpirun", 0, 2, 0, 2, "h", 1)),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, ("srun", 5, 8, 1, 4, "gpu003", 29577)),
        (SRUN | {"PMIX_RANK": "5"}, ("srun", 5, 8, 1, 4, "gpu003", 29577)),
        (SRUN | TORCHRUN, ("torchrun", 3, 4, 1, 2, "node1", 1234)),
        (OPENMPI | {"PMIX_RANK": "1"}, ("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2", "MASTER_ADDR": "h"},
         ("mpirun", 3, 4, 1, 2, "h", 29500)),
        (BATCH | {"SLURM_STEP_ID": "0"}, ("srun", 0, 8, 1, 4, "gpu003", 29577)),
    ],
)
def test_launchers(environ, expected):
    found = rank_environment(environ)
    assert (found.launcher, found.rank, found.world_size, found.local_rank, found.local_world_size, found.address,
            found.port) == expected  # fmt: skip


def test_no_launcher_is_one_rank():
    assert rank_environment({}) is None


def test_a_batch_script_is_no_rank():
    assert rank_environment(BATCH) is None


@pytest.mark.parametrize(
    "environ, words",
    [
        (TORCHRUN | {"RANK": "x"}, "RANK='x'"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "8"}, "MASTER_ADDR is not set"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1: its launcher does not say how many"),
        (SRUN | {"SLURM_TASKS_PER_NODE": "4(x2"}, "SLURM_TASKS_PER_NODE='4\\(x2'"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
    ],
)
def test_wrong_variables_are_refused_by_name(environ, words):
    with pytest.raises(Refused, match=words):
        rank_environment(environ)


def _mesh_of(cp, dp):
    mesh = lss.init_mesh(cp=cp, dp=dp)
    return mesh.mesh_dim_names, mesh["dp"].get_local_rank(), mesh["cp"].get_local_rank()


def test_cp_ranks_are_neighbours():
    assert pool(4).run(_mesh_of, 2, 2) == [(("dp", "cp"), d, c) for d in (0, 1) for c in (0, 1)]


@pytest.mark.parametrize(
    "cp, dp, words",
    [(2, 2, "needs 4 ranks and 2 are running"), (0, 1, "cp=0"), (2, -1, "dp=-1"), (1, 1, "needs 1 ranks and 2")],
)
def test_a_world_that_does_not_fit_is_refused(cp, dp, words):
    for ok, what in pool(2).outcomes(_mesh_of, cp, dp):
        assert not ok
        assert what[0] == "Refused"
        assert words in what[1]


@pytest.mark.parametrize("per_node, words", [(3, "divides cp=4"), (0, "ranks_per_node=0"), (2.0, "ranks_per_node=2.0")])
def test_nodes_that_a_group_has_unequal_parts_of_are_refused(per_node, words):
    for ok, what in pool(4).outcomes(_mesh_on_nodes, per_node):
        assert not ok
        assert what[0] == "Refused"
        assert words in what[1]


def _mesh_on_nodes(per_node):
    return lss.init_mesh(cp=4, ranks_per_node=per_node) is not None


@pytest.mark.parametrize(
    "told, expected",
    [
        ([(0, 2), (1, 2), (0, 2), (1, 2)], 2),
        ([(0, 1), (0, 1), (0, 1)], 1),
        ([(0, 4), (1, 4), (2, 4), (3, 4)], 4),
        ([(0, 3), (1, 3), (2, 3), (0, 1)], 4),  # hosts of unequal size
        ([(0, 2), (0, 2), (1, 2), (1, 2)], 4),  # dealt out in turn: neighbours are on different hosts
        ([(0, 0), (0, 0)], 2),
    ],
)
def test_nodes_are_told_apart_where_all_are_alike(told, expected):
    assert same_everywhere(told) == expected


def _launched(local_world, world=4):
    """What `init_mesh` makes of a launcher's variables, on each rank of a process group that exists."""
    import os

    import torch.distributed as dist

    from lss.mesh import cp_ranks_per_node

    rank = dist.get_rank()
    given = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local_world, "LOCAL_WORLD_SIZE": local_world,
             "MASTER_ADDR": "node1", "MASTER_PORT": 1234}  # fmt: skip
    os.environ.update({name: str(value) for name, value in given.items()})
    try:
        return cp_ranks_per_node(lss.init_mesh(cp=4))
    finally:
        for name in given:
            del os.environ[name]


@pytest.mark.parametrize("local_world, expected", [(2, 2), (1, 1), (4, 4), (3, 4)])
def test_the_launcher_says_which_ranks_share_a_node(local_world, expected):
    assert pool(4).run(_launched, local_world) == [expected] * 4


def test_groups_of_ranks_by_size_and_stride():
    rows = [list(range(8)), list(range(8, 16))]
    assert rank_groups(rows, 4, 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert rank_groups(rows[:1], 2, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert rank_groups(rows[:1], 2, 2) == [[0, 2], [1, 3], [4, 6], [5, 7]]


MANY_RANKS = """
import sys
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import lss
from lss.comm import cp_communicator

dist.init_process_group("fake", store=FakeStore(), rank=int(sys.argv[1]), world_size=16)
mesh = lss.init_mesh(cp=8, dp=2, ranks_per_node=4, device_type="cpu")
comm = cp_communicator(mesh)
for part in (comm, comm.inside, comm.across, *comm.levels(2), comm.levels(2)[1].inside, *comm.levels(4), *comm.levels(8)):
    ranks = [] if part.group is None else dist.get_process_group_ranks(part.group)
    print(ranks, part.link, part.arrival)
try:
    cp_communicator(mesh["cp"]).levels(2)
except lss.config.Refused as refusal:
    print(refusal)
"""


@pytest.mark.parametrize("rank", [5, 13])
def test_groups_of_many_ranks(rank):
    """Two sequences on 8 ranks each, nodes of 4: who is grouped with rank 5 of a sequence."""
    command = [sys.executable, "-c", MANY_RANKS, str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first = rank // 8 * 8

    def line(ranks, link, arrival=None):
        return f"{[first + r for r in ranks]} {link} {arrival}"

    assert done.stdout.splitlines() == [
        line(range(8), None, (0, 4, 1, 5, 2, 6, 3, 7)),
        line([4, 5, 6, 7], "inside"),
        line([1, 5], "across"),
        line([4, 5], "inside"),
        line([1, 3, 5, 7], None, (0, 2, 1, 3)),  # two on each node: in two stages as well
        line([5, 7], "inside"),
        line([4, 5, 6, 7], "inside"),
        line([1, 5], "across"),
        line(range(8), None, (0, 4, 1, 5, 2, 6, 3, 7)),
        line([], "across"),
        "mesh=(8,): part of one cannot be cut further; give the whole mesh.",
    ]


def _kept_groups():
    mesh = lss.init_mesh(cp=4, ranks_per_node=2)
    first = sub_group(mesh, 2, 1)
    return first is sub_group(mesh, 2, 1), first is sub_group(mesh, 2, 2), sub_group(mesh, 1, 1) is None


def _mesh_of_torch():
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    x = torch.linspace(0, 1, 8, dtype=torch.float64).view(1, 8, 1, 1).expand(1, 8, 2, 4)
    q = lss.shard(x, mesh).contiguous()
    out = [lss.attention(q, q, q, mesh=mesh, strategy=how, inner=inner) for how, inner in (("lss", 1), ("lss_2d", 2))]
    return float((out[0] - out[1]).abs().max())


def test_a_mesh_of_torch_s_own_counts_as_one_node():
    assert max(pool(4).run(_mesh_of_torch)) < 1e-14


def test_groups_are_made_once_a_mesh():
    assert pool(4).run(_kept_groups) == [(True, False, True)] * 4


def _alone_in_a_collective(which):
    """How rank 0 fares that alone of all ranks begins a collective, in a mesh with little patience."""
    mesh = lss.init_mesh(cp=2, dp=2, timeout=timedelta(seconds=0.5))
    row = lss.init_mesh(cp=4, timeout=timedelta(seconds=0.5))
    group = {"cp": mesh.get_group("cp"), "dp": mesh.get_group("dp"), "part": sub_group(row, 2, 1)}[which]
    if dist.get_rank():
        return None
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("which", ["cp", "dp", "part"])
def test_the_timeout_holds_in_every_group(which):
    started = time.monotonic()
    found = pool(4).run(_alone_in_a_collective, which)
    assert "imed out" in found[0], found
    assert time.monotonic() - started < 10
