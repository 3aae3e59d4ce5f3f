"""`lss report`."""

from __future__ import annotations

import argparse
from pathlib import Path


def report(options: argparse.Namespace) -> int:
    """Make one HTML page of one or more runs."""
    from lss.report import build_report

    page = build_report([Path(folder) for folder in options.folders], Path(options.output) if options.output else None)
    print(f"report: {page}")
    return 0
