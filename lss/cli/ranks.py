"""What `train` and `check` share: the number of ranks, and starting them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lss.config import Config, load_config
from lss.config.errors import refuse
from lss.mesh import rank_environment
from lss.train.signals import Signals


def planned_ranks(nproc: int | None) -> int:
    """Ranks of this run: the launcher's, else --nproc, else 1; refuses two that disagree."""
    environment = rank_environment()
    if environment is None:
        if nproc is not None and nproc < 1:
            raise refuse("--nproc", nproc, "give the number of ranks to start, 1 or more")
        return nproc or 1
    if nproc not in (None, environment.world_size):
        fit = f"{environment.launcher} started {environment.world_size} ranks already; leave it out"
        raise refuse("--nproc", nproc, fit)
    return environment.world_size


def must_launch(nproc: int | None) -> bool:
    """Whether this process is to start the ranks rather than be one."""
    return rank_environment() is None and nproc is not None and nproc > 1


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Start this command as `nproc` ranks and wait for them; for commands that leave nothing to save."""
    from lss.launch import launch_local

    with Signals(say=False) as signals:
        return launch_local(nproc, without_launcher(arguments), signals)


def read_config(path: str | None, overrides: Sequence[str], ranks: int) -> Config:
    """Load and validate the config for this many ranks."""
    return load_config(path, overrides).resolved(ranks)


def without_launcher(arguments: Sequence[str]) -> list[str]:
    """The command line that a started rank gets: without the options of whoever starts it."""
    options = ("--nproc", "--max-restarts")
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in options:
            skip = True
        elif not argument.startswith(tuple(f"{option}=" for option in options)):
            kept.append(argument)
    return kept


def share_cores() -> None:
    """Torch threads of this rank: its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    import torch

    environment = rank_environment()
    if environment is not None and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // environment.local_world_size))
