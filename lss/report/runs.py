"""A run's files, read with care: they may be damaged, huge, or made by something else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lss.config.errors import Refused, refuse

METRICS = "metrics.jsonl"
LARGEST_FILE = 1 << 30  # bytes of metrics; a run of four million steps stays below
LARGEST_STEP = 1 << 53  # beyond it a float, and so a plot, cannot tell steps apart
MOST_FACTS = 1000  # of run.json; what is more is counted, not shown


@dataclass(frozen=True)
class Run:
    """One run's files. `rows` has at least one row, each with an int `step`; `facts` is run.json, flattened.

    A fact's name is its path, as in `config.data.seq_len` and `hosts[0].name`.
    """

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    facts: dict[str, Any]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one key; rows where it is absent or not a finite number are left out."""
        pairs = [(row["step"], value) for row in self.rows if (value := number(row.get(key))) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def values(self, key: str) -> list[float]:
        """The finite values of one key."""
        return self.series(key)[1]


def number(value: Any) -> float | None:
    """A finite number as a float; None for anything else, and for true and false, which Python counts as ints."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read each folder's metrics.jsonl and, where it is there, run.json.

    Raises:
        Refused: no folder, one folder twice, no metrics in one, or a damaged file, by line.
    """
    if not folders:
        raise refuse("DIR", "", "no folder is given; give one or more folders of runs")
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise refuse("DIR", folders[i], "is given twice; give each run once")
    names = [folder.name for folder in resolved]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_read(folder, _printable(name)) for folder, name in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> Run:
    path = folder / METRICS
    if not path.is_file():
        fit = "holds no metrics.jsonl and no rows of a bench or a plan; give the folder of a run, or such rows"
        raise refuse("DIR", folder, fit)
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise refuse("DIR", folder, f"its metrics.jsonl has {size:,} bytes; a page is made of {LARGEST_FILE:,} at most")
    lines = read_bytes(path).removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise refuse("DIR", folder, "its metrics.jsonl is empty: no step has been done yet")
    rows = [_row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]
    facts = folder / "run.json"
    return Run(name, folder, rows, flatten(parsed(read_bytes(facts), str(facts))) if facts.is_file() else {})


def read_bytes(path: Path) -> bytes:
    """A file's bytes, or a refusal."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}).") from error


def _row(line: bytes, where: str) -> dict[str, Any]:
    row = parsed(line, where)
    step = row.get("step")
    if type(step) is not int or not 0 <= step < LARGEST_STEP:
        raise Refused(f"{where}: not a row of metrics, it has no step that is a whole number.")
    return row


def parsed(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object, or a refusal that says where it is not one."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise Refused(f"{where}: damaged (nested too deep).") from None
    except ValueError as error:
        raise Refused(f"{where}: damaged ({error}).") from None
    if not isinstance(value, dict):
        raise Refused(f"{where}: not a JSON object.")
    return value


def _printable(text: str) -> str:
    """A folder's name may hold bytes that are no text; a page cannot."""
    return text.encode("utf-8", "replace").decode()


def flatten(facts: dict[str, Any]) -> dict[str, Any]:
    """Nested objects and lists as one level of `a.b[0].c`; a list of plain values stays one fact.

    Keeps the order of the file and the first `MOST_FACTS` facts; the rest becomes one that counts them.
    """
    flat: dict[str, Any] = {}
    left_out = 0
    # a stack, not recursion: the depth is the file's choice
    waiting: list[tuple[str, Any]] = [("", facts)]
    while waiting:
        path, value = waiting.pop()
        inner: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            inner = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
        elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
            inner = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        elif len(flat) < MOST_FACTS:
            flat[path] = ", ".join(map(plain, value)) if isinstance(value, list) else value
        else:
            left_out += 1
        waiting += reversed(inner)
    return flat | ({"...": f"{left_out:,} more"} if left_out else {})


def plain(value: Any) -> str:
    """A value as a reader of the page wants it: numbers short, nothing as nothing, nested values not at all."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "(nested)" if isinstance(value, (dict, list)) else str(value)
