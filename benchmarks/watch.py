"""What watching costs: time per step of the tiny model on two ranks with and without watch and agreement, in turns.

    python benchmarks/watch.py [STEPS] [key=value ...]

Starts two ranks on this machine. Blocks of steps with and without alternate, so that whatever else the machine does hits
both alike; prints the median step of either and their ratio, and the longest time that a thread of a rank had to wait for
Python's lock meanwhile and during a save.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

BLOCK = 10


class Waits(threading.Thread):
    """Sleeps a millisecond at a time; notes by how much it overslept, which is what the beat would be late by."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest, self.over = 0.0, False

    def run(self) -> None:
        """Until `over`."""
        while not self.over:
            before = time.monotonic()
            time.sleep(0.001)
            self.longest = max(self.longest, time.monotonic() - before - 0.001)


def measure(steps: int, overrides: list[str]) -> None:
    """One rank's part."""
    import torch

    from lss.comm import Watch
    from lss.config import load_config
    from lss.mesh import close, init_mesh
    from lss.train.signals import Signals
    from lss.train.stopping import Stopping
    from lss.train.trainer import Trainer

    torch.set_num_threads(1)
    config = load_config("configs/tiny.toml", overrides).resolved(2)
    mesh = init_mesh(cp=2)
    with tempfile.TemporaryDirectory() as folder, Signals() as signals:
        trainer = Trainer(config, mesh, Path(folder))
        agreeing, alone = Stopping(mesh, signals, 10), Stopping(mesh, None, 10)
        agreeing.begin(at_once=True)
        times: dict[bool, list[float]] = {True: [], False: []}
        waits = Waits()
        waits.start()
        step = 0
        for block in range(2 * steps // BLOCK):
            watched = block % 2 == 0
            trainer.stopping = agreeing if watched else alone
            with Watch(mesh, 600) if watched else nullcontext() as watch:
                trainer._at = watch.at if watched else lambda step, phase: None
                for _ in range(BLOCK):
                    step += 1
                    started = time.perf_counter()
                    trainer.train_step(step)
                    trainer.stopping.agree()
                    if block > 1:  # the first of each warm up
                        times[watched].append(time.perf_counter() - started)
        training, waits.longest = waits.longest, 0.0
        trainer.save(step)
        waits.over = True
        if mesh.get_rank() == 0:
            with_watch, without = (statistics.median(times[watched]) for watched in (True, False))
            lowest = min(times[True]) / min(times[False])
            print(json.dumps({
                "steps": len(times[True]), "with_ms": round(1e3 * with_watch, 3), "without_ms": round(1e3 * without, 3),
                "ratio": round(with_watch / without, 4), "ratio_of_fastest": round(lowest, 4),
                "lock_wait_training_ms": round(1e3 * training, 1), "lock_wait_save_ms": round(1e3 * waits.longest, 1),
            }))  # fmt: skip
    close()


def main(arguments: list[str]) -> int:
    """Start two ranks of this file, or be one."""
    steps = int(arguments[0]) if arguments and arguments[0].isdigit() else 200
    overrides = [argument for argument in arguments if "=" in argument]
    if "RANK" in os.environ:
        measure(steps, overrides)
        return 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", __file__, str(steps), *overrides]  # fmt: skip
    return subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
