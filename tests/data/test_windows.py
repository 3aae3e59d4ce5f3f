"""Windows over a whole text: every item but the first is a label once, with the context that was asked for."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from lss.data import ByteCorpus
from lss.data.windows import WindowReader
from lss.segment import make_segment


def text(tmp_path, sizes):
    """Files of so many bytes that all differ from their neighbours."""
    draw = np.random.default_rng(3)
    for number, size in enumerate(sizes):
        (tmp_path / f"{number:03}.txt").write_bytes(draw.integers(0, 256, size, dtype=np.uint8).tobytes())
    return ByteCorpus(str(tmp_path)).split(0.3)[1]


def readers(split, window, stride, *, rows=1, dp=1, cp=1, order="contiguous", documents=False):
    """One reader for each rank, by (dp rank, cp rank)."""
    found = {}
    for d, c in product(range(dp), range(cp)):
        segment_of = partial(_segment, window, cp, c, order)
        found[d, c] = WindowReader(split, window=window, stride=stride, rows_per_batch=rows, dp=dp, dp_rank=d,
                                   segment_of=segment_of, documents=documents)  # fmt: skip
    return found


def _segment(window, cp, rank, order, borders):
    return make_segment(window, cp=cp, rank=rank, order=order, cu_seqlens=borders)


def counted(split, reader):
    """How often each item is a label, and the least tokens before it that its window has; from whole rows."""
    times, context = np.zeros(len(split), int), np.full(len(split), 1 << 30)
    items = split.read(0, len(split)).astype(np.int64)
    for number in range(len(reader)):
        batch = reader.batch(number)
        for place, row in enumerate(reader.rows_of(number)):
            begins = [0] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
            seen = 0
            for first, end, item in reader.places(row):
                assert (batch.labels[place, first:end].numpy() == items[item : item + end - first]).all()
                times[item : item + end - first] += 1
                start = max(begin for begin in begins if begin <= first)
                context[item : item + end - first] = np.arange(first, end) + 1 - start
                # the tokens before are the text before
                before = items[item - 1 - (first - start) : item - 1 + end - first]
                assert (batch.tokens[place, start:end].numpy() == before).all()
                seen += end - first
            assert seen == int((batch.labels[place] != -100).sum())
    return times, context


@pytest.mark.parametrize("window, stride", [(8, 8), (8, 3), (8, 1), (1, 1), (500, 500), (500, 7), (99, 98)])
def test_every_item_but_the_first_is_a_label_once(tmp_path, window, stride):
    split = text(tmp_path, [331])
    assert len(split) == 99
    times, context = counted(split, readers(split, window, stride, rows=2)[0, 0])
    assert times.tolist() == [0] + [1] * 98
    least = min(window - stride, 98)
    # the first window's labels have all the text before them, those after it a whole overlap
    assert (context[1:] >= np.minimum(np.arange(1, 99), least + 1)).all()
    assert context[1:].max() <= window


def test_documents_stand_by_themselves(tmp_path):
    sizes = [1, 40, 2, 1, 17, 30, 5]
    split = ByteCorpus(str(text(tmp_path, sizes).corpus.name)).split(1e-6)[0]
    reader = readers(split, 16, 4, documents=True)[0, 0]
    times, context = counted(split, reader)
    firsts = np.cumsum([0, *sizes[:-1]])
    expected = np.ones(sum(sizes), int)
    expected[firsts] = 0
    assert times.tolist() == expected.tolist()
    assert reader.labels == int(expected.sum())
    for first, size in zip(firsts, sizes, strict=True):
        assert (context[first + 1 : first + size] >= np.minimum(np.arange(1, size), 13)).all()


@pytest.mark.parametrize("order, documents", [("contiguous", False), ("head_tail", False), ("balanced", True)])
def test_ranks_read_their_part_of_the_same_rows(tmp_path, order, documents):
    split, rows = text(tmp_path, [300, 9, 30, 50, 3]), 1 if documents else 2
    (whole,) = readers(split, 21, 5, rows=rows, documents=documents).values()
    cut = readers(split, 21, 5, rows=1, dp=rows, cp=3, order=order, documents=documents)
    for number, batch in enumerate(whole):
        for (d, _), reader in cut.items():
            mine = reader.batch(number)
            held = mine.segment.positions < 21
            places = mine.segment.positions[held]
            assert torch.equal(mine.tokens[0, held], batch.tokens[d, places])
            assert torch.equal(mine.labels[0, held], batch.labels[d, places])
            assert torch.equal(mine.positions[held], batch.positions[places])
            assert (mine.labels[0, ~held] == -100).all()
    assert {len(reader) for reader in cut.values()} == {len(whole)}
