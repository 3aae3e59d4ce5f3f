"""What `train` and `check` share: the number of ranks, and starting them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from lss.config import Config, load_config
from lss.config.errors import Failed, FailedElsewhere, Refused, SaidElsewhere, refuse
from lss.environment import rank_environment
from lss.meeting import first_to_say, open_store
from lss.train.signals import Signals

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# How long a rank that refuses looks for others that may refuse the same.
HEARING = timedelta(seconds=4)


def planned_ranks(nproc: int | None) -> int:
    """Ranks of this run: the launcher's, else --nproc, else 1; refuses two that disagree."""
    environment = rank_environment()
    if environment is None:
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


def read_config(path: str | None, overrides: Sequence[str], ranks: int, *, hf: bool = False) -> Config:
    """Load and validate the config for this many ranks; `hf`: a model of transformers is taken too."""
    config = load_config(path, overrides)
    if config.model.hf and not hf:
        raise refuse("model.hf", config.model.hf, "lss train takes it; lss check has --hf MODEL for it")
    return config.resolved(ranks)


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


def rendezvous_timeout(options: argparse.Namespace) -> timedelta:
    """How long ranks wait for one another at the start."""
    return timedelta(seconds=options.rendezvous_timeout)


@contextmanager
def told_once(mesh: DeviceMesh | None = None) -> Iterator[None]:
    """Let one rank say what ends several alike: each passes on the sentence through the store that they meet at.

    Args:
        mesh: of the ranks, where they have met already.

    Raises:
        SaidElsewhere: instead of a refusal that another rank has told.
        FailedElsewhere: instead of a failure that another rank has told.
    """
    try:
        yield
    except (SaidElsewhere, FailedElsewhere):
        raise
    except (Refused, Failed) as error:
        if _is_mine(str(error), mesh):
            raise
        elsewhere = SaidElsewhere if isinstance(error, Refused) else FailedElsewhere
        raise elsewhere(str(error)) from None


def _is_mine(text: str, mesh: DeviceMesh | None) -> bool:
    if mesh is not None:
        from lss.mesh import first_to_refuse

        return first_to_refuse(mesh, text)
    environment = rank_environment()
    if environment is None or environment.world_size == 1:
        return True
    try:
        store = open_store(environment.place(), HEARING)
    except Refused:  # there is nobody to hear from, so this rank speaks for itself
        return True
    return first_to_say(store, environment.place(), text)


def share_cores() -> None:
    """Torch threads of this rank: its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    import torch

    environment = rank_environment()
    if environment is not None and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // environment.local_world_size))
