"""How many bytes of text some items stand for, so that models of different tokens can be compared."""

from __future__ import annotations

import numpy as np

from lss.config.errors import Refused
from lss.data.sources import ByteCorpus, Split
from lss.data.tokenizer import END, NUCLEOTIDE, SERIES, Tokenizer
from lss.data.tokens import TokenCorpus

_BLOCK = 1 << 20  # items at a time


def text_bytes(split: Split, runs: np.ndarray, tokenizer: str = "") -> int | None:
    """Bytes of the text that the items of these runs stand for, but for the first of each run.

    Of nucleotides a letter is a byte. Of other tokens they are counted in what the tokenizer makes of the ids, 2**20 at a
    time; a letter that such a block cuts is counted as the tokenizer shows its parts.

    Args:
        runs: int64 (n, 2), [start, stop) in items of the part.
        tokenizer: where that of the ids is to be found, by default by the name that the ids' folder records.

    Returns:
        None where the tokenizer is not known or not at hand, or some items are not trained on.
    """
    total = 0
    for part, begin in split.split_parts():
        inside = runs[(runs[:, 0] >= begin) & (runs[:, 1] <= begin + len(part))] - begin
        found = _of_part(part, inside, tokenizer)
        if found is None:
            return None
        total += found
    return total


def _of_part(part: Split, runs: np.ndarray, tokenizer: str) -> int | None:
    corpus = part.corpus
    if isinstance(corpus, ByteCorpus):
        return int((runs[:, 1] - runs[:, 0] - 1).sum())
    if not isinstance(corpus, TokenCorpus) or corpus.tokenizer in ("", SERIES) or part.read_trained(0, 1) is not None:
        return None
    nucleotides = corpus.tokenizer == NUCLEOTIDE
    try:
        decoder = None if nucleotides else Tokenizer(tokenizer or corpus.tokenizer)
    except Refused:
        return None
    total = 0
    for start, stop in runs.tolist():
        for at in range(start + 1, stop, _BLOCK):
            ids = part.read(at, min(at + _BLOCK, stop))
            if decoder is None:
                total += int((ids < END).sum())
            else:
                total += len(decoder.text_of(ids.tolist()).encode("utf-8", "replace"))
    return total
