"""Short lengths, where launching costs more than computing: attention issued call by call, and replayed as one CUDA graph.

    torchrun --nproc-per-node 2 benchmarks/graphs.py --out graphs.jsonl

Random inputs; medians over repetitions of the slowest rank's forward and backward. The graph's results are compared with
those of the calls one by one before a time is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import torch

import lss
from lss.bench.candidates import Inputs, our_candidates
from lss.bench.graphs import captured
from lss.bench.timing import Clock
from lss.comm import cp_communicator
from lss.kernels import pick_kernel, single_attention

N, K, H = 32, 8, 128
REPEAT = 20


def clock_of(mesh) -> Clock:
    """The clock of all ranks of the mesh, each on its GPU."""
    return Clock(cp_communicator(mesh), torch.device("cuda", torch.cuda.current_device()))


def slowest(clock: Clock, step) -> float:
    """Milliseconds of a step that all ranks begin together, the slowest rank's."""
    clock.barrier()
    return clock.largest([clock.time(step)[0]])[0]


def timed(clock: Clock, step) -> float:
    """The median of several."""
    return statistics.median(slowest(clock, step) for _ in range(REPEAT))


def measure(mesh, tokens: int) -> list[dict]:
    """Rows of one length: one device and LSS, each both ways."""
    clock = clock_of(mesh)
    generator = torch.Generator(device="cuda").manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    whole = [torch.randn(1, tokens, heads, H, **like) for heads in (N, K, K, N)]
    seg = lss.make_segment(tokens, mesh)
    cut = [lss.shard(x, mesh, seg=seg) for x in whole]
    calls = {
        "one device": (whole, lambda q, k, v: single_attention(q, k, v)),
        "lss": (cut, lambda q, k, v: lss.attention(q, k, v, mesh=mesh, seg=seg)),
        "lss, regather=False": (cut, lambda q, k, v: lss.attention(q, k, v, mesh=mesh, seg=seg, regather=False)),
    }
    steps = {name: differentiated(call, tensors) for name, (tensors, call) in calls.items()}
    (ours,) = our_candidates(["lss"], ["auto"], ["head_tail"], [], whole[0], cp_communicator(mesh))
    steps["lss without communication"] = ours.without_comm(Inputs(tokens, *cut, seg.positions))
    steps["lss, deterministic"] = steps["lss"]
    rows = []
    for name, step in steps.items():
        torch.use_deterministic_algorithms("deterministic" in name)
        expected = [x.clone() for x in step()]
        eager = timed(clock, step)
        row = {"bench": "graphs", "strategy": name, "tokens": tokens, "heads": f"{N}/{K}x{H}", "dtype": "bfloat16",
               "kernel": pick_kernel("auto", whole[0]).name, "world_size": mesh.size(),
               "gpu": torch.cuda.get_device_name(), "ms": round(eager, 3)}  # fmt: skip
        try:
            replay = captured(step)
            for _ in range(3):
                results = replay()
            pairs = zip(results, expected, strict=True)
            worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
            status = "ok" if worst < 5e-3 else "failed"
            row |= {"graph_ms": round(timed(clock, replay), 3), "graph_error": worst, "status": status}
        except RuntimeError as error:
            row |= {"graph_ms": None, "status": f"failed: {str(error).splitlines()[0][:150]}"}
        rows.append(row)
        torch.use_deterministic_algorithms(False)
    return rows


def differentiated(call, tensors):
    """Forward and backward: returns the output and the gradients of q, k and v."""
    *qkv, dout = tensors
    leaves = [x.clone().requires_grad_() for x in qkv]

    def step():
        out = call(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--out")
    options = parser.parse_args()
    mesh = lss.init_mesh(cp=lss.world_size())
    command = f"torchrun --nproc-per-node {mesh.size()} {' '.join(sys.argv)}"
    for tokens in map(int, options.lengths.split(",")):
        for row in measure(mesh, tokens):
            row["versions"] = {"lss": lss.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
            row["command"] = command
            if mesh.get_rank() == 0:
                print({k: row[k] for k in ("strategy", "tokens", "ms", "graph_ms", "status")}, flush=True)
                if options.out:
                    with open(options.out, "a") as file:
                        file.write(json.dumps(row) + "\n")
    lss.mesh.close()


if __name__ == "__main__":
    main()
