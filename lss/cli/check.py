"""`lss check`."""

from __future__ import annotations

import argparse

from lss.cli.main import split_config
from lss.cli.ranks import must_launch, planned_ranks, read_config, share_cores, without_nproc
from lss.config import Config


def check(options: argparse.Namespace, arguments: list[str]) -> int:
    """Check as one rank, or start the ranks that do; 1 where anything differs beyond the dtype's bound."""
    path, overrides = split_config(options.config)
    config = read_config(path, overrides, planned_ranks(options.nproc))
    if must_launch(options.nproc):
        from lss.launch import launch_local

        return launch_local(options.nproc, without_nproc(arguments))
    return _check(config)


def _check(config: Config) -> int:
    from lss.check import check_config
    from lss.mesh import close, init_mesh

    share_cores()
    assert isinstance(config.parallel.cp, int)
    mesh = init_mesh(cp=config.parallel.cp, dp=config.parallel.dp)
    try:
        result = check_config(config, mesh)
        if mesh.get_rank() == 0:
            _print(config, result)
    finally:
        close()
    return 0 if result.ok else 1


def _print(config: Config, result) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    parallel = config.parallel
    ranks = parallel.cp * parallel.dp
    for at in result.lengths:
        error, bound = at.gradients[at.worst]
        table = Table(
            "what", "one rank", f"{ranks} ranks", "relative error", "bound", "",
            title=f"{config.name}: {at.seq_len} tokens over cp {parallel.cp}, dp {parallel.dp}, {parallel.strategy}, "
                  f"{parallel.order}, {config.train.dtype}",
        )  # fmt: skip
        table.add_row("loss", f"{at.loss_one:.9f}", f"{at.loss:.9f}", f"{at.loss_error:.1e}", f"{at.loss_bound:.0e}",
                      _mark(at.loss_error <= at.loss_bound))  # fmt: skip
        table.add_row(f"gradients of {len(at.gradients)} parameters, worst:\n{at.worst}", "", "", f"{error:.1e}",
                      f"{bound:.0e}", _mark(all(e <= b for e, b in at.gradients.values())))  # fmt: skip
        table.add_row("labels counted", "", f"{at.labels:,}", "", "", "")
        table.add_row("tokens a rank", f"{at.seq_len:,}", f"{at.local_len:,}", "", "", "")
        ratio = at.saved_bytes / max(at.saved_bytes_one, 1)
        # per rank: a dp rank takes 1/dp of the rows, a cp rank 1/cp of each
        table.add_row("kept for backward, a rank", _mib(at.saved_bytes_one), f"{_mib(at.saved_bytes)} ({ratio:.2f} of it)",
                      "", "", "")  # fmt: skip
        for kind, purpose, calls, size in at.collectives:
            table.add_row(f"{kind} ({purpose})", "", f"{calls} calls, {_mib(size)}", "", "", "")
        console.print(table)
    layers = config.model.n_layers * config.train.accumulate
    console.print(f"collectives are those of one step: {config.train.accumulate} micro-batch(es), {layers} layer passes",
                  highlight=False)  # fmt: skip
    console.print("check: equal to one process" if result.ok else "check: NOT equal to one process", style="bold",
                  highlight=False)  # fmt: skip


def _mark(ok: bool) -> str:
    return "[green]ok[/]" if ok else "[bold red]DIFFERS[/]"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
