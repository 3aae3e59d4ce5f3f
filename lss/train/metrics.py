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
        last_step: rows after it are removed on opening, as is a torn last line: a resumed run writes them again. The
            file is replaced whole, so that a stop at any moment leaves the old rows or the kept ones.
        tensorboard: also write to TensorBoard; where it is not installed a notice goes to standard error.

    Numbers that are not finite are written as null, since JSON has no word for them.

    Raises:
        Refused: the file cannot be written, or one of its whole lines is damaged, by number; it is then left as it is.
    """

    def __init__(self, folder: Path, *, last_step: int = 0, tensorboard: bool = True) -> None:
        path = folder / "metrics.jsonl"
        try:
            truncate(path, last_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise Refused(f"{path}: cannot be written ({error.strerror}).") from error
        self._board = _tensorboard(folder / "tensorboard", last_step) if tensorboard else None

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
    """All rows of a metrics.jsonl, in the file's order.

    Raises:
        Refused: the file cannot be read or a line is damaged, by number.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}).") from error
    return [row for row, _ in _parse(data, path)]


def _parse(data: bytes, path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Every row with the line that it stands in."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        # type, not isinstance: true is an int to Python
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise Refused(f"{path}, line {number}: not a row of metrics; remove the line or the file.")
        rows.append((row, line))
    return rows


def truncate(path: Path, last_step: int) -> None:
    """Keep the rows up to a step, to the byte, and at once: the new file takes the old one's name when it is whole."""
    data = path.read_bytes() if path.exists() else b""
    # a stop in the middle of a write leaves a last line without its end
    whole = data[: data.rfind(b"\n") + 1]
    kept = b"".join(line + b"\n" for row, line in _parse(whole, path) if row["step"] <= last_step)
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("wb") as file:
        file.write(kept)
        file.flush()
        # else a power cut could leave the new name on an empty file
        os.fsync(file.fileno())
    os.replace(aside, path)


def _tensorboard(folder: Path, last_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed, so metrics go to metrics.jsonl only: "
              "pip install 'lss-transformer[tensorboard]'", file=sys.stderr)  # fmt: skip
        return None
    # hides what an earlier run wrote after the step that this one resumes from
    return SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU; on the CPU the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reserved_memory_bytes(device: torch.device) -> int:
    """The same with what the allocator keeps besides: all that the process has taken at its peak, tensors or not."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory_bytes(device)
