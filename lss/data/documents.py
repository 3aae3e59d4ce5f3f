"""Documents out of files: text, JSON lines, Parquet, FASTA and FASTQ; in parts that are read one by one in little memory."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from lss.config.errors import Refused, refuse

PART = 16 << 20  # bytes of input that make one part, and one file of tokens
CHUNK = 1 << 16  # bytes of text that are tokenised at once: more are slower
_LOOK = 4 << 20  # how far a place is looked for at which a text may be cut
_LONGEST_LINE = 1 << 30
# a line's end between two letters or signs, which tokenizers take for itself: there is more than one space elsewhere
_BREAK = re.compile(rb"(?<=[^\s])\n(?=[^\s])")
# where there is none, before the space between two words
_SPACE = re.compile(rb"(?<=[^\s]) (?=[^\s])")
FORMATS = ("text", "jsonl", "parquet", "fasta", "series")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_FASTA = (".fa", ".fasta", ".fna", ".ffn", ".fq", ".fastq")


@dataclass(frozen=True)
class Span:
    """A stretch of one file: bytes of text or JSON lines, row groups of Parquet, all of a FASTA file or a numeric series.

    `last`: the file ends with it.
    """

    file: str
    format: str
    start: int
    stop: int
    size: int
    last: bool


def format_of(file: Path) -> str:
    """A file's format by its name: text unless it says another."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if suffixes and suffixes[-1] in _FASTA:
        return "fasta"
    return _SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"


def split_files(files: Sequence[Path], format: str = "auto") -> list[list[Span]]:
    """The parts of some files, in order: stretches of about `PART` bytes, small files together."""
    parts: list[list[Span]] = [[]]
    room = PART
    for file in files:
        for span in _spans(file, format_of(file) if format == "auto" else format):
            if parts[-1] and span.size > room:
                parts.append([])
                room = PART
            parts[-1].append(span)
            room -= span.size
    return [part for part in parts if part]


def _spans(file: Path, format: str) -> Iterator[Span]:
    size = file.stat().st_size
    if not size:
        return
    if format == "parquet":
        groups = _parquet(file)
        for group in range(groups):
            yield Span(str(file), format, group, group + 1, -(-size // groups), group + 1 == groups)
        return
    if format in ("fasta", "series"):
        yield Span(str(file), format, 0, size, size, True)
        return
    with file.open("rb") as stream:
        start = 0
        while start < size:
            stop = _cut(stream, start + PART, size, format)
            yield Span(str(file), format, start, stop, stop - start, stop == size)
            start = stop


def _cut(stream: BinaryIO, at: int, end: int, format: str) -> int:
    """The first place from `at` on where a file may be cut, or its end."""
    if at >= end:
        return end
    first = max(at - 2, 0)
    stream.seek(first)
    block = stream.read(_LOOK)
    if format == "jsonl":
        found = block.find(b"\n", at - 1 - first)
        while found < 0:
            first, block = first + len(block), stream.read(_LOOK)
            if not block:
                return end
            found = block.find(b"\n")
        return min(first + found + 1, end)
    match = _BREAK.search(block, at - 1 - first)
    if match:
        return min(first + match.end(), end)
    match = _SPACE.search(block, at - first)
    if match:
        return min(first + match.start(), end)
    place = at
    while place < min(end, first + len(block)) and block[place - first] & 0xC0 == 0x80:
        place += 1  # not inside of a character
    return place


def texts(span: Span) -> Iterator[tuple[str, bool]]:
    """(text, whether the document ends with it) of a stretch of a text file, which is one document.

    Raises:
        Refused: bytes that are not UTF-8, by their place.
    """
    with open(span.file, "rb") as stream:
        start = span.start
        while start < span.stop:
            stop = min(_cut(stream, start + CHUNK, span.stop, span.format), span.stop)
            stream.seek(start)
            raw = stream.read(stop - start)
            try:
                yield raw.decode("utf-8"), span.last and stop == span.stop
            except UnicodeDecodeError as error:
                fit = "not UTF-8 text; convert the file, or leave it out"
                raise Refused(f"{span.file}: byte {start + error.start:,} is {fit}.") from None
            start = stop


def records(span: Span, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of a stretch of JSON lines or Parquet.

    Raises:
        Refused: a line that is no JSON object, or without the field.
    """
    if span.format == "parquet":
        yield from _rows(span, field)
        return
    with open(span.file, "rb") as stream:
        stream.seek(span.start)
        at = span.start
        while at < span.stop:
            line = stream.readline(_LONGEST_LINE)
            where = f"{span.file}, byte {at:,}"
            at += len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise Refused(f"{where}: not a JSON object in one line; JSON lines have one a line.")
            yield where, record


def _rows(span: Span, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(span.file)
    names = file.schema_arrow.names
    if field not in names:
        raise refuse("--field", field, f"{span.file} has the columns {', '.join(names[:20])}")
    row = 0
    for batch in file.iter_batches(batch_size=256, row_groups=list(range(span.start, span.stop)), columns=[field]):
        for value in batch.column(0).to_pylist():
            yield f"{span.file}, row {row:,} of row group {span.start}", {field: value}
            row += 1


def _parquet(file: Path) -> int:
    """Row groups of a Parquet file."""
    if find_spec("pyarrow") is None:
        raise Refused(f"{file}: pyarrow is not installed; pip install 'lss-transformer[data]'.")
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file).num_row_groups
    except (OSError, pyarrow.ArrowException) as error:
        raise Refused(f"{file}: no Parquet file that can be read ({str(error).splitlines()[0][:100]}).") from None


def sequences(span: Span) -> Iterator[tuple[bytes, bool]]:
    """(letters, whether the sequence ends with them) of a FASTA or FASTQ file, gzipped or not."""
    opened = gzip.open if span.file.endswith(".gz") else open
    try:
        with opened(span.file, "rb") as stream:  # type: ignore[operator]
            first = stream.read(1)
            if first not in (b">", b"@"):
                raise Refused(f"{span.file}: begins with {first!r}; FASTA begins with '>', FASTQ with '@'.")
            yield from (_fasta if first == b">" else _fastq)(stream, span.file)
    except (OSError, EOFError) as error:
        raise Refused(f"{span.file}: cannot be read ({error}).") from None


def _fasta(stream: Any, _name: str) -> Iterator[tuple[bytes, bool]]:
    stream.readline()  # the rest of the first name
    begins, held, size = True, [], 0
    # pieces of lines, since a whole chromosome may stand in one
    while line := stream.readline(CHUNK):
        if begins and line.startswith(b">"):
            while not line.endswith(b"\n") and line:
                line = stream.readline(CHUNK)
            yield b"".join(held), True
            held, size = [], 0
            continue
        begins = line.endswith(b"\n")
        held.append(line.strip())
        size += len(line)
        if size >= CHUNK:
            yield b"".join(held), False
            held, size = [], 0
    yield b"".join(held), True


def _fastq(stream: Any, name: str) -> Iterator[tuple[bytes, bool]]:
    stream.readline(CHUNK)
    while letters := stream.readline(_LONGEST_LINE):
        plus, quality = stream.readline(CHUNK), stream.readline(_LONGEST_LINE)
        if not plus.startswith(b"+") or len(quality.strip()) != len(letters.strip()):
            raise Refused(f"{name}: a read before byte {stream.tell():,} is not four lines of FASTQ.")
        yield letters.strip(), True
        if not stream.readline(CHUNK):
            return


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 over the files' sizes and both of their ends, by which other files of the same names are told."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(4096)
            stream.seek(max(0, size - 4096))
            digest.update(f"{size}\0".encode() + head + stream.read(4096))
    return digest.hexdigest()
