"""Attention under windows and packed documents: time, peak memory and bytes fetched, beside attention to everything.

    torchrun --nproc-per-node 2 benchmarks/masks.py --out masks.jsonl

Inputs are random; times are medians over repetitions of the slowest rank's forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

import lss
from lss.comm import count_collectives
from lss.comm.texts import gather_texts

N, K, H = 32, 8, 128
WINDOWS = (1024, 4096, 32768)
REPEAT = 7


def borders(seq_len: int) -> list[int]:
    """Documents of log-normal lengths, median 1,800 tokens: many short, a few that span ranks."""
    lengths = np.random.default_rng(0).lognormal(7.5, 1.4, size=4000).astype(int).clip(1)
    edges = np.concatenate(([0], np.cumsum(lengths)))
    return [*edges[edges < seq_len].tolist(), seq_len]


def cases(seq_len: int) -> list[dict]:
    """What is measured: a name, how the segment is made, and options of attention."""
    packed = torch.tensor(borders(seq_len), dtype=torch.int32)
    found = [{"mask": "causal", "order": "head_tail"}]
    found += [{"mask": "window", "order": o, "window": w} for w in WINDOWS for o in ("contiguous", "head_tail")]
    found += [{"mask": "documents", "order": o, "cu_seqlens": packed} for o in ("contiguous", "head_tail", "balanced")]
    return found


def measure(mesh, seq_len: int, case: dict) -> dict:
    """One row of results; every rank calls and returns the same."""
    window, packed = case.get("window"), case.get("cu_seqlens")
    seg = lss.make_segment(seq_len, mesh, case["order"], packed, window=window)
    rank, ranks, device = mesh.get_rank(), mesh.size(), mesh.device_type
    generator = torch.Generator(device=device).manual_seed(rank)
    like = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    q, k, v = (torch.randn(1, seg.local_len, heads, H, **like).requires_grad_() for heads in (N, K, K))
    dout = torch.randn(q.shape, **like)

    def once() -> None:
        out = lss.attention(q, k, v, mesh=mesh, seg=seg, window=window, regather=False)
        torch.autograd.grad(out, (q, k, v), dout)

    once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with count_collectives() as counter:
        once()
    torch.cuda.synchronize()
    mine = {"peak_bytes": torch.cuda.max_memory_allocated() - before, "payload_bytes": counter.bytes(purpose="kv"), "ms": []}
    for _ in range(REPEAT):
        dist.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        once()
        torch.cuda.synchronize()
        mine["ms"].append(1e3 * (time.perf_counter() - started))
    everyone = [json.loads(text) for text in gather_texts(json.dumps(mine), None, torch.device("cuda"))]
    slowest = [max(times) for times in zip(*(one["ms"] for one in everyone), strict=True)]
    ms = statistics.median(slowest)
    return {
        "bench": "attention", "strategy": "lss", "mask": case["mask"], "order": case["order"], "window": window,
        "documents": 1 if packed is None else len(packed) - 1, "tokens": seq_len, "heads": f"{N}/{K}x{H}",
        "dtype": "bfloat16", "world_size": ranks, "gpu": torch.cuda.get_device_name(), "ms": round(ms, 2),
        "spread": round((max(slowest) - min(slowest)) / ms, 3), "peak_bytes": max(one["peak_bytes"] for one in everyone),
        "payload_bytes": max(one["payload_bytes"] for one in everyone), "status": "ok",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]},
    }  # fmt: skip


def main() -> None:
    """Measure every case and write one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="masks.jsonl")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--commit", default="", help="of the library, to stand in every row")
    options = parser.parse_args()
    mesh = lss.init_mesh(cp=lss.world_size())
    command = f"torchrun --nproc-per-node {mesh.size()} benchmarks/masks.py --tokens {options.tokens}"
    rows = []
    for case in cases(options.tokens):
        rows.append(measure(mesh, options.tokens, case) | {"commit": options.commit, "command": command})
        if mesh.get_rank() == 0:
            print("{mask:10} {order:11} window {window} {ms:8.2f} ms {payload_bytes:>12,} B".format(**rows[-1]), flush=True)
    if mesh.get_rank() == 0:
        with open(options.out, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
