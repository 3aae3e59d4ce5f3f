"""What checksums cost a save, and how long a background save holds up training: `python benchmarks/checkpoint.py`.

One process, about 1 GB of float32 weights and optimizer states by default. Three ways in turn, the median of several
rounds: the same save without digests, with them, and in the background. There two stalls are told: of a loop that updates
at once (beginning the save, and waiting for its copies), and of one that computes for `--step` seconds in between, which is
how much longer that takes than without a save. Every save ends in fsync, so that what is timed is the disk and not the page
cache. On a machine that does other work the best of the rounds says more than their median, and `load` says that it did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

import lss
import lss.checkpoint.files as files
import lss.checkpoint.save as save
from lss.bench.rows import run_facts
from lss.checkpoint import Saver
from lss.checkpoint.digest import PIECE
from lss.comm import control
from lss.segment import whole_piece

KINDS = ("plain", "digest", "background_stall", "background_stall_beside_a_step", "background_whole", "hash_alone")


def pace(rate: float) -> None:
    """Let all writes of this process together take at least as long as a disk of `rate` bytes a second would."""
    write, lock, free_at = files.write_bytes, threading.Lock(), [0.0]

    def paced(descriptor: int, data) -> None:
        with lock:
            free_at[0] = max(free_at[0], time.perf_counter()) + len(data) / rate
            until = free_at[0]
        write(descriptor, data)
        time.sleep(max(0.0, until - time.perf_counter()))

    files.write_bytes = paced


class NoDigest:
    """In place of SHA-256."""

    def update(self, data) -> None:
        """Nothing."""

    def digest(self) -> bytes:
        """One of the right length."""
        return bytes(32)

    def hexdigest(self) -> str:
        """A digest of the right form."""
        return "0" * 64


class Alone:
    """One rank holds everything."""

    def __init__(self, mesh, model) -> None:
        self.mesh, self.shapes = mesh, {name: tuple(p.shape) for name, p in model.named_parameters()}

    def whole_shape(self, name):
        return self.shapes[name]

    def pieces(self, name):
        return (whole_piece(self.shapes[name]),)

    def holders(self, name):
        return (0,)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of a save (default 1024)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", action="store_true", help="leave torch all cores, as a rank on a host of its own has")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--disk", type=float, default=0, metavar="MB_S", help="pace writes like a disk of this speed; "
                        "give a --folder in memory with it")  # fmt: skip
    parser.add_argument("--step", type=float, default=0.5, help="seconds of forward and backward (default 0.5)")
    parser.add_argument("--device", default="cpu", help="where weights, states and computation are (default cpu)")
    parser.add_argument("--output", default="benchmarks/results/checkpoint-cpu.jsonl")
    return parser.parse_args()


def weights(mib: int, device: torch.device) -> nn.ParameterList:
    """Float32 weights that come to so much with AdamW's two states of each."""
    side = 1024
    count = mib * 2**20 // (12 * side * side)
    return nn.ParameterList(nn.Parameter(torch.randn(side, side, device=device)) for _ in range(count))


def main() -> None:
    """Measure and append one row."""
    options = parsed()
    if options.disk:
        pace(options.disk * 1e6)
    if not options.threads:
        torch.set_num_threads(1)  # what a rank has on a host with a rank a core
    device = torch.device(options.device)
    model = weights(options.mib, device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    mesh = lss.init_mesh()
    place = Path(tempfile.mkdtemp(dir=options.folder))
    plain, kinds = save.PieceDigest, {kind: list[float]() for kind in KINDS}
    width = 8192 if device.type == "cuda" else 512
    a = torch.randn(width, width, device=device)
    settled = torch.cuda.synchronize if device.type == "cuda" else lambda: None  # a GPU has done what it was given

    def compute(times: int) -> float:
        settled()
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(a, a)
        settled()
        return time.perf_counter() - began

    times = max(1, round(options.step / min(compute(20) / 20 for _ in range(5))))
    savers = {
        background: Saver(place, Alone(mesh, model), control(mesh, str(background)), keep=1, background=background)
        for background in (False, True)
    }
    step = 0

    def timed(background: bool, computed: int = 0) -> tuple[float, float]:
        """Seconds until the weights may change, and until the save is complete."""
        nonlocal step
        step += 1
        os.sync()
        began = time.perf_counter()
        savers[background].start(step, model, optimizer, {})
        compute(computed)
        savers[background].copied()
        settled()  # an update comes after the copies in the order of its stream
        stalled = time.perf_counter() - began
        outcome = savers[background].wait()
        assert outcome is not None
        assert not outcome.reason, outcome
        return stalled, time.perf_counter() - began

    for number in range(options.rounds + 1):
        took = {}
        for digest in ((NoDigest, hashlib.sha256), (hashlib.sha256, NoDigest))[number % 2]:  # neither always comes first
            save.PieceDigest = lambda pool, digest=digest: plain(pool, digest)
            took[digest] = timed(False)[1]
        save.PieceDigest = plain
        without, with_digest = took[NoDigest], took[hashlib.sha256]
        at_once, whole = timed(True)
        beside = timed(True, times)[0] - compute(times)
        began = time.perf_counter()
        for file in sorted((place / f"step_{step}").glob("*.safetensors")):
            files.hash_file(file, PIECE)
        alone = time.perf_counter() - began
        if number:  # the first round makes the host buffers and warms the disk
            for kind, value in zip(kinds, (without, with_digest, at_once, beside, whole, alone), strict=True):
                kinds[kind].append(value)
    size = sum(path.stat().st_size for path in (place / f"step_{step}").iterdir())
    shutil.rmtree(place)
    middle = {f"{kind}_s": round(statistics.median(values), 4) for kind, values in kinds.items()}
    pairs = [d / p - 1 for d, p in zip(kinds["digest"], kinds["plain"], strict=True)]
    row = {
        "bench": "checkpoint", "disk": options.disk or "real", "bytes": size, "rounds": options.rounds, **middle,
        **{f"{kind}_best_s": round(min(values), 4) for kind, values in kinds.items()},
        "spread_plain_s": [round(min(kinds["plain"]), 4), round(max(kinds["plain"]), 4)],
        "checksum_share": round(middle["digest_s"] / middle["plain_s"] - 1, 4),
        "checksum_share_of_pairs": round(statistics.median(pairs), 4),
        "stall_share": round(middle["background_stall_s"] / middle["digest_s"], 4),
        "stall_share_beside_a_step": round(middle["background_stall_beside_a_step_s"] / middle["digest_s"], 4),
        "checksum_share_of_best": round(min(kinds["digest"]) / min(kinds["plain"]) - 1, 4),
        "stall_share_of_best": round(min(kinds["background_stall"]) / min(kinds["digest"]), 4),
        "cpu": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(), "step_s": options.step,
        **run_facts(device, 1, " ".join(["python", *sys.argv])),
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    with Path(options.output).open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
