"""`lss train`."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from lss.cli.main import split_config
from lss.cli.ranks import must_launch, planned_ranks, read_config, share_cores, without_launcher
from lss.config import Config
from lss.config.errors import Refused, refuse
from lss.train.signals import Signals


def train(options: argparse.Namespace, arguments: list[str], signals: Signals) -> int:
    """Train as one rank, or start the ranks that do; `signals`: heard since the command's start."""
    path, overrides = split_config(options.config)
    config = read_config(path, overrides, planned_ranks(options.nproc))
    out = Path(options.out or f"runs/{config.name}")
    _refuse_early(config, out)
    if must_launch(options.nproc):
        from lss.launch import launch_local

        return launch_local(options.nproc, without_launcher(arguments), signals, max_restarts=options.max_restarts)
    return _train(config, out, signals)


def _refuse_early(config: Config, out: Path) -> None:
    """What can be refused without ranks, so that it is said once."""
    from lss.data.loader import EvalLoader, Loader
    from lss.data.sources import ByteCorpus
    from lss.segment import make_segment
    from lss.train.saving import find_resumable
    from lss.train.steps import loader_kind

    find_resumable(config, out)
    if out.exists() and not out.is_dir():
        raise refuse("--out", out, "a file of this name is there; give a folder")
    train, parallel = config.train, config.parallel
    training, held_out = ByteCorpus(config.data.path).split(config.data.held_out)
    assert isinstance(parallel.cp, int)
    segment = make_segment(config.data.seq_len, cp=parallel.cp, rank=0, order=parallel.order)
    shared = {"seq_len": config.data.seq_len, "dp": parallel.dp, "dp_rank": 0, "segment": segment}
    kind = loader_kind(config, None)
    Loader(training, batch_size=train.batch_size, accumulate=train.accumulate, seed=train.seed, **shared, **kind)
    if train.eval_every:
        EvalLoader(held_out, samples=train.eval_samples, rows_per_batch=1, **shared, **kind)


def _train(config: Config, out: Path, signals: Signals) -> int:
    from datetime import timedelta

    import torch

    from lss.comm import Watch
    from lss.mesh import close, init_mesh
    from lss.train.stopping import newest_words
    from lss.train.trainer import Trainer

    share_cores()
    if config.train.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, which it reads when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    assert isinstance(config.parallel.cp, int)
    # a little longer than the watch's, which can say who is stuck
    timeout = timedelta(seconds=config.train.timeout + 5)
    mesh = init_mesh(cp=config.parallel.cp, dp=config.parallel.dp, timeout=timeout)
    try:
        newest = partial(newest_words, out / "checkpoints")
        with Watch(mesh, config.train.timeout, newest) as watch:
            signals.before_leaving = lambda name, code: watch.leave("stopped", name, code)
            try:
                Trainer(config, mesh, out, on_end=_report, signals=signals, watch=watch).train()
            except Exception as error:
                watch.explain(error)
                raise
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
