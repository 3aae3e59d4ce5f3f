#!/usr/bin/env bash
# Train on several hosts by hand: torchrun on each, the same command but for the first argument.
#
#   on node1:  examples/cluster/two-hosts.sh 0 node1 configs/tiny.toml --out /shared/runs/tiny
#   on node2:  examples/cluster/two-hosts.sh 1 node1 configs/tiny.toml --out /shared/runs/tiny
#
# After a stop, or when a host has died: the same commands again go on from the newest save.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 NUMBER_OF_THIS_HOST FIRST_HOST [arguments of lss train]" >&2
    exit 2
fi
number=$1                 # 0 on the first host, 1 on the second
first=$2                  # name or address of the first host, as all reach it
shift 2

HOSTS=${HOSTS:-2}
RANKS=${RANKS:-2}         # of each host: one a GPU
PORT=${PORT:-29500}       # on the first host; free there and reachable from the others
PYTHON=${PYTHON:-python3}

exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$HOSTS" --nproc-per-node="$RANKS" --node-rank="$number" \
    --master-addr="$first" --master-port="$PORT" \
    -m lss train "$@"
