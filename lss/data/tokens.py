"""A corpus of token ids: `.bin` files of raw little-endian numbers, and `.npy` files of one dimension."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from lss.config.errors import Refused, refuse
from lss.data.bins import Bins, bins_of
from lss.data.npy import npy_header
from lss.data.sources import Corpus, Piece, Split, file_size, find_files
from lss.data.token_folder import INDEX, document_ends, read_index, token_files

SUFFIXES = (".bin", ".npy")
TOKEN_BYTES = (2, 4)
_BLOCK = 1 << 20  # items at a time, so that memory does not grow with the files


class TokenCorpus(Corpus):
    """The token ids in some files, each file a document.

    Args:
        path: a file, a folder (its files that end in .bin or .npy, hidden ones left out), a glob, or a folder that
            `lss data tokenize` wrote, which knows the documents' ends and what is trained on.
        vocab_size: ids are below this.
        token_bytes: of an id in a .bin file, 2 or 4; unsigned and little-endian. A .npy file says its own.

    Raises:
        Refused: nothing is there, a file cannot be read, is empty, cut off, of a size that no ids make, or a .npy file
            that holds anything but whole numbers in one dimension; by its name and byte. Ids are not read: `scan` does.
    """

    unit, item = "tokens", "token"
    dtype = np.dtype(np.int64)

    def __init__(self, path: str, vocab_size: int, token_bytes: int = 2) -> None:
        if not path:
            raise refuse("data.path", "''", 'data.source="tokens" needs a file, a folder or a glob of .bin or .npy files')
        self._folder, self._index = Path(path).expanduser(), {}
        if (self._folder / INDEX).is_file():
            self._index = read_index(self._folder)
            token_bytes = self._index["token_bytes"]
            if self._index["vocab_size"] > vocab_size:
                fit = f"its tokens are of {self._index['tokenizer']!r}, of {self._index['vocab_size']} ids"
                raise refuse("data.path", repr(path), f"{fit}, and the model has {vocab_size}; use one of that vocabulary")
            base, files = self._folder, [self._folder / name for name in token_files(self._index)]
        else:
            base, files = find_files(path)
        kept = [file for file in files if file.suffix in SUFFIXES]
        if not kept:
            fit = f"none of its {len(files)} files ends in .bin or .npy" if len(files) > 1 else "not a .bin or .npy file"
            raise refuse("data.path", repr(path), f'{fit}; give files of token ids, or use data.source="bytes"')
        pieces = [_npy(file) if file.suffix == ".npy" else _raw(file, token_bytes) for file in kept]
        super().__init__(path, base, pieces)
        self.vocab_size = vocab_size
        if "series" in self._index:  # the same sizes by other bins are other data
            told = self.digest + json.dumps(self._index["series"], sort_keys=True)
            self.digest = hashlib.sha256(told.encode()).hexdigest()

    def document_ends(self) -> np.ndarray:
        """Where each document ends: as recorded beside the ids, or with its file."""
        return document_ends(self._folder, self._index) if self._index else super().document_ends()

    def read_trained(self, start: int, stop: int) -> np.ndarray | None:
        """Which ids are trained on, as recorded beside them."""
        if not self._index.get("trained"):
            return None
        parts = []
        for number, first, end in self.within(start, stop):
            piece = self.pieces[number]
            parts.append(np.fromfile(piece.file.with_suffix(".trained"), np.uint8, end - first, offset=first) != 0)
        return np.concatenate(parts) if parts else np.empty(0, bool)

    @property
    def tokenizer(self) -> str:
        """The tokenizer that made the ids, where that is recorded."""
        return self._index.get("tokenizer", "")

    @property
    def bins(self) -> Bins | None:
        """The bins that made the ids, where they were numbers."""
        return bins_of(self._folder, self._index)

    def split(self, held_out: float) -> tuple[Split, Split]:
        """(training part, held-out part).

        Raises:
            Refused: more is held out than when the bins of a numeric series were fitted, which then know of it.
        """
        bins = self.bins
        if bins is not None and held_out > bins.held_out:
            fit = f"the bins of {self.name} know all but the last {bins.held_out:g}; use that or less, or make it anew"
            raise refuse("data.held_out", held_out, fit)
        return super().split(held_out)

    def read_file(self, number: int, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of one file: int64.

        Raises:
            Refused: the file is gone or shorter, or has an id that is not in the vocabulary.
        """
        ids = super().read_file(number, start, stop)
        # a comparison as unsigned numbers finds the negative ones too
        if ids.size and ids.view(np.uint64).max() >= self.vocab_size:
            first = int(np.argmax(ids.view(np.uint64) >= self.vocab_size))
            piece = self.pieces[number]
            raise Refused(
                f"{piece.file}: id {self._shown(number, start + first)} at token {start + first:,} (byte "
                f"{piece.offset + (start + first) * piece.dtype.itemsize:,}) is not of the vocabulary, 0 to "
                f"{self.vocab_size - 1} (model.vocab_size={self.vocab_size}); correct the file, or the setting."
            )
        return ids

    def _shown(self, number: int, place: int) -> int:
        """An id as the file has it, which int64 need not hold."""
        return int(self._map(number)[place])

    def scan(self, part: int = 0, parts: int = 1) -> None:
        """Read every id once, by blocks, or those of every `parts`-th block from block `part` on.

        Raises:
            Refused: an id is not in the vocabulary, by file, place and byte.
        """
        block = 0
        for number, size in enumerate(self.sizes):
            for start in range(0, size, _BLOCK):
                if block % parts == part:
                    self.read_file(number, start, min(start + _BLOCK, size))
                block += 1


def _raw(file: Path, token_bytes: int) -> Piece:
    size = file_size(file)
    if not size:
        raise Refused(f"{file}: empty at byte 0; a document has 1 token or more, so remove it or fill it.")
    if size % token_bytes:
        raise Refused(
            f"{file}: {size:,} bytes do not make ids of data.token_bytes={token_bytes}, and the last begins at byte "
            f"{size - size % token_bytes:,}; restore the file, or correct the setting."
        )
    return Piece(file, size // token_bytes, np.dtype(f"<u{token_bytes}"))


def _npy(file: Path) -> Piece:
    size = file_size(file)
    if not size:
        raise Refused(f"{file}: empty at byte 0; a document has 1 token or more, so remove it or fill it.")
    shape, dtype, offset = _header(file)
    if dtype.hasobject:
        raise Refused(f"{file}: holds Python objects, which are never loaded; save whole numbers in one dimension.")
    if len(shape) != 1:
        raise Refused(f"{file}: has the shape {shape} (byte {offset:,} on); save it in one dimension.")
    piece = Piece(file, shape[0], dtype, offset)
    if size != piece.end:
        what = "cut off" if size < piece.end else "goes on"
        raise Refused(f"{file}: {what} at byte {min(size, piece.end):,}, and its header tells of {piece.end:,} bytes; "
                      "save it anew.")  # fmt: skip
    if dtype.kind not in "iu":
        raise Refused(f"{file}: holds {dtype}, not whole numbers{_first_nan(piece)}; save ids as uint16, uint32 or int64.")
    if not piece.count:
        raise Refused(f"{file}: no ids after its header (byte {offset}); remove it or fill it.")
    return piece


def _header(file: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, bytes of the header); nothing is loaded by it."""
    try:
        with file.open("rb") as stream:
            shape, _, dtype = npy_header(stream, str(file))
            return shape, dtype, stream.tell()
    except OSError as error:
        raise refuse("data.path", file, f"cannot be read ({error.strerror})") from None


def is_ids(file: Path) -> bool:
    """Whether a .npy file holds whole numbers in one dimension, or is no .npy file at all, which its reader tells."""
    try:
        shape, dtype, _ = _header(file)
    except Refused:
        return True
    return dtype.hasobject or (len(shape) == 1 and dtype.kind in "iu")


def _first_nan(piece: Piece) -> str:
    """Where a file of floats has its first NaN, in words."""
    if piece.dtype.kind != "f" or not piece.count:
        return ""
    values = np.memmap(piece.file, dtype=piece.dtype, mode="r", offset=piece.offset, shape=(piece.count,))
    for start in range(0, piece.count, _BLOCK):
        found = np.flatnonzero(np.isnan(values[start : start + _BLOCK]))
        if len(found):
            place = start + int(found[0])
            return f", and NaN at item {place:,} (byte {piece.offset + place * piece.dtype.itemsize:,})"
    return ""
