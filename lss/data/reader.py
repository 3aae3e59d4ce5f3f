"""One rank's part of the samples of a split: which bytes, which of them count, and what is hidden."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict

import numpy as np
import torch

from lss.config.errors import refuse
from lss.data.packing import join, pack
from lss.data.permutation import hashes
from lss.data.sources import Split
from lss.data.tokenizer import COMPLEMENT
from lss.segment import Segment

IGNORE_INDEX = -100
_BITS = 24  # of a hash that decide whether a token is masked


@dataclass(frozen=True)
class Batch:
    """One micro-batch as one rank holds it.

    Attributes:
        tokens: (B, T) int64; 0 at padding.
        labels: (B, T) int64, each the byte after its token in the whole sequence, or the token itself where it is masked;
            -100 where not counted.
        positions: (T,) int64, global; within its own piece with packed documents.
        slots: (B,) int64, each row's place in the step's global batch; keys dropout.
        sample_ids: (B,) int64, each row's number in the loader's order of samples: in training so many as were read before
            the step + slot, counting on through the epochs; the slot in evaluation, and -1 for a row of padding.
        cu_seqlens: int32 (n + 1,), the edges of packed documents in the whole sequence, 0 first and S last.
        segment: how the sequence was cut; loaders always set it.
        source: (B, T_source) int64, this rank's part of the encoder's input; 0 at padding.
        source_segment: how the source was cut.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sample_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    segment: Segment | None = None
    source: torch.Tensor | None = None
    source_segment: Segment | None = None


class Kind(TypedDict, total=False):
    """What a loader makes of the text; `Reader` says what each is."""

    packing: bool
    segment_of: Callable[[torch.Tensor | None], Segment] | None
    prefix: int
    mask_rate: float
    mask_id: int
    source_every: int
    source_segment: Segment | None
    reverse_complement: bool


class Reader:
    """Reads samples of one split as one rank's segment has them, and counts the bytes it reads.

    A sample is `seq_len` tokens of the text. A token's label is the byte after it.

    Args:
        segment: this rank's part of a sequence.
        seed: draws the packing and the masked tokens.
        packing: each document of the split stands by itself, and sample i is packed sequence i of `pack`. No label crosses
            the end of a document: its last token counts nothing. The last token of a piece that was cut from a longer
            document has the document's next byte as its label. `segment` then gives the length alone.
        segment_of: this rank's segment for the edges of packed documents (int32, as `make_segment` takes them); needed
            with packing.
        prefix: so many tokens at the start of a sequence, or of a packed piece, see each other; since all but the last
            of them see their own label, only labels from token prefix - 1 on count.
        mask_rate: above 0 for masked language modelling: each token is hidden with this probability, drawn from (seed,
            sample id, place in the sequence), and so alike in any layout. Hidden tokens are `mask_id`, and their labels
            the bytes hidden; no others count.
        source_every: above 0 for an encoder-decoder: the source's token j is the sample's byte j * source_every.
        source_segment: this rank's part of the source, ceil(seq_len / source_every) tokens.
        reverse_complement: of nucleotides: every second sample, drawn from (seed, sample id), is read from the other strand,
            backwards and each letter as its complement; alike in any layout.

    Raises:
        Refused: a setting out of range or two that do not go together, or a split too short.
    """

    def __init__(
        self,
        split: Split,
        seq_len: int,
        segment: Segment,
        *,
        seed: int,
        packing: bool = False,
        segment_of: Callable[[torch.Tensor | None], Segment] | None = None,
        prefix: int = 0,
        mask_rate: float = 0.0,
        mask_id: int = 256,
        source_every: int = 0,
        source_segment: Segment | None = None,
        reverse_complement: bool = False,
    ) -> None:
        if segment.seq_len != seq_len:
            raise refuse("seq_len", seq_len, f"the segment is of sequences of {segment.seq_len}")
        if not 0 <= prefix <= seq_len:
            raise refuse("prefix", prefix, f"no label would count; use 0 to {seq_len}, the sequence's length")
        if not 0.0 <= mask_rate <= 1.0:
            raise refuse("mask_rate", mask_rate, "a probability; use 0 to 1")
        if source_every < 0:
            raise refuse("source_every", source_every, "use 0 for no source, or every how many bytes one is taken")
        if source_every and packing:
            raise refuse("source_every", source_every, "a source is of one document; use it without packing, or use 0")
        assert not (mask_rate and (prefix or source_every)), (mask_rate, prefix, source_every)
        assert segment_of is not None or not packing, "packing cuts every sample by its own documents"
        self.split, self.seq_len, self.segment, self.seed = split, seq_len, segment, seed
        self.segment_of, self.prefix, self.mask_rate, self.mask_id = segment_of, prefix, mask_rate, mask_id
        self.source_every, self.source_segment, self.reverse_complement = source_every, source_segment, reverse_complement
        if source_every:
            assert source_segment is not None, "a source needs its segment"
            assert source_segment.seq_len == -(-seq_len // source_every), (source_segment.seq_len, seq_len, source_every)
        self._ahead = 0 if mask_rate else 1  # a masked token is its own label
        self.documents, self.packed, parts = None, None, split.split_parts()
        if packing:
            found = [_documents(part, 1 + self._ahead) for part, _ in parts]
            self.documents = np.concatenate([part + start for part, (_, start) in zip(found, parts, strict=True)])
            packs = [pack(part[:, 1] - part[:, 0], seq_len, seed) for part in found]
            self.packed = join(packs, [len(part) for part in found])
            self.counts = [len(packed) for packed in packs]
        else:
            self.counts = [part.samples(seq_len, self._ahead) for part, _ in parts]
        self.samples, self._parts = sum(self.counts), [start for _, start in parts]
        self._edges = [0, *accumulate(self.counts)]
        self.bytes_read = 0

    def rows(self, samples: Sequence[int | None], slots: Sequence[int], first_id: int = 0) -> Batch:
        """A batch of these samples, numbered first_id + slot; None is a row of padding, of which no label counts."""
        cu_seqlens, segment = self._cut(samples)
        positions = segment.positions if cu_seqlens is None else segment.document_positions
        numbers = [-1 if sample is None else first_id + slot for sample, slot in zip(samples, slots, strict=True)]
        pairs = [self._row(*which, segment, positions.numpy()) for which in zip(samples, numbers, strict=True)]
        return Batch(
            tokens=torch.from_numpy(np.stack([tokens for tokens, _ in pairs])),
            labels=torch.from_numpy(np.stack([labels for _, labels in pairs])),
            positions=positions,
            slots=torch.tensor(list(slots), dtype=torch.int64),
            sample_ids=torch.tensor(numbers, dtype=torch.int64),
            cu_seqlens=cu_seqlens,
            segment=segment,
            source=self._sources(samples),
            source_segment=self.source_segment if self.source_every else None,
        )

    def _cut(self, samples: Sequence[int | None]) -> tuple[torch.Tensor | None, Segment]:
        """(edges of the packed documents, this rank's segment); a row of padding is one document."""
        if self.packed is None or self.segment_of is None:
            return None, self.segment
        (sample,) = samples
        whole = torch.tensor([0, self.seq_len], dtype=torch.int32)
        cu_seqlens = whole if sample is None else self.packed.cu_seqlens(sample)
        return cu_seqlens, self.segment_of(cu_seqlens)

    def _row(
        self, sample: int | None, number: int, segment: Segment, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) of this rank, (T,) int64 each. A run of tokens costs one byte more, its last label."""
        tokens = np.zeros(segment.local_len, np.int64)
        labels = np.full(segment.local_len, IGNORE_INDEX, np.int64)
        if sample is None:
            return tokens, labels
        turned = self.reverse_complement and bool(hashes(self.seed + 1, np.zeros(1, np.int64), number)[0] >> np.uint64(63))
        first = self._first(sample)
        for local, start, stop, end in self._runs(sample, segment):
            if turned:  # item i of the sample is its item S - i from the other strand
                last = 2 * first + self.seq_len + self._ahead
                run = COMPLEMENT[self._read(last - min(stop + self._ahead, end), last - start)[::-1]]
            else:
                run = self._read(start, min(stop + self._ahead, end))
            tokens[local : local + stop - start] = run[: stop - start]
            trained = self.split.read_trained(start + self._ahead, start + len(run))
            targets = run[self._ahead :]
            labels[local : local + len(targets)] = (
                targets if trained is None else np.where(trained, targets, IGNORE_INDEX)
            )
        if self.mask_rate:
            # by place in the sequence, not in a document: two documents of a sequence are masked differently
            bits = hashes(self.seed, segment.positions.numpy(), number) >> np.uint64(64 - _BITS)
            hidden = (bits < round(self.mask_rate * (1 << _BITS))) & (labels != IGNORE_INDEX)
            return np.where(hidden, self.mask_id, tokens), np.where(hidden, labels, IGNORE_INDEX)
        labels[positions < self.prefix - 1] = IGNORE_INDEX
        return tokens, labels

    def _first(self, sample: int) -> int:
        """Where a sample that is not packed begins in the split."""
        part = bisect_right(self._edges, sample) - 1
        return self._parts[part] + (sample - self._edges[part]) * self.seq_len

    def _runs(self, sample: int, segment: Segment) -> Iterator[tuple[int, int, int, int]]:
        """This rank's bytes: (local place, start, stop, end) with [start, stop) in the split, labels from before end."""
        if self.packed is None or self.documents is None:
            first = self._first(sample)
            for local, _, start, stop in segment.local_runs:
                yield local, first + start, first + stop, first + self.seq_len + self._ahead
            return
        pieces, edges = self.packed.pieces(sample), self.packed.cu_seqlens(sample).tolist()
        for local, _, start, stop in segment.local_runs:
            for i in range(bisect_right(edges, start) - 1, len(pieces)):
                left, right = max(start, edges[i]), min(stop, edges[i + 1])
                if left >= right:
                    break
                document, offset, _ = pieces[i]
                begin, end = self.documents[document].tolist()
                first = begin + offset - edges[i]
                yield local + left - start, first + left, first + right, end

    def _sources(self, samples: Sequence[int | None]) -> torch.Tensor | None:
        """The encoder's input: (B, T_source) int64. The bytes between those taken are read as well."""
        if not self.source_every or self.source_segment is None:
            return None
        segment, every = self.source_segment, self.source_every
        source = np.zeros((len(samples), segment.local_len), np.int64)
        for row, sample in enumerate(samples):
            if sample is None:
                continue
            for local, local_stop, start, stop in segment.local_runs:
                first, last = (self._first(sample) + place * every for place in (start, stop - 1))
                source[row, local:local_stop] = self._read(first, last + 1)[::every]
        return torch.from_numpy(source)

    def _read(self, start: int, stop: int) -> np.ndarray:
        self.bytes_read += stop - start
        return self.split.read(start, stop)


def _documents(split: Split, needed: int) -> np.ndarray:
    """The split's documents; refuses where none has the `needed` bytes for one label."""
    documents = split.documents()
    longest = int((documents[:, 1] - documents[:, 0]).max(initial=0))
    if longest < needed:
        facts = f"the {split.name} part has {len(documents):,} documents, the longest of {longest} bytes"
        raise refuse("data.path", split.corpus.name, f"{facts}, and a label takes {needed}; give more text")
    return documents
