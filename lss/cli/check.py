"""`lss check`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from lss.cli.early import refuse_data, refuse_options
from lss.cli.main import split_config
from lss.cli.ranks import (
    launch,
    must_launch,
    planned_ranks,
    read_config,
    rendezvous_timeout,
    share_cores,
    told_once,
)
from lss.config import Config
from lss.config.errors import refuse

if TYPE_CHECKING:
    from lss.check import CheckResult


def check(options: argparse.Namespace, arguments: list[str]) -> int:
    """Check as one rank, or start the ranks that do; 1 where anything differs beyond the dtype's bound."""
    path, overrides = split_config(options.config)
    rendezvous, ranks = rendezvous_timeout(options), planned_ranks(options.nproc)
    with told_once():
        config = read_config(path, overrides if options.hf is None else _for_hf(overrides), ranks)
        if options.hf is None:
            refuse_options(_short(config), options.nproc)
            refuse_data(_short(config), scan=not must_launch(options.nproc))
    if must_launch(options.nproc):
        return launch(options.nproc, arguments)
    return _check(config, rendezvous, options.hf)


def _short(config: Config) -> Config:
    """The config at the most tokens that a check computes with."""
    assert isinstance(config.parallel.cp, int)
    seq_len = min(config.data.seq_len, 64 * config.parallel.cp)
    share = config.parallel.dp * config.train.accumulate
    train = replace(config.train, batch_size=share, eval_every=0)
    return replace(config, data=replace(config.data, seq_len=seq_len), train=train)


def _for_hf(overrides: list[str]) -> list[str]:
    """The overrides of a check of a Hugging Face model: float64 where nothing is said, and no model of ours."""
    for override in overrides:
        if override.startswith("model."):
            raise refuse(override.split("=")[0], override.split("=", 1)[1], "--hf names the model; leave it out")
    given = [override for override in overrides if override.startswith("train.dtype=")]
    return overrides if given else [*overrides, "train.dtype=float64"]


def _check(config: Config, rendezvous: timedelta, hf: str | None) -> int:
    from lss.check import check_config, check_hf
    from lss.mesh import close, init_mesh

    share_cores()
    assert isinstance(config.parallel.cp, int)
    mesh = init_mesh(cp=config.parallel.cp, dp=config.parallel.dp, rendezvous=rendezvous)
    try:
        with told_once(mesh):
            result = check_config(config, mesh) if hf is None else check_hf(hf, config, mesh)
        if mesh.get_rank() == 0:
            _print(config if hf is None else replace(config, name=hf), result, hf)
    finally:
        close()
    return 0 if result.ok else 1


def _print(config: Config, result: CheckResult, hf: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # a pipe has no width; a table squeezed into 80 columns cannot be read
    console = console if console.is_terminal else Console(width=120)
    parallel = config.parallel
    assert isinstance(parallel.cp, int)
    for at in result.lengths:
        title = (f"{config.name}, {at.seq_len} tokens: cp {parallel.cp} x dp {parallel.dp}, {parallel.strategy}, "
                 f"{parallel.order}, {config.train.dtype}")  # fmt: skip
        table = Table("", "one rank", f"{parallel.cp * parallel.dp} ranks", "error", "bound", "", title=title)
        table.add_row("loss", f"{at.loss_one:.9f}", f"{at.loss:.9f}", f"{at.loss_error:.1e}", f"{at.loss_bound:.0e}",
                      _mark(at.loss_error <= at.loss_bound))  # fmt: skip
        error, bound = at.gradients[at.worst]
        fits = all(e <= b for e, b in at.gradients.values())
        table.add_row("worst gradient", f"of {len(at.gradients)}", at.worst, f"{error:.1e}", f"{bound:.0e}", _mark(fits))
        table.add_row("labels counted", f"{at.labels_one:,}", f"{at.labels:,}", "", "", _mark(at.labels == at.labels_one))
        if at.documents > 1:
            table.add_row("documents", f"{at.documents}", f"{at.documents}")
        for probe in at.probes:
            found = f"{probe.leaked} of {probe.checked:,} changed" if probe.affected else "nothing changed anywhere"
            table.add_row(probe.name, "", found, f"{probe.leaked}", "0", _mark(probe.ok))
        table.add_section()
        table.add_row("tokens a rank", f"{at.seq_len:,}", f"{at.local_len:,}")
        ratio = at.saved_bytes / max(at.saved_bytes_one, 1)
        table.add_row("kept for backward, a rank", _size(at.saved_bytes_one), f"{_size(at.saved_bytes)}, {ratio:.2f} of it")
        table.add_section()
        for kind, purpose, calls, size in at.collectives:
            table.add_row(f"{kind} of {purpose}", "", f"{calls} calls, {_size(size)}")
        console.print(table)
    micro, layers = config.train.accumulate, config.model.n_layers
    through = f"{micro} micro-batch(es) through {layers} layers" if hf is None else "one micro-batch"
    console.print(f"Collectives: payload of one step of {through}, per rank.", highlight=False)
    if result.work:
        ratios = ", ".join(f"{ratio:.3f} {order}" for order, ratio in result.work.items())
        console.print(f"Attention work of the busiest rank over the mean, at {config.data.seq_len:,} tokens: {ratios}.",
                      highlight=False)  # fmt: skip
    worst = max((at.gradients[at.worst] for at in result.lengths), key=lambda pair: pair[0] / pair[1])
    verdict = "equal to one process" if result.ok else "NOT equal to one process"
    console.print(f"check: {verdict}; worst gradient {worst[0]:.1e}, bound {worst[1]:.0e}", style="bold", highlight=False)


def _mark(ok: bool) -> str:
    return "[green]ok[/]" if ok else "[bold red]DIFFERS[/]"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
