"""Text as a model's token ids and back, by whatever it was trained on: bytes, nucleotides, or a tokenizer's tokens."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lss.config.errors import Refused, refuse

if TYPE_CHECKING:
    from lss.cli.target import Target
    from lss.data.bins import Bins

_BEFORE = 8  # ids before new ones that tell how their text begins


class Letters(Protocol):
    """How text and ids stand for each other; `end` is the id that ends a text, where there is one."""

    end: int | None

    def encode(self, text: bytes, setting: str) -> list[int]:
        """The ids of a prompt."""
        ...

    def more(self, ids: Sequence[int]) -> str:
        """The text that ids add to those given before."""
        ...


def letters_of(target: Target, tokenizer: str) -> Letters:
    """By `tokenizer`, where one is named, else by the model's config.

    Raises:
        Refused: its ids have no text that is known here.
    """
    from lss.data.tokenizer import NUCLEOTIDE, SERIES

    data, bins = target.config.data, target.bins
    if bins is not None and tokenizer in ("", SERIES):
        return _Numbers(bins)
    if not tokenizer and data.source == "bytes":
        return _Bytes()
    if tokenizer == NUCLEOTIDE or (not tokenizer and (data.source == "fasta" or data.reverse_complement)):
        return _Nucleotides()
    name = tokenizer or target.tokenizer or _recorded(data.path)
    if name == NUCLEOTIDE:
        return _Nucleotides()
    if name in ("", SERIES):
        fit = "it was trained on ids that no tokenizer is recorded for; name one, a folder or OWNER/NAME"
        raise refuse("--tokenizer", "''", fit)
    return _Tokens(name)


def _recorded(path: str) -> str:
    """The tokenizer that a folder of tokens records, if it is still there."""
    from pathlib import Path

    from lss.data.token_folder import read_index

    try:
        return str(read_index(Path(path).expanduser()).get("tokenizer", ""))
    except Refused:
        return ""


class _Bytes:
    end: int | None = None

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, text: bytes, setting: str) -> list[int]:
        """Each byte is an id."""
        return list(text)

    def more(self, ids: Sequence[int]) -> str:
        """A character that is not whole yet waits; an id that is no byte is shown as what is not known."""
        return "".join(self._decoder.decode(bytes([i])) if i < 256 else "\N{REPLACEMENT CHARACTER}" for i in ids)


class _Nucleotides:
    def __init__(self) -> None:
        from lss.data.tokenizer import END

        self.end: int | None = END

    def encode(self, text: bytes, setting: str) -> list[int]:
        """Letters of both cases; white space is passed over."""
        from lss.data.tokenizer import NUCLEOTIDE_IDS

        letters = b"".join(text.split())
        ids = [int(NUCLEOTIDE_IDS[letter]) for letter in letters]
        if 255 in ids:
            letter = chr(letters[ids.index(255)])
            raise refuse(setting, repr(letter), "no letter of a nucleotide; use A, C, G, T, and N for others")
        return ids

    def more(self, ids: Sequence[int]) -> str:
        """Letters."""
        from lss.data.tokenizer import LETTERS

        return "".join(LETTERS[i] if i < len(LETTERS) else "" for i in ids)


class _Numbers:
    """Rows of numbers, a line each, by the bins that the model was trained with."""

    end: int | None = None

    def __init__(self, bins: Bins) -> None:
        self._bins = bins

    def encode(self, text: bytes, setting: str) -> list[int]:
        """Numbers with commas or white space between, row by row; the last row may be a part."""
        channels, values = len(self._bins.channels), []
        for cell in text.decode("utf-8", "replace").replace(",", " ").split():
            try:
                values.append(float(cell))
            except ValueError:
                raise refuse(setting, repr(cell[:40]), f"no number; give rows of {channels}") from None
            if math.isinf(values[-1]) or (math.isnan(values[-1]) and not self._bins.nan):
                raise refuse(setting, cell, "no bin of the model holds it; give finite numbers")
        rows = np.zeros((-(-len(values) // channels), channels))
        rows.reshape(-1)[: len(values)] = values
        return self._bins.encode(rows)[: len(values)].tolist()

    def more(self, ids: Sequence[int]) -> str:
        """What the bins stand for; a line ends with the last column."""
        values, last = self._bins.decode(np.asarray(ids, np.int64)), len(self._bins.channels) - 1
        ends = ("\n" if i // self._bins.bins >= last else "," for i in ids)
        return "".join(f"{value:.6g}{end}" for value, end in zip(values, ends, strict=True))


class _Tokens:
    def __init__(self, name: str) -> None:
        from lss.data.tokenizer import Tokenizer

        self._tokenizer: Any = Tokenizer(name)
        self.end: int | None = self._tokenizer.end
        self._ids: list[int] = []  # the last ones, and the text that they are by themselves
        self._said = ""

    def encode(self, text: bytes, setting: str) -> list[int]:
        """By the tokenizer, without marks at the ends."""
        try:
            ids = self._tokenizer.encode(text.decode())
        except UnicodeDecodeError as error:
            raise refuse(setting, f"byte {error.start}", "not UTF-8 text; give such") from None
        self._keep(ids)
        return ids

    def _keep(self, ids: list[int]) -> None:
        self._ids = ids[-_BEFORE:]
        self._said = self._tokenizer.text_of(self._ids)

    def more(self, ids: Sequence[int]) -> str:
        """What they add to the text before them, which tells whether a space stands between; a part of a letter waits."""
        self._ids += ids
        text = self._tokenizer.text_of(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        added, self._said = text[len(self._said) :], text
        if len(self._ids) > 8 * _BEFORE:
            self._keep(self._ids)
        return added
