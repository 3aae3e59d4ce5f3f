"""LSS attention where transfers are short: by the size up to which all copies are one launch, call by call and as a graph.

    torchrun --nproc-per-node 2 benchmarks/short_copies.py --out short.jsonl

Random inputs, bfloat16, 32/8 heads of 128; medians over rounds in which every variant has one step, of the slowest rank.
`local` is the share of the step that its own kernel calls take without any communication.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import torch
from graphs import clock_of, slowest

import lss
from lss.bench.candidates import Inputs, our_candidates
from lss.bench.graphs import captured
from lss.comm import cp_communicator, peers
from lss.context_parallel import AttentionOptions, attend
from lss.kernels import Rules

N, K, H = 32, 8, 128
ROUNDS = 20
LOCAL = "without communication"


def medians(clock, steps: dict) -> dict[str, float]:
    """Milliseconds of each step, the slowest rank's; all take turns."""
    rounds = [{name: slowest(clock, step) for name, step in steps.items()} for _ in range(ROUNDS)]
    return {name: round(statistics.median(times[name] for times in rounds), 3) for name in steps}


def steps_of(mesh, tokens: int) -> dict:
    """Forward and backward of each variant."""
    comm, seg = cp_communicator(mesh), lss.make_segment(tokens, mesh)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v, dout = (torch.randn(1, seg.local_len, heads, H, **like) for heads in (N, K, K, N))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def ours(mib: int, regather: bool):
        options = AttentionOptions(regather=regather)

        def step():
            peers.SHORT_COPY = mib << 20
            out = attend(*leaves, Rules(causal=True), segment=seg, comm=comm, options=options)
            return torch.autograd.grad(out, leaves, dout)

        return step

    (candidate,) = our_candidates(["lss"], ["auto"], ["head_tail"], [], torch.empty(1, tokens, N, H, **like), comm)
    plain = [x.detach() for x in (q, k, v)]
    steps = {LOCAL: candidate.without_comm(Inputs(tokens, *plain, dout, seg.positions))}
    for mib in (0, 16, 128):
        for regather in (True, False):
            steps[f"one launch up to {mib} MiB, regather={regather}"] = ours(mib, regather)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--out")
    options = parser.parse_args()
    mesh = lss.init_mesh(cp=lss.world_size())
    clock = clock_of(mesh)
    for tokens in map(int, options.lengths.split(",")):
        steps = steps_of(mesh, tokens)
        for step in steps.values():
            step()
        calls = medians(clock, steps)
        graphs = medians(clock, {name: captured(step) for name, step in steps.items()})
        for name in steps if mesh.get_rank() == 0 else ():
            row = {"bench": "short copies", "strategy": name, "tokens": tokens, "heads": f"{N}/{K}x{H}", "dtype": "bfloat16",
                   "world_size": mesh.size(), "gpu": torch.cuda.get_device_name(), "ms": calls[name],
                   "local": round(calls[LOCAL] / calls[name], 3), "graph_ms": graphs[name],
                   "graph_local": round(graphs[LOCAL] / graphs[name], 3), "status": "ok",
                   "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
                   "command": f"torchrun --nproc-per-node {mesh.size()} {' '.join(sys.argv)}"}  # fmt: skip
            print({key: row[key] for key in ("strategy", "tokens", "ms", "local", "graph_ms", "graph_local")}, flush=True)
            if options.out:
                with open(options.out, "a") as file:
                    file.write(json.dumps(row) + "\n")
    lss.mesh.close()


if __name__ == "__main__":
    main()
