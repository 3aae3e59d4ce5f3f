"""`lss train`."""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from functools import partial
from pathlib import Path

from lss.cli.early import plan_beside, refuse_data, refuse_folder, refuse_options, warn_of_memory
from lss.cli.main import split_config
from lss.cli.ranks import (
    must_launch,
    planned_ranks,
    read_config,
    rendezvous_timeout,
    share_cores,
    told_once,
    without_launcher,
)
from lss.config import Config
from lss.config.errors import Failed, FailedElsewhere, Refused
from lss.train.signals import Signals


def train(options: argparse.Namespace, arguments: list[str], signals: Signals) -> int:
    """Train as one rank, or start the ranks that do; `signals`: heard since the command's start."""
    path, overrides = split_config(options.config)
    rendezvous, ranks = rendezvous_timeout(options), planned_ranks(options.nproc)
    with told_once():
        config = read_config(path, overrides, ranks, hf=True)
        refuse_folder(f"runs/{config.name}" if options.out is None else options.out)
        out = Path(options.out or f"runs/{config.name}")
        _refuse_early(config, out, options)
    if must_launch(options.nproc):
        from lss.launch import launch_local

        return launch_local(options.nproc, without_launcher(arguments), signals, max_restarts=options.max_restarts)
    return _train(config, out, rendezvous, signals)


def _refuse_early(config: Config, out: Path, options: argparse.Namespace) -> None:
    """What can be refused without ranks, so that it is said once."""
    from lss.cli.data import show_progress
    from lss.data.prepare import prepare
    from lss.train.models import find_model
    from lss.train.saving import find_resumable
    from lss.train.start import find_start

    subject = find_model(config, out)
    config = subject.config
    refuse_options(config, options.nproc, subject.source)
    if find_resumable(config, out) is None:
        find_start(config)
    # ranks that are started from here share the reading out
    refuse_data(config, scan=not must_launch(options.nproc), out=out)
    if must_launch(options.nproc):  # while no rank waits for it
        prepare(config, out, show_progress("tokenising"))


def _train(config: Config, out: Path, rendezvous: timedelta, signals: Signals) -> int:
    import torch

    from lss.comm import Watch, control
    from lss.hosts import out_of_memory
    from lss.mesh import close, first_to_refuse, init_mesh
    from lss.planner import Meter
    from lss.train.stopping import newest_words
    from lss.train.trainer import Trainer

    share_cores()
    if config.train.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, which it reads when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    assert isinstance(config.parallel.cp, int)
    # before the ranks meet: a trace makes a process group of its own
    warn_of_memory(config)
    planned = plan_beside(config)
    # a little longer than the watch's, which can say who is stuck
    timeout = timedelta(seconds=config.train.timeout + 5)
    mesh = init_mesh(cp=config.parallel.cp, dp=config.parallel.dp, timeout=timeout, rendezvous=rendezvous)
    try:
        agreed = control(mesh, "memory")
        meter, start = Meter(config, torch.device(mesh.device_type), agreed), agreed.gather(os.urandom(6).hex())[0]
        newest = partial(newest_words, out / "checkpoints")
        with Watch(mesh, config.train.timeout, newest) as watch, told_once(mesh):
            signals.before_leaving = lambda name, code: watch.leave("stopped", name, code)
            try:
                told = {"on_end": _report, "on_step": planned}
                Trainer(config, mesh, out, signals=signals, watch=watch, meter=meter, **told).train()
            except Exception as error:
                watch.explain(error)
                if not out_of_memory(error):
                    raise
                # where all ranks are alike all run short: one sentence is told
                kind = Failed if first_to_refuse(mesh, f"out of memory {start}") else FailedElsewhere
                raise kind(meter.sentence(error)) from None
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
