"""Rows that benches and plans write, read with care, and grouped by what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lss.config.errors import refuse
from lss.report.runs import LARGEST_FILE, METRICS, parsed, read_bytes

Row = dict[str, Any]
PLANS, STRATEGIES = "plans", "strategies, planned"


@dataclass(frozen=True)
class Sheet:
    """Rows of one kind: "bench NAME", "plans", "strategies, planned", or of anything else the name of their file."""

    name: str
    rows: list[Row]


def row_files(path: Path) -> list[Path]:
    """The files of rows that it names: itself, or a folder's where it is not a run's; none: it is something else."""
    if path.is_dir():
        return [] if (path / METRICS).is_file() else sorted(file for file in path.glob("*.jsonl") if file.is_file())
    return [path] if path.suffix == ".jsonl" and path.is_file() and path.name != METRICS else []


def read_sheets(files: Sequence[Path]) -> list[Sheet]:
    """The rows of these files.

    Raises:
        Refused: one is given twice, is too large, cannot be read, or has a line that is no JSON object; all are empty.
    """
    found: dict[str, list[Row]] = {}
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise refuse("DIR", file, "is given twice; give each file once")
        seen.add(file.resolve())
        size = file.stat().st_size
        if size > LARGEST_FILE:
            raise refuse("DIR", file, f"has {size:,} bytes; a page is made of {LARGEST_FILE:,} at most")
        for number, line in enumerate(read_bytes(file).splitlines(), 1):
            row = parsed(line, f"{file}, line {number}")
            found.setdefault(_kind(row, file), []).append(row)
    if files and not found:
        raise refuse("DIR", files[0], "holds no row yet; give files that lss bench or lss plan --out has written to")
    return [Sheet(name, rows) for name, rows in found.items()]


def _kind(row: Row, file: Path) -> str:
    if isinstance(row.get("bench"), str):
        return f"bench {row['bench']}"
    if isinstance(row.get("plan"), str):
        return PLANS
    if {"strategy", "ranks", "tokens", "status"} <= row.keys():
        return STRATEGIES
    return file.stem
