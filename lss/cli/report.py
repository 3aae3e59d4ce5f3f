"""`lss report`."""

from __future__ import annotations

import argparse
from pathlib import Path


def report(options: argparse.Namespace) -> int:
    """Make one HTML page of one or more runs."""
    from lss.report import build_report
    from lss.train.evaluate import bits_per_byte
    from lss.train.metrics import read_metrics

    folders = [Path(folder) for folder in options.folders]
    page = build_report(folders, Path(options.output) if options.output else None)
    for folder in folders:
        held_out = [row["eval_loss"] for row in read_metrics(folder / "metrics.jsonl") if row.get("eval_loss") is not None]
        if held_out:
            of = f" ({folder})" if len(folders) > 1 else ""
            print(f"held-out: {bits_per_byte(held_out[-1]):.2f} bits per byte{of}")
    print(f"report: {page}")
    return 0
