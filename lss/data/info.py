"""What `lss data info` tells of a corpus."""

from __future__ import annotations

from typing import Any

import numpy as np

from lss.data.packing import pack
from lss.data.sources import ByteCorpus

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
    documents = training.documents()
    packed = pack(documents[:, 1] - documents[:, 0], seq_len, seed=0) if len(documents) else None
    share = counts[counts > 0] / len(corpus)
    middle = len(corpus) // 2
    text = corpus.read(middle, min(middle + _SAMPLE, len(corpus))).tobytes().decode("utf-8", "replace")
    # bytes of a binary file must not steer the terminal
    text = "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return {
        "corpus": corpus.name,
        "files": len(corpus.files),
        "bytes": len(corpus),
        "shortest_file": min(corpus.sizes),
        "longest_file": max(corpus.sizes),
        "training_bytes": len(training),
        "held_out_bytes": len(held),
        f"training_sequences_of_{seq_len}": max(len(training) - 1, 0) // seq_len,
        f"held_out_sequences_of_{seq_len}": max(len(held) - 1, 0) // seq_len,
        f"packed_sequences_of_{seq_len}": len(packed) if packed else 0,
        "padding_when_packed": f"{100 * packed.waste:.2f} %" if packed else "",
        "distinct_bytes": int((counts > 0).sum()),
        "bits_per_byte_without_context": round(float((share * np.log2(1 / share)).sum()), 3),
        "digest": corpus.digest,
        "sample": text,
    }
