"""Launchers' variables, and worlds that do not fit."""

from __future__ import annotations

import pytest

import lss
from lss.config.errors import Refused
from lss.mesh import rank_environment
from tests.distributed.pool import pool

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
            "MASTER_PORT": "1234"}  # fmt: skip
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NODELIST": "gpu[003-004,9]", "SLURM_JOB_ID": "77"}  # fmt: skip
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
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
    ],
)
def test_launchers(environ, expected):
    found = rank_environment(environ)
    assert (found.launcher, found.rank, found.world_size, found.local_rank, found.local_world_size, found.address,
            found.port) == expected  # fmt: skip


def test_no_launcher_is_one_rank():
    assert rank_environment({}) is None


@pytest.mark.parametrize(
    "environ, words",
    [
        (TORCHRUN | {"RANK": "x"}, "RANK='x'"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "8"}, "MASTER_ADDR is not set"),
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
