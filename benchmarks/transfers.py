"""What hides the transfers of LSS attention: each way of signalling and sending, in turn, beside the same calls without any.

    torchrun --nproc-per-node 2 benchmarks/transfers.py --lengths 8192,131072 --out transfers.jsonl

Random inputs, bfloat16, 32/8 heads of 128; medians over rounds in which every variant has one step, of the slowest rank.
Every variant's results are compared with the first's, and all of one length are the same function of the same numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback

import torch
from graphs import clock_of, differentiated, slowest

import lss
from lss.bench.candidates import Inputs, our_candidates
from lss.comm import cp_communicator
from lss.comm.peers import STAGED_BYTES
from lss.kernels import pick_kernel, single_attention
from lss.kernels.table import KERNELS

N, K, H = 32, 8, 128
NEVER = None

# name: (barriers by streams, stages from so many bytes on, two calls as one where nothing is staged, options)
VARIANTS = {
    "barriers by kernels": (False, NEVER, False, {}),
    "barriers by kernels, staged": (False, 0, False, {}),
    "barriers by streams": (True, NEVER, False, {}),
    "barriers by streams, one call": (True, NEVER, True, {}),
    "barriers by streams, staged": (True, 0, False, {}),
    "as set": (True, STAGED_BYTES, True, {}),
    "as set, regather=False": (True, STAGED_BYTES, True, {"regather": False}),
    "as set, head_chunks=8": (True, STAGED_BYTES, True, {"head_chunks": 8}),
    "collective": (True, STAGED_BYTES, True, {"transport": "collective"}),
}


class Setting:
    """Puts the ranks' memory and the table of kernels into a variant's state before its step."""

    def __init__(self, peers, kernel) -> None:
        self._peers, self._signals, self._kernel = peers, peers._signals, kernel

    def apply(self, by_streams, staged, together) -> None:
        self._peers._signals = self._signals if by_streams else None
        self._peers.staged_bytes = staged
        KERNELS[self._kernel.name] = self._kernel if together else self._kernel._replace(pair=None)

    @property
    def streams(self) -> bool:
        return self._signals is not None


def steps_of(mesh, tokens: int, setting: Setting):
    """name: (its state, its step) for everything that is measured at one length."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    whole = [torch.randn(1, tokens, heads, H, **like) for heads in (N, K, K, N)]
    seg = lss.make_segment(tokens, mesh)
    cut = [lss.shard(x, mesh, seg=seg) for x in whole]
    steps = {}
    for name, (by_streams, staged, together, options) in VARIANTS.items():
        if by_streams and not setting.streams:
            continue

        def call(q, k, v, options=options):
            return lss.attention(q, k, v, mesh=mesh, seg=seg, **options)

        steps[name] = (by_streams, staged, together), differentiated(call, cut)
    (ours,) = our_candidates(["lss"], ["auto"], ["head_tail"], [], whole[0], cp_communicator(mesh))
    inputs = Inputs(tokens, *cut, seg.positions)
    for name, state in (("no communication", (False, 0, False)), ("no communication, one call", (False, NEVER, True))):
        setting.apply(*state)
        steps[name] = state, ours.without_comm(inputs)
    steps["one device"] = (False, NEVER, True), differentiated(lambda q, k, v: single_attention(q, k, v), whole)
    return steps


def measure(mesh, tokens: int, repeat: int, setting: Setting) -> list[dict]:
    """Rows of one length."""
    steps, errors, failed, clock = steps_of(mesh, tokens, setting), {}, {}, clock_of(mesh)
    expected = None
    for name, (state, step) in steps.items():
        setting.apply(*state)
        try:
            results = [x.clone() for x in step()]
            step()
            torch.cuda.synchronize()
        except Exception as error:  # a variant that the driver refuses says so in its row
            traceback.print_exc()
            failed[name] = f"failed: {str(error).splitlines()[0][:150]}"
            continue
        expected = expected or results
        if results[0].shape == expected[0].shape and results[2].shape == expected[2].shape:
            pairs = zip(results, expected, strict=True)
            errors[name] = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    times: dict[str, list[float]] = {name: [] for name in steps if name not in failed}
    for _ in range(repeat):
        for name in times:
            setting.apply(*steps[name][0])
            times[name].append(slowest(clock, steps[name][1]))
    rows = []
    for name in steps:
        row = {"bench": "transfers", "strategy": name, "tokens": tokens, "heads": f"{N}/{K}x{H}", "dtype": "bfloat16",
               "world_size": mesh.size(), "gpu": torch.cuda.get_device_name(), "status": failed.get(name, "ok")}  # fmt: skip
        if name in times:
            row |= {"ms": round(statistics.median(times[name]), 3), "rounds": repeat, "difference": errors.get(name)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,16384,32768,65536,131072")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out")
    options = parser.parse_args()
    mesh = lss.init_mesh(cp=lss.world_size())
    device = torch.device("cuda", torch.cuda.current_device())
    peers = cp_communicator(mesh).peers(device)
    setting = Setting(peers, pick_kernel("auto", torch.empty(1, 1, N, H, dtype=torch.bfloat16, device=device)))
    if mesh.get_rank() == 0:
        print("barriers by streams:", "work" if setting.streams else "do not work", flush=True)
    for tokens in map(int, options.lengths.split(",")):
        for row in measure(mesh, tokens, options.repeat, setting):
            row["versions"] = {"lss": lss.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
            row["command"] = f"torchrun --nproc-per-node {mesh.size()} {' '.join(sys.argv)}"
            if mesh.get_rank() == 0:
                print(f"{tokens:>8} {row['strategy']:34} {row.get('ms', ''):>10} {row.get('difference')} {row['status']}",
                      flush=True)  # fmt: skip
                if options.out:
                    with open(options.out, "a") as file:
                        file.write(json.dumps(row) + "\n")
        torch.cuda.empty_cache()
    lss.mesh.close()


if __name__ == "__main__":
    main()
