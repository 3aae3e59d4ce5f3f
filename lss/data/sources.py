"""A corpus of bytes: any file, folder or glob, read in place through memory maps; what it shares with one of tokens."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from lss.config.errors import Refused, refuse
from lss.data.permutation import permute

# Folders of the standard library that hold no library source: installed packages, tests, caches.
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
_OPEN_MAPS = 64


@dataclass(frozen=True)
class Piece:
    """Where a file's items lie: `count` of `dtype` from byte `offset` on."""

    file: Path
    count: int
    dtype: np.dtype
    offset: int = 0

    @property
    def end(self) -> int:
        """The byte after the last item."""
        return self.offset + self.count * self.dtype.itemsize


class Corpus:
    """The items of some files, one after another in the order of their names; bytes or token ids.

    Items stay on disk: memory held is the table of files.

    Args:
        name: what to call it.
        base: the folder that names are relative to.
        pieces: of files that are not empty, in order.

    Attributes:
        files, sizes: the files, in the order of their relative POSIX names, and their items.
        digest: SHA-256 over relative names, sizes and kinds, for telling a changed corpus when a run goes on.
        unit, item: what an item is called, many and one.
        dtype: what `read` returns.
    """

    unit, item = "bytes", "byte"
    dtype = np.dtype(np.uint8)

    def __init__(self, name: str, base: Path, pieces: Sequence[Piece]) -> None:
        self.name, self.pieces = name, list(pieces)
        self.files = [piece.file for piece in pieces]
        self.sizes = [piece.count for piece in pieces]
        self._ends = list(accumulate(self.sizes))
        digest = hashlib.sha256()
        for piece in pieces:
            kind = "" if piece.dtype == np.uint8 else f" {piece.dtype.str}"
            digest.update(os.fsencode(piece.file.relative_to(base).as_posix()) + f"\0{piece.count}{kind}\n".encode())
        self.digest = digest.hexdigest()
        # few maps are open at a time: a corpus may have more files than a process may open
        self._map = lru_cache(maxsize=_OPEN_MAPS)(self._open)

    def __len__(self) -> int:
        return self._ends[-1]

    def _open(self, number: int) -> np.ndarray:
        piece = self.pieces[number]
        return np.memmap(piece.file, dtype=piece.dtype, mode="r", offset=piece.offset, shape=(piece.count,))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Items [start, stop) of the corpus: a copy of just those.

        Raises:
            Refused: a file is gone, or has become shorter, since the corpus was opened.
        """
        parts = [self.read_file(*which) for which in self.within(start, stop)]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(file, start, stop) of the stretches of files that make items [start, stop)."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        while start < stop:
            number = bisect_right(self._ends, start)
            first = self._ends[number] - self.sizes[number]
            end = min(stop, self._ends[number])
            yield number, start - first, end - first
            start = end

    def read_file(self, number: int, start: int, stop: int) -> np.ndarray:
        """Items [start, stop) of one file."""
        piece = self.pieces[number]
        try:
            # a map that outlives the end of its file reads zeros there, or kills the process
            if piece.file.stat().st_size < piece.end:
                raise Refused(f"{piece.file}: shorter than when the run began; restore it or start a new run.")
            return self._map(number)[start:stop].astype(self.dtype, copy=False)
        except OSError as error:
            reason = error.strerror or error
            raise Refused(f"{piece.file}: cannot be read any more ({reason}); restore it or start a new run.") from None

    def scan(self, part: int = 0, parts: int = 1) -> None:
        """Read what might be refused, or a share of it; of bytes there is nothing."""

    def document_ends(self) -> np.ndarray:
        """int64, where each document ends in the row of all items: each file is one."""
        return np.asarray(self._ends, np.int64)

    def read_trained(self, start: int, stop: int) -> np.ndarray | None:
        """Which of the items [start, stop) are trained on, bool; None where all are."""
        return None

    def split(self, held_out: float) -> tuple[Split, Split]:
        """(training part, held-out part): the last `held_out` fraction of the items is held out."""
        border = len(self) - round(len(self) * held_out)
        return Split(self, 0, border, "training"), Split(self, border, len(self), "held-out")


class ByteCorpus(Corpus):
    """The bytes of some files.

    Args:
        path: a file, a folder (all regular files below it, hidden ones left out), or a glob; empty for the running
            Python's own standard-library sources, which are always there.

    Raises:
        Refused: nothing is there, or it cannot be read, or it is empty.
    """

    def __init__(self, path: str = "") -> None:
        base, files = find_files(path)
        sized = [(file, file_size(file)) for file in files]
        kept = [Piece(file, size, self.dtype) for file, size in sized if size]
        if not kept:
            raise refuse("data.path", repr(path), f"holds no bytes ({len(files)} files, all empty)")
        super().__init__(path or f"the standard library of Python {sysconfig.get_python_version()}", base, kept)


class Split:
    """Items [start, stop) of a corpus. Sample i of length S is its items [i*S, i*S + S + 1): S labels each."""

    def __init__(self, corpus: Corpus, start: int, stop: int, name: str) -> None:
        self.corpus, self.start, self.stop, self.name = corpus, start, stop, name

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> np.ndarray:
        """Items [start, stop) of this part."""
        return self.corpus.read(self.start + start, self.start + stop)

    def read_trained(self, start: int, stop: int) -> np.ndarray | None:
        """Which of the items [start, stop) of this part are trained on; None where all are."""
        return self.corpus.read_trained(self.start + start, self.start + stop)

    def documents(self) -> np.ndarray:
        """Where each document lies in this part: int64 (n, 2), [start, stop) in items of the part.

        Documents are cut at the part's borders; those that have nothing in it are left out.
        """
        ends = self.corpus.document_ends()
        spans = np.stack((np.concatenate(([0], ends[:-1])), ends), axis=1).clip(self.start, self.stop) - self.start
        return spans[spans[:, 1] > spans[:, 0]]

    def split_parts(self) -> list[tuple[Split, int]]:
        """(part, where it begins): samples do not reach from one into the next; here one part, from 0."""
        return [(self, 0)]

    def draw(self, number: int, samples: Sequence[int], seed: int) -> int:
        """The sample of number `number` in the order of all epochs, each a permutation of the `samples` there are."""
        epoch, place = divmod(number, samples[0])
        return permute(place, samples[0], seed, epoch)

    def samples(self, seq_len: int, ahead: int = 1) -> int:
        """How many sequences of `seq_len` tokens this part holds, with `ahead` items after the last; refuses 0."""
        longest = len(self) - ahead
        if longest < seq_len:
            fit = f"use {longest} or less, or more text" if longest > 0 else "give more text, in data.path"
            facts = f"the {self.name} part of {self.corpus.name} has {len(self):,} {self.corpus.unit}"
            needs = " and a sequence takes one more than its length" if ahead else ""
            raise refuse("data.seq_len", seq_len, f"{facts}{needs}; {fit}")
        return longest // seq_len


def find_files(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files in the order of their names."""
    if not path:
        base = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _below(base, _NOT_SOURCES) if file.suffix == ".py"]
        return base, _sorted(base, files)
    try:
        given = Path(path).expanduser()
        mode = os.stat(given).st_mode if os.path.lexists(given) else 0
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a name too long; no such ~user; a NUL
        raise refuse("data.path", _shown(path), f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISREG(mode):
        return given.parent, [given]
    if stat.S_ISDIR(mode):
        files = list(_below(given))
        if not files:
            raise refuse("data.path", repr(path), "the folder holds no files")
        return given, _sorted(given, files)
    if mode:
        raise refuse("data.path", repr(path), "not a regular file; give a file, a folder or a glob")
    if any(sign in path for sign in "*?["):
        # a set, since patterns with several ** meet a file on more than one way
        files = list({Path(name).absolute() for name in glob.glob(str(given), recursive=True) if os.path.isfile(name)})
        if not files:
            raise refuse("data.path", repr(path), "no file matches")
        base = Path(os.path.commonpath([file.parent for file in files]))
        return base, _sorted(base, files)
    raise refuse("data.path", _shown(path), "no such file or folder; give a file, a folder or a glob")


def _below(folder: Path, without: Set[str] = frozenset()) -> Iterator[Path]:
    """Regular files under a folder, hidden ones and the folders `without` left out.

    Links to files are followed, links to folders are not, since they may lead in a circle.
    """

    def refuse_folder(error: OSError) -> None:
        raise refuse("data.path", error.filename, f"cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(parent, name)):
                yield Path(parent, name)


def file_size(file: Path) -> int:
    try:
        if not os.access(file, os.R_OK):
            raise refuse("data.path", file, "no permission to read it")
        return file.stat().st_size
    except OSError as error:
        raise refuse("data.path", file, f"cannot be read ({error.strerror})") from None


def _sorted(base: Path, files: list[Path]) -> list[Path]:
    return sorted(files, key=lambda file: file.relative_to(base).as_posix())


def _shown(path: str) -> str:
    return repr(path) if len(path) < 300 else f"{path[:57]!r}..."
