"""`lss report`."""

from __future__ import annotations

import argparse
from pathlib import Path


def _item(folder: Path) -> str:
    """What a run's loss is per: a byte, or a token where its data were token ids."""
    from lss.report.runs import read_runs

    (run,) = read_runs([folder])
    return "token" if run.facts.get("config.data.source") == "tokens" else "byte"


def report(options: argparse.Namespace) -> int:
    """Make one HTML page of runs, benches and plans."""
    from lss.report import build_report
    from lss.report.runs import METRICS
    from lss.train.evaluate import bits
    from lss.train.metrics import read_metrics

    folders = [Path(folder) for folder in options.folders]
    page = build_report(folders, Path(options.output) if options.output else None)
    for folder in [folder for folder in folders if (folder / METRICS).is_file()]:
        held_out = [row["eval_loss"] for row in read_metrics(folder / METRICS) if row.get("eval_loss") is not None]
        if held_out:
            of = f" ({folder})" if len(folders) > 1 else ""
            print(f"held-out: {bits(held_out[-1]):.2f} bits per {_item(folder)}{of}")
    print(f"report: {page}")
    return 0
