"""The folder that `lss data tokenize` writes, as it is read: tokens.json, and what stands beside the ids."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lss.config.errors import Refused

FORMAT, INDEX = 1, "tokens.json"
_LARGEST = 64 << 20
_NAME = re.compile(r"part-[0-9]{5,}\.(bin|ends|trained)")


def read_index(folder: Path) -> dict[str, Any]:
    """tokens.json of a folder, its files' sizes held against it.

    Raises:
        Refused: it is none, or a file is missing or of another size, by name.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        index = None
    if not isinstance(index, dict) or index.get("format") != FORMAT or not _sound(index):
        raise Refused(f"{path}: not the index of a folder of tokens of format {FORMAT}; make it anew by lss data tokenize.")
    for name, entry in index["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            size = -1
        if size != entry["bytes"]:
            what = "is missing" if size < 0 else f"has {size:,} bytes"
            raise Refused(f"{folder / name}: {what}, and {INDEX} tells of {entry['bytes']:,}; make the folder anew.")
    return index


def _sound(index: dict[str, Any]) -> bool:
    whole = ("vocab_size", "token_bytes", "tokens", "documents")
    if not all(type(index.get(key)) is int and index[key] >= 0 for key in whole) or not isinstance(index.get("files"), dict):
        return False
    return index["token_bytes"] in (1, 2, 4) and all(
        isinstance(name, str) and _NAME.fullmatch(name) and isinstance(entry, dict) and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str) for name, entry in index["files"].items()
    )  # fmt: skip


def token_files(index: dict[str, Any]) -> list[str]:
    """Names of the files of ids, in order."""
    return sorted(name for name in index["files"] if name.endswith(".bin"))


def document_ends(folder: Path, index: dict[str, Any]) -> np.ndarray:
    """int64: where each document ends in the row of all files' ids.

    Raises:
        Refused: what is recorded does not rise.
    """
    files = token_files(index)
    sizes = [index["files"][name]["bytes"] // index["token_bytes"] for name in files]
    starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    parts = [np.fromfile((folder / name).with_suffix(".ends"), "<i8") + start
             for name, (start, _) in zip(files, pairwise(starts), strict=True)]  # fmt: skip
    ends = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if not len(ends) or ends[-1] != starts[-1]:
        ends = np.append(ends, starts[-1])
    if ends[0] <= 0 or (np.diff(ends) <= 0).any():
        raise Refused(f"{folder}: the recorded ends of its documents do not rise; make it anew by lss data tokenize.")
    return ends


def check_digests(folder: Path, index: dict[str, Any]) -> None:
    """Hold every byte of a folder against its digests.

    Raises:
        Refused: by the first file that differs.
    """
    for name, entry in index["files"].items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise Refused(f"{folder / name}: damaged, its SHA-256 is not that of {INDEX}; make the folder anew.")
