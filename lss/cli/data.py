"""`lss data`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lss.config.errors import refuse

if TYPE_CHECKING:
    from lss.data.bins import Bins, Series


def data(options: argparse.Namespace) -> int:
    """Fetch a corpus, make tokens of one, or describe one."""
    if options.action == "fetch":
        from lss.data.fetch import fetch

        print(f"{fetch(options.name, Path(options.to))}: complete, SHA-256 as expected")
        return 0
    return _tokenize(options) if options.action == "tokenize" else _info(options)


def _tokenize(options: argparse.Namespace) -> int:
    from lss.data.tokenize import Recipe, tokenize

    field = options.field or ("messages" if options.chat else "text")
    recipe = Recipe(options.tokenizer, options.format, field, options.chat, *_series(options))
    out = Path(options.output)
    index = tokenize(options.inputs, recipe, out, processes=options.processes, progress=show_progress("tokenising"))
    print(f"{out}: {index['tokens']:,} tokens of {index['documents']:,} documents in {index['inputs']:,} files; "
          f"lss train data.source=tokens data.path={out}")  # fmt: skip
    return 0


def _series(options: argparse.Namespace) -> tuple[Series | None, Bins | None]:
    """How numbers become ids, and the bins where they are there already."""
    from lss.data.bins import Series, bins_of
    from lss.data.token_folder import read_index
    from lss.data.tokenizer import SERIES

    series = Series(options.columns, options.bins, options.binning, options.nan, options.held_out)
    if options.tokenizer != SERIES:
        if series != Series() or options.bins_of is not None:
            given = "--columns, --bins, --binning, --nan, --held-out and --bins-of"
            raise refuse("--tokenizer", options.tokenizer, f"{given} are of numbers; use none, or give \"series\"")
        return None, None
    if options.bins < 2:
        raise refuse("--bins", options.bins, "give a whole number, 2 or more")
    if not 0 < options.held_out <= 0.5:
        raise refuse("--held-out", options.held_out, "give a number above 0, up to 0.5")
    if options.bins_of is None:
        return series, None
    if series != Series(series.columns):
        raise refuse("--bins-of", options.bins_of, "leave out --bins, --binning, --nan and --held-out, which it says")
    folder = Path(options.bins_of).expanduser()
    bins = bins_of(folder, read_index(folder))
    if bins is None:
        raise refuse("--bins-of", options.bins_of, "its tokens are no numbers; give a folder made with --tokenizer series")
    return series, bins


def _info(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from lss.data.info import describe, describe_series, describe_tokens, is_series, is_tokens
    from lss.data.sources import ByteCorpus

    if options.seq_len < 1:
        raise refuse("--seq-len", options.seq_len, "give a whole number of tokens, 1 or more")
    if options.path and is_series(options.path):
        facts = describe_series(options.path, options.seq_len)
    elif options.path and is_tokens(options.path):
        facts = describe_tokens(options.path, options.seq_len, options.token_bytes)
    else:
        facts = describe(ByteCorpus(options.path), options.seq_len)
    table = Table("fact", "value", title="data")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table, markup=False)
    return 0


def show_progress(what: str) -> Callable[[int, int], None]:
    """A bar on a terminal, lines elsewhere: to be called with (bytes done, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    task = progress.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)
        if done >= total:
            progress.stop()

    return show
