"""`lss train`."""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path

from lss.cli.early import refuse_data, refuse_folder, refuse_options
from lss.cli.main import split_config
from lss.cli.ranks import (
    must_launch,
    planned_ranks,
    read_config,
    rendezvous_timeout,
    share_cores,
    told_once,
    without_nproc,
)
from lss.config import Config
from lss.config.errors import Refused


def train(options: argparse.Namespace, arguments: list[str]) -> int:
    """Train as one rank, or start the ranks that do."""
    path, overrides = split_config(options.config)
    rendezvous, ranks = rendezvous_timeout(options), planned_ranks(options.nproc)
    with told_once():
        config = read_config(path, overrides, ranks)
        refuse_folder(f"runs/{config.name}" if options.out is None else options.out)
        out = Path(options.out or f"runs/{config.name}")
        _refuse_early(config, out, options)
    if must_launch(options.nproc):
        from lss.launch import launch_local

        return launch_local(options.nproc, without_nproc(arguments))
    return _train(config, out, rendezvous)


def _refuse_early(config: Config, out: Path, options: argparse.Namespace) -> None:
    """What can be refused without ranks, so that it is said once."""
    from lss.train.trainer import find_resumable

    refuse_options(config, options.nproc)
    find_resumable(config, out)
    # ranks that are started from here share the reading out
    refuse_data(config, scan=not must_launch(options.nproc))


def _train(config: Config, out: Path, rendezvous: timedelta) -> int:
    import torch

    from lss.mesh import close, init_mesh
    from lss.train.trainer import Trainer

    share_cores()
    if config.train.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, which it reads when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    assert isinstance(config.parallel.cp, int)
    mesh = init_mesh(cp=config.parallel.cp, dp=config.parallel.dp, rendezvous=rendezvous)
    try:
        with told_once(mesh):
            Trainer(config, mesh, out, on_end=_report).train()
    finally:
        close()
    return 0


def _report(out: Path) -> list[str]:
    """Make the run's page; a run does not fail for want of its plots."""
    from lss.report import build_report

    try:
        return [f"report: {build_report([out])}"]
    except Refused as refusal:
        return [f"no report: {refusal}"]
