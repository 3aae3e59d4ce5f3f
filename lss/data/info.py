"""What `lss data info` tells of a corpus."""

from __future__ import annotations

from typing import Any

import numpy as np

from lss.data.sources import ByteCorpus

_BLOCK = 1 << 20  # bytes at a time, so that memory does not grow with the corpus
_SAMPLE = 200


def describe(corpus: ByteCorpus, seq_len: int, held_out: float = 0.05) -> dict[str, Any]:
    """Counts, order-0 entropy and a short sample of a corpus."""
    training, held = corpus.split(held_out)
    counts = np.zeros(256, np.int64)
    for start in range(0, len(corpus), _BLOCK):
        counts += np.bincount(corpus.read(start, min(start + _BLOCK, len(corpus))), minlength=256)
    share = counts[counts > 0] / len(corpus)
    sizes = [file.stat().st_size for file in corpus.files]
    middle = len(corpus) // 2
    text = corpus.read(middle, min(middle + _SAMPLE, len(corpus))).tobytes().decode("utf-8", "replace")
    return {
        "corpus": corpus.name,
        "files": len(corpus.files),
        "bytes": len(corpus),
        "shortest_file": min(sizes),
        "longest_file": max(sizes),
        "training_bytes": len(training),
        "held_out_bytes": len(held),
        f"training_sequences_of_{seq_len}": max(len(training) - 1, 0) // seq_len,
        f"held_out_sequences_of_{seq_len}": max(len(held) - 1, 0) // seq_len,
        "distinct_bytes": int((counts > 0).sum()),
        "bits_per_byte_without_context": round(float(-(share * np.log2(share)).sum()), 3),
        "digest": corpus.digest,
        "sample": text,
    }
