"""Whether offload is hidden: one training step under torch's profiler, and the time of copies in which no kernel ran.

    python benchmarks/offload_trace.py configs/llama-1b.toml model.n_layers=4 memory.offload=host data.seq_len=262144 \\
        --out offload.jsonl --plot offload.svg

One GPU. `exposed_ms` is the time in which a copy between host and GPU ran and no kernel did; `without_ms` is the same step
with `memory.offload=none`, timed after it (null where that has no memory). The profiler's records are of the GPU
alone, so that they cost the host little. Random tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import lss
from lss.bench.rows import run_facts
from lss.bench.timing import Clock
from lss.bench.train_step import Step, config_row, our_step
from lss.comm import cp_communicator
from lss.config import Config, load_config

REPEAT = 3
LANES = {"kernels": "kernel", "to the host": "DtoH", "to the GPU": "HtoD"}
Spans = list[tuple[float, float]]


def union(spans: Spans) -> Spans:
    """Where at least one of them is, in order and apart."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def length(spans: Spans) -> float:
    """Milliseconds that at least one of them is there."""
    return sum(end - start for start, end in union(spans)) / 1e3


def outside(spans: Spans, others: Spans) -> float:
    """Milliseconds in which one of `spans` is there and none of `others`."""
    return length(spans + others) - length(others)


def lanes_of(profiler: profile) -> dict[str, Spans]:
    """Start and end in microseconds of what ran on the GPU, by lane."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: dict[str, Spans] = {lane: [] for lane in LANES}
    for event in events:
        name = event.get("name", "") if event.get("cat") == "gpu_memcpy" else event.get("cat", "")
        for lane, word in LANES.items():
            if word in name:
                found[lane].append((event["ts"], event["ts"] + event["dur"]))
    return found


def plotted(lanes: dict[str, Spans], path: str) -> None:
    """The lanes over time; gaps of less than a thousandth of it are not drawn."""
    from matplotlib import pyplot

    every = union([span for spans in lanes.values() for span in spans])
    first, gap = every[0][0], (every[-1][1] - every[0][0]) / 1000
    figure, axes = pyplot.subplots(figsize=(10, 2))
    for row, spans in enumerate(lanes.values()):
        near = union([(start, end + gap) for start, end in spans])
        bars = [((start - first) / 1e6, (end - gap - start) / 1e6) for start, end in near]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=f"C{row}")
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure and append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="CONFIG.toml | key=value")
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot")
    options = parser.parse_args()
    path, overrides = options.settings[0], options.settings[1:]
    mesh = lss.init_mesh()
    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock(cp_communicator(mesh), device)
    config, without = (load_config(path, [*overrides, *more]).resolved(1) for more in ([], ["memory.offload=none"]))

    def timed(one: Config) -> tuple[Step, float]:
        step = our_step(one, lambda cp, dp: mesh, device)
        step()
        return step, statistics.median(clock.time(step)[0] for _ in range(REPEAT))

    step, ms = timed(config)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    lanes = lanes_of(profiler)
    del step  # its model goes before the next one is made
    clock.tidy()
    try:
        without_ms = timed(without)[1]
    except torch.OutOfMemoryError:
        without_ms = None
    kernels, copies = lanes["kernels"], lanes["to the host"] + lanes["to the GPU"]
    row = config_row(config, {}, run_facts(device, 1, " ".join(["python", *sys.argv]))) | {
        "bench": "offload_trace", "ms": ms, "without_ms": without_ms, "kernels_ms": length(kernels),
        "copies_ms": length(copies), "exposed_ms": outside(copies, kernels),
        "to_host_ms": length(lanes["to the host"]), "to_gpu_ms": length(lanes["to the GPU"]),
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    with Path(options.out).open("a") as file:
        file.write(json.dumps(row) + "\n")
    if options.plot:
        plotted(lanes, options.plot)


if __name__ == "__main__":
    main()
