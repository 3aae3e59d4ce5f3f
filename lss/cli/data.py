"""`lss data`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lss.config.errors import refuse


def data(options: argparse.Namespace) -> int:
    """Fetch a corpus, or describe one."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if options.action == "fetch":
        from lss.data.fetch import fetch

        console.print(f"{fetch(options.name, Path(options.to))}: complete, SHA-256 as expected")
        return 0
    from lss.data.info import describe
    from lss.data.sources import ByteCorpus

    if options.seq_len < 1:
        raise refuse("--seq-len", options.seq_len, "give a whole number of tokens, 1 or more")
    table = Table("fact", "value", title="data")
    for name, value in describe(ByteCorpus(options.path), options.seq_len).items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table, markup=False)
    return 0
