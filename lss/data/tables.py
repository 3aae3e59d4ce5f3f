"""Numbers in columns: CSV, NPY and NPZ files, read in rows from the first to the last in little memory."""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lss.config.errors import Refused, refuse
from lss.data.npy import npy_header

SUFFIXES = (".csv", ".tsv", ".npy", ".npz")
_VALUES = 1 << 16  # numbers at a time, so that memory does not grow with the files
_LINE = 1 << 20  # characters that tell what stands between cells
_CANNOT = (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
Chunks = Iterator[np.ndarray]


@dataclass(frozen=True)
class Table:
    """The chosen columns of one file.

    Attributes:
        names: of the columns, in the order in which they are read.
        chunks: begins a reading: float64 (rows, columns), the rows in order, NaN where a cell is empty.
    """

    file: Path
    names: tuple[str, ...]
    chunks: Callable[[], Chunks]

    def checked(self, nan: bool) -> Chunks:
        """The chunks, values that no bin holds refused: infinite ones, and NaN unless `nan`."""
        row = 1
        for chunk in self.chunks():
            bad = np.isinf(chunk) if nan else ~np.isfinite(chunk)
            if bad.any():
                at, column = (int(i) for i in np.argwhere(bad)[0])
                what = chunk[at, column]
                fit = "give it an id (data.nan=true), or fill it" if np.isnan(what) else "bins are finite; remove it"
                raise Refused(f"{self.file}: row {row + at:,} of column {self.names[column]!r} is {what}; {fit}.")
            yield chunk
            row += len(chunk)


def open_table(file: Path, columns: Sequence[str] = ()) -> Table:
    """The columns of a file by their names or numbers (from 0); all where none are named. No pickle is ever loaded.

    Raises:
        Refused: a file of another kind, that cannot be read, or has no such column.
    """
    kind = file.suffix.lower()
    if kind not in SUFFIXES:
        raise refuse("data.path", file, f"a numeric series is read from {', '.join(SUFFIXES)}; give such files")
    return (_csv if kind in (".csv", ".tsv") else _npy if kind == ".npy" else _npz)(file, columns)


def _pick(file: Path, names: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Where the chosen columns stand."""
    places = []
    for column in columns or [str(number) for number in range(len(names))]:
        named = [place for place, name in enumerate(names) if name == column] if columns else []
        if not named and column.isdecimal() and int(column) < len(names):
            named = [int(column)]
        if len(named) != 1:
            have = f"{file} has two of that name; give a number" if named else f"{file} has {', '.join(names[:20])}"
            raise refuse("data.columns", column, have)
        if named[0] in places:
            raise refuse("data.columns", column, f"named twice, for {file}; leave one out")
        places += named
    return places


def _number(cell: str) -> float | None:
    """A cell's number, NaN where it is empty, None where it is text."""
    cell = cell.strip()
    try:
        # Python reads 1_000 as a number; a table that has it means something else
        return math.nan if not cell else None if "_" in cell else float(cell)
    except ValueError:
        return None


def _csv(file: Path, columns: Sequence[str]) -> Table:
    lines = _lines(file)
    _, first = next(lines, (0, []))
    lines.close()
    if not first:
        raise Refused(f"{file}: empty; a series has rows of numbers.")
    numbers = [_number(cell) for cell in first]
    # names alone make a header: a first row with a date and numbers is data
    header = all(number is None or math.isnan(number) for number in numbers) and None in numbers
    names = [cell.strip() if header and cell.strip() else str(place) for place, cell in enumerate(first)]
    picked = _pick(file, names, columns)

    def chunks() -> Chunks:
        rows: list[list[float]] = []
        for number, (line, cells) in enumerate(_lines(file)):
            if header and not number:
                continue
            if len(cells) != len(names):
                raise Refused(f"{file}, line {line:,}: {len(cells)} cells, and the first line has {len(names)}; correct it.")
            rows.append(row := [])
            for place in picked:
                if (value := _number(cells[place])) is None:
                    raise Refused(f"{file}, line {line:,}: {cells[place][:40]!r} in column {names[place]!r} is no number; "
                                  "correct it, or choose other columns (data.columns).")  # fmt: skip
                row.append(value)
            if len(rows) * len(picked) >= _VALUES:
                yield np.array(rows, np.float64)
                rows = []
        if rows:
            yield np.array(rows, np.float64)

    return Table(file, tuple(names[place] for place in picked), chunks)


def _lines(file: Path) -> Generator[tuple[int, list[str]], None, None]:
    """(number of the line, cells) of each line that is not empty."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            start = stream.readline(_LINE)
            stream.seek(0)
            mark = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=start.count)
            reader = csv.reader(stream, delimiter=mark)
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not UTF-8 text ({error.reason}); save it as CSV in UTF-8.") from None
    except csv.Error as error:
        raise Refused(f"{file}: no CSV that can be read ({error}); save it anew.") from None
    except OSError as error:
        raise refuse("data.path", file, f"cannot be read ({error.strerror})") from None


def _shape(what: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many columns an array makes; refuses what is no series."""
    if dtype.hasobject:
        raise Refused(f"{what}: holds Python objects, which are never loaded; save numbers.")
    if dtype.kind not in "biuf":
        raise Refused(f"{what}: holds {dtype}, not real numbers; save floats or whole numbers.")
    if len(shape) not in (1, 2) or not all(shape):
        raise Refused(f"{what}: has the shape {shape}; a series is (rows,) or (rows, columns), neither of them 0.")
    return shape[1] if len(shape) == 2 else 1


def _npy(file: Path, columns: Sequence[str]) -> Table:
    try:
        with file.open("rb") as stream:
            shape, fortran, dtype = npy_header(stream, str(file))
            offset, size = stream.tell(), file.stat().st_size
    except OSError as error:
        raise refuse("data.path", file, f"cannot be read ({error.strerror})") from None
    width = _shape(str(file), shape, dtype)
    needs = offset + math.prod(shape) * dtype.itemsize
    if size < needs:
        raise Refused(f"{file}: cut off at byte {size:,}, and its header tells of {needs:,} bytes; save it anew.")
    names = [str(number) for number in range(width)]
    picked = _pick(file, names, columns)

    def chunks() -> Chunks:
        order = "F" if fortran else "C"
        whole = np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(shape[0], width), order=order)
        step = max(1, _VALUES // len(picked))
        for start in range(0, shape[0], step):
            yield np.asarray(whole[start : start + step, picked], np.float64)

    return Table(file, tuple(names[place] for place in picked), chunks)


def _npz(file: Path, columns: Sequence[str]) -> Table:
    """Arrays of one length; of an array of two dimensions each column is called ARRAY.0, ARRAY.1, ..."""
    try:
        with zipfile.ZipFile(file) as archive:
            heads = {}
            for member in archive.namelist():
                if member.endswith(".npy"):
                    with archive.open(member) as stream:
                        heads[member[:-4]] = npy_header(stream, f"{file}, array {member[:-4]!r}")
    except _CANNOT as error:
        raise Refused(f"{file}: no NPZ that can be read ({str(error)[:100]}); save it anew.") from None
    used = [a for a in heads if not columns or any(c == a or c.startswith(f"{a}.") for c in columns)]
    names: dict[str, list[str]] = {}
    for array in used:
        shape, fortran, dtype = heads[array]
        what = f"{file}, array {array!r}"
        width = _shape(what, shape, dtype)
        if fortran and width > 1:
            raise Refused(f"{what}: stands column by column, and rows are read one after another; save it in C order.")
        if shape[0] != heads[used[0]][0][0]:
            other = f"array {used[0]!r} has {heads[used[0]][0][0]:,}"
            raise Refused(f"{what}: has {shape[0]:,} rows, and {other}; choose arrays of one length (data.columns).")
        names[array] = [array] if len(shape) == 1 else [f"{array}.{number}" for number in range(width)]
    if not used:
        have = ", ".join(list(heads)[:20]) or "none"
        raise refuse("data.columns", ",".join(columns) or "''", f"{file} has the arrays {have}")
    places = [(array, number, name) for array in used for number, name in enumerate(names[array])]
    wanted = [name for column in columns for name in names.get(column, [column])]
    chosen = [places[place] for place in _pick(file, [name for *_, name in places], wanted)]
    return Table(file, tuple(name for *_, name in chosen), partial(_npz_chunks, file, chosen, heads))


def _npz_chunks(file: Path, chosen: Sequence[tuple[str, int, str]], heads: dict[str, Any]) -> Chunks:
    used = list(dict.fromkeys(array for array, *_ in chosen))
    rows = heads[used[0]][0][0]
    widths = {array: math.prod(heads[array][0][1:]) for array in used}
    step = max(1, _VALUES // sum(widths.values()))
    with ExitStack() as scope:
        try:
            archive = scope.enter_context(zipfile.ZipFile(file))
            streams = {array: scope.enter_context(archive.open(f"{array}.npy")) for array in used}
            for array, stream in streams.items():
                npy_header(stream, f"{file}, array {array!r}")
            for start in range(0, rows, step):
                count = min(step, rows - start)
                parts = {a: _take(streams[a], (count, widths[a]), heads[a][2], f"{file}, array {a!r}") for a in used}
                yield np.stack([parts[array][:, number] for array, number, _ in chosen], axis=1).astype(np.float64)
        except _CANNOT as error:
            raise Refused(f"{file}: no NPZ that can be read ({str(error)[:100]}); save it anew.") from None


def _take(stream: BinaryIO | Any, shape: tuple[int, int], dtype: np.dtype, what: str) -> np.ndarray:
    needs = shape[0] * shape[1] * dtype.itemsize
    data = stream.read(needs)
    if len(data) < needs:
        raise Refused(f"{what}: cut off, its header tells of more rows; save it anew.")
    return np.frombuffer(data, dtype).reshape(shape)
