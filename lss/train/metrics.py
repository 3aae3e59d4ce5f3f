"""A run's numbers: one JSON object a step, and the same in TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lss.config.errors import Refused

KEYS = ("step", "loss", "grad_norm", "lr", "tokens_counted", "tokens_per_s", "peak_memory_bytes", "step_time_s", "mfu")


class MetricsWriter:
    """Appends rows to `folder/metrics.jsonl`, flushed at once, and to `folder/tensorboard` where it is installed.

    Args:
        folder: the run's folder, which exists.
        last_step: rows after it are removed on opening, as are torn lines: a resumed run writes them again.

    Numbers that are not finite are written as null, since JSON has no word for them.
    """

    def __init__(self, folder: Path, *, last_step: int = 0) -> None:
        path = folder / "metrics.jsonl"
        kept = [row for row in _rows(path) if row["step"] <= last_step] if path.exists() else []
        aside = folder / ".metrics.jsonl.writing"
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(aside, path)
        self._file = path.open("a")
        self._board = _tensorboard(folder / "tensorboard", last_step)

    def write(self, row: dict[str, Any]) -> None:
        """Write one step's row: the fixed keys in their order, then any others, such as eval_loss."""
        ordered = {key: row[key] for key in KEYS} | row
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in ordered.items()
        }
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                if key != "step" and value is not None:
                    self._board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl.

    Raises:
        Refused: the file cannot be read or a line is damaged, by number.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read ({error}).") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise Refused(f"{path}, line {number}: not a row of metrics; remove the line or the file.")
        rows.append(row)
    return rows


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file whose end may be torn by a stop in the middle of writing it."""
    text = path.read_text()
    if text and not text.endswith("\n"):
        aside = path.with_name(".metrics.jsonl.whole")
        aside.write_text(text[: text.rfind("\n") + 1])
        rows = read_metrics(aside)
        aside.unlink()
        return rows
    return read_metrics(path)


def _tensorboard(folder: Path, last_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU; on the CPU the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
