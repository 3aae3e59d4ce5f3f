"""What `lss data info` tells of a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lss.config.errors import Refused
from lss.data.packing import pack
from lss.data.sources import ByteCorpus, Split, find_files
from lss.data.tables import SUFFIXES as TABLES
from lss.data.tables import open_table
from lss.data.token_folder import INDEX, check_digests, read_index
from lss.data.tokenizer import LETTERS, NUCLEOTIDE, SERIES, Tokenizer
from lss.data.tokens import SUFFIXES, TokenCorpus, is_ids

_BLOCK = 1 << 20  # bytes at a time, so that memory does not grow with the corpus
_SAMPLE = 200


def describe(corpus: ByteCorpus, seq_len: int, held_out: float = 0.05) -> dict[str, Any]:
    """What a corpus holds, for people to read.

    Args:
        corpus: read once, whole, in blocks.
        seq_len: labels per sequence, for counting sequences; S + 1 bytes are needed for one.
        held_out: fraction at the end that is kept for evaluation.

    Returns:
        Counts of files, bytes, sequences and distinct byte values; `bits_per_byte_without_context`, the order-0 entropy
        -sum p log2 p over byte values, which a model must beat; and a short sample from the middle, printable.
    """
    training, held = corpus.split(held_out)
    counts = np.zeros(256, np.int64)
    for start in range(0, len(corpus), _BLOCK):
        counts += np.bincount(corpus.read(start, min(start + _BLOCK, len(corpus))), minlength=256)
    share = counts[counts > 0] / len(corpus)
    middle = len(corpus) // 2
    text = corpus.read(middle, min(middle + _SAMPLE, len(corpus))).tobytes().decode("utf-8", "replace")
    return {
        "corpus": corpus.name,
        "files": len(corpus.files),
        "bytes": len(corpus),
        "shortest_file": min(corpus.sizes),
        "longest_file": max(corpus.sizes),
        **_sequences(training, held, seq_len),
        "lengths": histogram(np.asarray(corpus.sizes)),
        "distinct_bytes": int((counts > 0).sum()),
        "bits_per_byte_without_context": round(float((share * np.log2(1 / share)).sum()), 3),
        "digest": corpus.digest,
        "sample": _printable(text),
    }


def is_tokens(path: str) -> bool:
    """Whether a path is of token files: a folder of `lss data tokenize`, or .bin and .npy files alone."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return place.suffix in SUFFIXES
    files = [file for file in place.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return (place / INDEX).is_file() or (bool(files) and all(file.suffix in SUFFIXES for file in files))


def describe_tokens(path: str, seq_len: int, token_bytes: int = 2, held_out: float = 0.05) -> dict[str, Any]:
    """What token files hold; every byte of a folder of `lss data tokenize` is held against its digest.

    Raises:
        Refused: files that are no tokens, or damaged, by name.
    """
    corpus = TokenCorpus(path, 1 << 32, token_bytes)
    index = {}
    if corpus.tokenizer:
        index = read_index(Path(path).expanduser())
        check_digests(Path(path).expanduser(), index)
    largest, trained = -1, 0
    for start in range(0, len(corpus), _BLOCK):
        stop = min(start + _BLOCK, len(corpus))
        largest = max(largest, int(corpus.read(start, stop).max()))
        marks = corpus.read_trained(start, stop)
        trained += stop - start if marks is None else int(marks.sum())
    ends = corpus.document_ends()
    lengths = np.diff(ends, prepend=0)
    middle = int(ends[len(ends) // 2 - 1]) if len(ends) > 1 else len(corpus) // 2
    ids = corpus.read(middle, min(middle + _SAMPLE // 4, len(corpus)))
    return {
        "corpus": corpus.name,
        "files": len(corpus.files),
        "tokens": len(corpus),
        "documents": len(ends),
        "tokens_trained_on": trained,
        "largest_id": largest,
        **_bins_told(corpus),
        **({"tokenizer": index["tokenizer"], "vocabulary": index["vocab_size"], "SHA-256": "as recorded"} if index else {}),
        "shortest_document": int(lengths.min()),
        "longest_document": int(lengths.max()),
        **_sequences(*corpus.split(held_out), seq_len),
        "lengths": histogram(lengths),
        "digest": corpus.digest,
        "sample": _decoded(corpus.tokenizer, ids),
    }


def is_series(path: str) -> bool:
    """Whether a path is of numbers in columns: CSV and NPZ files, and .npy files of anything but ids."""
    place = Path(path).expanduser()
    files = [place] if place.is_file() else []
    if place.is_dir() and not (place / INDEX).is_file():
        files = [file for file in sorted(place.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    if not files or not all(file.suffix.lower() in TABLES for file in files):
        return False
    return files[0].suffix.lower() != ".npy" or not is_ids(files[0])


def describe_series(path: str, seq_len: int) -> dict[str, Any]:
    """What files of numbers hold, column by column; read once, whole, in blocks.

    Raises:
        Refused: a file that cannot be read so.
    """
    tables = [open_table(file) for file in find_files(path)[1]]
    names, rows = tables[0].names, 0
    count, total = np.zeros(len(names), np.int64), np.zeros(len(names))
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for table in tables:
        if len(table.names) != len(names):
            raise Refused(f"{table.file}: has {len(table.names)} columns, and {tables[0].file} has {len(names)}.")
        for chunk in table.chunks():
            there = ~np.isnan(chunk)
            rows, count = rows + len(chunk), count + there.sum(0)
            low = np.minimum(low, chunk.min(0, initial=np.inf, where=there))
            high = np.maximum(high, chunk.max(0, initial=-np.inf, where=there))
            total += chunk.sum(0, where=there)
    columns = {
        f"column {name}": f"{low[i]:.6g} to {high[i]:.6g}, mean {total[i] / count[i]:.6g}, {rows - count[i]:,} NaN"
        if count[i] else "empty" for i, name in enumerate(names)
    }  # fmt: skip
    facts = {"corpus": path, "files": len(tables), "rows": rows, "columns": len(names), "tokens": rows * len(names)}
    return facts | {f"sequences_of_{seq_len}": max(rows * len(names) - 1, 0) // seq_len} | columns


def histogram(lengths: np.ndarray) -> str:
    """How many documents are of which length, by powers of two: a bar a line."""
    powers = np.bincount(np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1)
    lines, first = [], int(np.flatnonzero(powers)[0])
    for power in range(first, len(powers)):
        bar = "#" * -(-15 * int(powers[power]) // int(powers.max()))
        lines.append(f"from {1 << power:>11,} {int(powers[power]):>9,} {bar}".rstrip())
    return "\n".join(lines)


def _bins_told(corpus: TokenCorpus) -> dict[str, Any]:
    bins = corpus.bins
    if bins is None:
        return {}
    ends = [f"{name}: {edges[0]:.6g} to {edges[-1]:.6g}" for name, edges in zip(bins.channels, bins.edges, strict=True)]
    nan = f", NaN is {bins.ids - 1}" if bins.nan else ""
    return {"bins": f"{bins.bins} a column by {bins.binning}{nan}", "edges": "\n".join(ends[:20])}


def _sequences(training: Split, held: Split, seq_len: int) -> dict[str, Any]:
    documents, unit = training.documents(), training.corpus.unit
    packed = pack(documents[:, 1] - documents[:, 0], seq_len, seed=0) if len(documents) else None
    return {
        f"training_{unit}": len(training),
        f"held_out_{unit}": len(held),
        f"training_sequences_of_{seq_len}": max(len(training) - 1, 0) // seq_len,
        f"held_out_sequences_of_{seq_len}": max(len(held) - 1, 0) // seq_len,
        f"packed_sequences_of_{seq_len}": len(packed) if packed else 0,
        "padding_when_packed": f"{100 * packed.waste:.2f} %" if packed else "",
    }


def _decoded(tokenizer: str, ids: np.ndarray) -> str:
    """Ids as text, where the tokenizer is at hand, else as numbers."""
    if tokenizer == NUCLEOTIDE:
        return "".join(LETTERS[i] if i < len(LETTERS) else "|" for i in ids)
    if tokenizer == SERIES:
        return " ".join(map(str, ids))
    try:
        return _printable(Tokenizer(tokenizer).decode(ids.tolist())) if tokenizer else " ".join(map(str, ids))
    except Refused:
        return " ".join(map(str, ids))


def _printable(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)
