"""`lss plan --compare`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lss.cli.main import split_config
from lss.cli.plan import plannable
from lss.cli.plan_out import make_folder
from lss.config import Config, load_config


def compare(options: argparse.Namespace) -> int:
    """Plan the config's step with every strategy, over ranks and lengths; print tables, and write them where asked."""
    path, overrides = split_config(options.config)
    config = plannable(path, overrides)
    folder = None if options.out is None else make_folder(options.out)  # before minutes of work

    from rich.console import Console

    from lss.planner import find_hardware
    from lss.planner.compare import LENGTHS, RANKS, Row
    from lss.planner.compare import compare as rows_of
    from lss.planner.compare_tables import tables
    from lss.planner.tracers import Tracers

    def build(settings: Sequence[str], ranks: int) -> Config:
        return load_config(path, [*overrides, *settings]).resolved(ranks)

    lengths = (config.data.seq_len,) if any(o.startswith("data.seq_len=") for o in overrides) else LENGTHS
    ranks = [n for n in RANKS if options.gpus is None or n <= options.gpus]
    console = Console(stderr=True)
    # processes are forked before the console's thread begins
    with Tracers() as tracers, console.status("planning") as status:

        def note(row: Row) -> None:
            status.update(f"{row['strategy']}, {row['ranks']:,} ranks, {row['tokens']:,} tokens")

        rows = rows_of(build, find_hardware(options.gpu), ranks, lengths, note, tracers)
    text = tables(rows)
    print(text, end="")
    if folder is not None:
        _write(folder, rows, text)
    return 0


def _write(folder: Path, rows: Sequence[dict], text: str) -> None:
    from lss.planner.compare import COMPARED, WEAK
    from lss.report.plots import Curve, line_plot

    (folder / "strategies-planned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "strategies-planned.md").write_text(text)

    def plot(name: str, of: Sequence[dict]) -> None:
        curves = []
        for colour, (strategy, label) in enumerate(COMPARED.items()):
            points = sorted((r["ranks"], r["seconds"]) for r in of if r["strategy"] == strategy and r["status"] == "ok")
            if points:
                curves.append(Curve(label, [n for n, _ in points], [s for _, s in points], colour, points=True))
        if curves:
            (folder / name).write_text(line_plot(curves, "seconds a step", x_label="ranks", log=True))

    plot("strategies-weak.svg", [row for row in rows if row["tokens"] == WEAK * row["ranks"]])
    for tokens in sorted({row["tokens"] for row in rows}):
        plot(f"strategies-strong-{tokens}.svg", [row for row in rows if row["tokens"] == tokens])
    print(f"written: {folder}")
