"""Rows of results: their keys, the JSONL file that a bench appends to and resumes from, and what every row tells."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lss.config.errors import Refused

Row = dict[str, Any]
# In a row's order. What a bench does not know, or what does not exist there, is null.
KEYS = (
    "bench", "strategy", "kernel", "rival", "order", "options", "model", "layers", "tokens", "batch", "heads", "dtype",
    "graph", "world_size", "gpu", "ms", "spread", "rounds", "ideal_ms", "no_comm_ms", "tokens_per_s", "tflops", "mfu",
    "error", "peak_bytes", "limit_bytes", "token_layer_bytes", "confirmed", "outside_bytes", "payload_bytes", "calls",
    "status", "commit", "versions", "command",
)  # fmt: skip
# What makes two rows measurements of the same thing.
IDENTITY = ("bench", "strategy", "kernel", "rival", "order", "options", "model", "layers", "tokens", "batch", "heads",
            "dtype", "graph", "world_size", "gpu")  # fmt: skip
# Packages whose versions decide a time, where they are installed.
PACKAGES = ("flash-attn-4", "fla-core", "nvidia-cutlass-dsl", "triton", "nvidia-nccl-cu13", "nvidia-cudnn-cu13",
            "liger-kernel")  # fmt: skip


def identity(row: Row) -> str:
    """A row's identity as one string. What a search for the longest sequence finds is no part of what it looks for."""
    keys = [key for key in IDENTITY if row.get("bench") != "length" or key != "tokens"]
    return json.dumps([row.get(key) for key in keys], sort_keys=True)


def full_row(known: Row, facts: Row) -> Row:
    """A row with every key in its order: what is known of a measurement over the facts of the run."""
    unknown = known.keys() - set(KEYS)
    assert not unknown, unknown
    return {key: known.get(key, facts.get(key)) for key in KEYS}


class Results:
    """A JSONL file of rows that is appended to; every rank reads it, the first rank writes.

    Beside it stands FILE.running while a candidate takes a step: a run that dies there (a rank that hangs in a collective
    is ended by its library, not by an exception) finds on its next start what it died in. What two runs in a row died in
    is passed over; one may have been stopped from outside.

    Args:
        path: the file; None keeps rows nowhere.
        writes: whether this rank writes.
        retry: count rows that are not "ok" as not done.

    Raises:
        Refused: the file cannot be read or written, or has a damaged line.
    """

    def __init__(self, path: Path | None, *, writes: bool, retry: bool = False) -> None:
        self.path, self.writes = path, writes
        rows = read_rows([path]) if path is not None and path.exists() else []
        self._done = {identity(row) for row in rows if row["status"] == "ok" or not retry}
        self._mark = None if path is None else path.with_name(f"{path.name}.running")
        self._left: tuple[str, int] = ("", 0)
        if self._mark is not None and self._mark.exists():
            with suppress(ValueError):
                self._left = tuple(json.loads(self._mark.read_text()))
        if path is not None and writes:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            except OSError as error:
                raise Refused(f"{path}: cannot be written ({error.strerror}).") from error

    def done(self, row: Row) -> bool:
        """Whether a row of this identity is there."""
        return identity(row) in self._done

    def killed(self, row: Row) -> bool:
        """Whether the last two runs ended in a step of this one, without coming back from it."""
        return self._left[0] == identity(row) and self._left[1] > 1

    def begin(self, row: Row) -> None:
        """Note what is about to take a step."""
        if self._mark is not None and self.writes:
            name = identity(row)
            self._mark.write_text(json.dumps([name, 1 + (self._left[1] if self._left[0] == name else 0)]))

    def end(self) -> None:
        """It has come back from it, well or not."""
        if self._mark is not None and self.writes:
            self._mark.unlink(missing_ok=True)

    def add(self, row: Row) -> None:
        """Append a row."""
        self._done.add(identity(row))
        if self.path is not None and self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _finite(row: Row) -> Row:
    """JSON has no word for numbers that are not finite."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """All rows of these files that are a bench's; of several measurements of one thing the last.

    Raises:
        Refused: a file cannot be read or a line is damaged, by number.
    """
    found: dict[str, Row] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}).") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not {"bench", "status"} <= row.keys():
                raise Refused(f"{path}, line {number}: not a row of a bench; remove the line or name another file.")
            # files of other measurements may lie beside: rows of benchmarks/masks.py have a mask, which no key here tells
            if row.keys() <= set(KEYS):
                found.pop(identity(row), None)
                found[identity(row)] = row
    return list(found.values())


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu" and its architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def run_facts(device: torch.device, world: int, command: str) -> Row:
    """What every row of a run tells alike."""
    return {"gpu": device_name(device), "world_size": world, "commit": _commit(), "versions": _versions(device),
            "command": command}  # fmt: skip


def _commit() -> str | None:
    """The commit of the library's own sources, with "+" where they were changed since; None outside git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", *arguments), cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        # a library installed inside another repository is not part of it
        if git("ls-files", Path(__file__).name):
            return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", "..") else "")
    return None


def _versions(device: torch.device) -> dict[str, str]:
    found = {"lss": _version("lss-transformer") or "0", "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _driver() or "unknown"
        found |= {name: text for name in PACKAGES if (text := _version(name)) is not None}
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    with suppress(OSError):
        return driver_version(Path("/proc/driver/nvidia/version").read_text())
    return None


def driver_version(text: str) -> str | None:
    """The number in what the kernel tells of Nvidia's module, "... Kernel Module for x86_64  580.159.04  Release ..."."""
    found = re.search(r"Kernel Module\D.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None
