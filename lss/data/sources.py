"""A corpus of bytes: any file, folder or glob, read in place through memory maps."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from lss.config.errors import Refused, refuse

# Folders of the standard library that hold no library source: installed packages, tests, caches.
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


class ByteCorpus:
    """The bytes of some files, one after another in the order of their names.

    Args:
        path: a file, a folder (all regular files below it, hidden ones left out), or a glob; empty for the running
            Python's own standard-library sources, which are always there.

    Attributes:
        name: what to call it. files: the files. digest: SHA-256 over names and sizes, for telling a changed corpus.

    Raises:
        Refused: nothing is there, or it cannot be read, or it is empty.
    """

    def __init__(self, path: str = "") -> None:
        base, files = _find(path)
        sizes = []
        for file in files:
            try:
                sizes.append(file.stat().st_size)
                if not os.access(file, os.R_OK):
                    raise refuse("data.path", file, "no permission to read it")
            except OSError as error:
                raise refuse("data.path", file, f"cannot be read ({error.strerror})") from None
        kept = [(file, size) for file, size in zip(files, sizes, strict=True) if size]
        if not kept:
            raise refuse("data.path", repr(path), f"holds no bytes ({len(files)} files, all empty)")
        self.name = path or f"the standard library of Python {sysconfig.get_python_version()}"
        self.files = [file for file, _ in kept]
        self._ends = list(accumulate(size for _, size in kept))
        names = "".join(f"{file.relative_to(base).as_posix()}\0{size}\n" for file, size in kept)
        self.digest = hashlib.sha256(names.encode()).hexdigest()
        # few maps are open at a time: a corpus may have more files than a process may open
        self._map = lru_cache(maxsize=64)(self._open)

    def __len__(self) -> int:
        return self._ends[-1]

    def _open(self, number: int) -> np.ndarray:
        return np.memmap(self.files[number], dtype=np.uint8, mode="r")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of the corpus: uint8, a copy of just those.

        Raises:
            Refused: a file has become shorter since the corpus was opened.
        """
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        parts = []
        while start < stop:
            number = bisect_right(self._ends, start)
            first = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            part = self._map(number)[start - first : end - first]
            if len(part) != end - start:
                raise Refused(f"{self.files[number]}: shorter than when the run began; restore it or start a new run.")
            parts.append(part)
            start = end
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def split(self, held_out: float) -> tuple[Split, Split]:
        """(training part, held-out part): the last `held_out` fraction of the bytes is held out."""
        border = len(self) - round(len(self) * held_out)
        return Split(self, 0, border, "training"), Split(self, border, len(self), "held-out")


class Split:
    """Bytes [start, stop) of a corpus. Sample i of length S is its bytes [i*S, i*S + S + 1): S labels each."""

    def __init__(self, corpus: ByteCorpus, start: int, stop: int, name: str) -> None:
        self.corpus, self.start, self.stop, self.name = corpus, start, stop, name

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of this part."""
        return self.corpus.read(self.start + start, self.start + stop)

    def samples(self, seq_len: int) -> int:
        """How many sequences of `seq_len` labels this part holds; refuses 0."""
        count = (len(self) - 1) // seq_len
        if count < 1:
            raise refuse(
                "data.seq_len", seq_len, f"the {self.name} part of {self.corpus.name} has {len(self):,} bytes and a "
                f"sequence takes one more than its length; use {max(len(self) - 1, 1)} or less, or more text"
            )  # fmt: skip
        return count


def _find(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files in the order of their names."""
    if not path:
        base = Path(sysconfig.get_path("stdlib"))
        files = [f for f in base.rglob("*.py") if not _NOT_SOURCES & set(f.relative_to(base).parts)]
        return base, _sorted(base, files)
    given = Path(path).expanduser()
    if given.is_file():
        return given.parent, [given]
    if given.is_dir():
        files = [f for f in given.rglob("*") if f.is_file() and not _hidden(f.relative_to(given))]
        if not files:
            raise refuse("data.path", repr(path), "the folder holds no files")
        return given, _sorted(given, files)
    if any(sign in path for sign in "*?["):
        files = [Path(name) for name in glob.glob(str(given), recursive=True)]
        files = [f for f in files if f.is_file()]
        if not files:
            raise refuse("data.path", repr(path), "no file matches")
        base = Path(os.path.commonpath([f.parent.absolute() for f in files]))
        return base, _sorted(base, [f.absolute() for f in files])
    raise refuse("data.path", repr(path), "no such file or folder; give a file, a folder or a glob")


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _sorted(base: Path, files: list[Path]) -> list[Path]:
    return sorted(files, key=lambda file: file.relative_to(base).as_posix())
