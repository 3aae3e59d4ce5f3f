#!/usr/bin/env bash
# Train under mpirun of Open MPI, MPICH or Intel MPI, one process a rank. Only its launcher is used, not MPI itself.
#
#   HOSTS=node1:8,node2:8 RANKS=16 examples/cluster/mpirun.sh configs/tiny.toml --out /shared/runs/tiny
#
# Without HOSTS all ranks run on this host. The same command goes on from the newest save.
set -euo pipefail

RANKS=${RANKS:-2}
HOSTS=${HOSTS:-}
PYTHON=${PYTHON:-python3}
MPIRUN=${MPIRUN:-mpirun}

command=("$MPIRUN" -n "$RANKS")
if "$MPIRUN" --version 2>&1 | grep -qiE 'open mpi|open-mpi'; then
    command+=(--bind-to none)       # it would tie each rank to one core
    pass=(-x MASTER_ADDR -x MASTER_PORT) hosts=(--host "$HOSTS")
else
    pass=(-genvlist "MASTER_ADDR,MASTER_PORT") hosts=(-hosts "$HOSTS")
fi
if [ -n "$HOSTS" ]; then
    # where rank 0 runs, and a port that is free there: mpirun does not tell the ranks
    first=${HOSTS%%,*}
    export MASTER_ADDR=${MASTER_ADDR:-${first%%:*}} MASTER_PORT=${MASTER_PORT:-29500}
    command+=("${hosts[@]}" "${pass[@]}")
fi

exec "${command[@]}" "$PYTHON" -m lss train "$@"
