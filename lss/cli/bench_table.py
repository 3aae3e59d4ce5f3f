"""Rows of a bench as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lss.bench.tables import label

_COLUMNS = ("", "heads", "tokens", "ms", "spread", "of ideal", "of no-comm", "TFLOP/s", "MFU", "peak MiB", "payload MiB",
            "calls", "error")  # fmt: skip


def rich_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a row; what a row has not is left empty."""
    first = rows[0] if rows else {}
    title = f"{first['bench']}, {first['dtype']}, {first['gpu']}" if rows else ""
    table = Table(title=title)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for row in rows:
        name = f"{label(row)}{', as a graph' if row.get('graph') else ''}"
        what = name if row["status"] == "ok" else f"{name}: {row['status']}"
        ms = row["ms"]
        share = [f"{row[key] / ms:.3f}" if row[key] and ms else "" for key in ("ideal_ms", "no_comm_ms")]
        table.add_row(
            what, row["heads"], _shown(row["tokens"], "{:,}"), _shown(ms, "{:,.3f}"), _shown(row["spread"], "{:.1%}"),
            *share, _shown(row["tflops"], "{:,.1f}"), _shown(row["mfu"], "{:.1%}"), *(_mib(row[key]) for key in
            ("peak_bytes", "payload_bytes")), _shown(row["calls"], "{:,}"), _shown(row["error"], "{:.1e}"),
        )  # fmt: skip
    return table


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.2f}"
