"""Packing: every token once, little waste, and batches whose ranks hold the packed sequence and no other bytes."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lss.config import Refused
from lss.data import ByteCorpus, EvalLoader, Loader, pack
from lss.data.permutation import _hash, hashes
from lss.segment import ORDERS, make_segment

LIBRARY = ByteCorpus()
S = 64


def log_normal(median, sigma, count, seed=0):
    draws = np.random.default_rng(seed).standard_normal(count)
    return np.maximum(1, np.exp(np.log(median) + sigma * draws)).astype(np.int64)


@pytest.mark.parametrize("seq_len", [2048, 8192, 65536])
@pytest.mark.parametrize("median, sigma, count", [(400, 1.2, 3000), (1000, 1.35, 5000), (2000, 1.5, 3000)])
def test_long_tailed_lengths_waste_little(median, sigma, count, seq_len):
    for seed in range(3):
        lengths = log_normal(median, sigma, count, seed)
        packed = pack(lengths, seq_len, seed)
        assert packed.waste == pytest.approx(1 - lengths.sum() / (len(packed) * seq_len), abs=1e-12)
        assert packed.waste <= 0.02
        # the fewest sequences there can be, and 1 % more
        assert len(packed) <= -(-lengths.sum() // seq_len) * 1.01


@pytest.mark.parametrize("seq_len", [2048, 4096, 16384, 65536])
def test_real_files_waste_little(seq_len):
    # distributions of Python have more or fewer files: 0.6 to 1.1 %
    assert pack(np.array(LIBRARY.sizes), seq_len, 0).waste <= 0.015


def test_a_hundred_thousand_documents_take_a_moment():
    lengths = log_normal(2000, 1.2, 100_000)
    start = time.perf_counter()
    pack(lengths, 2048, 0)
    assert time.perf_counter() - start < 5  # about 0.2 s on an idle core


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 25), st.integers(0, 2**63))
@settings(max_examples=100, deadline=None)
def test_every_token_stands_once(lengths, seq_len, seed):
    lengths = [*lengths, 3]
    packed = pack(np.array(lengths), seq_len, seed)
    seen = [np.zeros(length, int) for length in lengths]
    used = 0
    for i in range(len(packed)):
        pieces, cu_seqlens = packed.pieces(i), packed.cu_seqlens(i)
        edges = [0]
        for document, start, stop in pieces:
            # cut at multiples of S and nowhere else
            assert start % seq_len == 0
            assert stop == min(start + seq_len, lengths[document])
            seen[document][start:stop] += 1
            edges.append(edges[-1] + stop - start)
        used += edges[-1]
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.tolist() == edges + [seq_len] * (edges[-1] < seq_len)
        assert edges[-1] <= seq_len
    assert all((count == 1).all() for count in seen)
    assert packed.waste == pytest.approx(1 - used / (len(packed) * seq_len), abs=1e-12)


def test_the_same_from_the_same_and_another_from_another_seed():
    lengths = log_normal(50, 1.2, 400)
    rows = [[packed.pieces(i) for i in range(len(packed))] for packed in (pack(lengths, 256, s) for s in (3, 3, 4))]
    assert rows[0] == rows[1]
    # the documents come together otherwise, not only in another order
    together = [{frozenset(row) for row in each} for each in rows]
    assert len(together[0] & together[2]) < len(together[0]) / 2
    # fixed numbers: a packing that changes with a version would change what a resumed run reads
    packed = pack(np.array([5, 0, 9, 1, 3, 20, 4]), 8, 7)
    assert [packed.pieces(i) for i in range(len(packed))] == [
        ((5, 8, 16),),
        ((5, 0, 8),),
        ((0, 0, 5), (4, 0, 3)),
        ((3, 0, 1), (2, 8, 9)),
        ((2, 0, 8),),
        ((6, 0, 4), (5, 16, 20)),
    ]


def test_hashes_are_those_of_plain_whole_numbers():
    golden, key = 0x9E3779B97F4A7C15, _hash(_hash(2**63 + 5) ^ 9)
    numbers = np.array([0, 1, 2, 1000, 2**40])
    expected = [_hash((key + (n - 1) * golden) & (2**64 - 1)) for n in numbers.tolist()]
    assert hashes(2**63 + 5, numbers, 9).tolist() == expected


@pytest.mark.parametrize("lengths, seq_len, words", [([0, 0], 4, "lengths=2 documents: they hold no tokens"),
                                                     ([], 4, "hold no tokens"), ([3, -1], 4, "lengths=-1"),
                                                     ([3], 0, "seq_len=0")])  # fmt: skip
def test_what_cannot_be_packed_is_refused(lengths, seq_len, words):
    with pytest.raises(Refused, match=words):
        pack(np.array(lengths), seq_len, 0)


def test_documents_are_the_files_of_a_part(folder, whole):
    training, held_out = ByteCorpus(str(folder)).split(0.1)  # 1000, 1 and 499 bytes, cut at 1350
    assert training.documents().tolist() == [[0, 1000], [1000, 1001], [1001, 1350]]
    assert held_out.documents().tolist() == [[0, 150]]
    assert training.documents().dtype == np.int64
    early, late = ByteCorpus(str(folder)).split(0.6)
    assert early.documents().tolist() == [[0, 600]]
    assert late.documents().tolist() == [[0, 400], [400, 401], [401, 900]]
    assert np.array_equal(late.read(*late.documents()[2]), whole[1001:])


# -- batches of packed documents -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty files, of 1 to some 300 bytes; no byte is 0, which is padding."""
    base = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(1)
    for number, size in enumerate([1, 2, S, S + 1, 2 * S, *log_normal(40, 1.0, 35)]):
        (base / f"{number:02}").write_bytes(generator.integers(1, 256, size, dtype=np.uint8).tobytes())
    return ByteCorpus(str(base))


def packed_loader(corpus, cp=1, rank=0, order="head_tail", *, dp=1, dp_rank=0, batch_size=4, held_out=0.1, **kind):
    def segment_of(cu_seqlens):
        return make_segment(S, cp=cp, rank=rank, order=order, cu_seqlens=cu_seqlens)

    return Loader(corpus.split(held_out)[0], seq_len=S, batch_size=batch_size, accumulate=batch_size // dp, dp=dp,
                  dp_rank=dp_rank, segment=segment_of(None), seed=5, packing=True, segment_of=segment_of,
                  **kind)  # fmt: skip


def gathered(batches):
    """(tokens, labels, positions) of the whole sequence from the batches of all ranks; padding beyond S is checked."""
    found = np.full((3, S), -1, np.int64)
    for batch in batches:
        rows = torch.stack((batch.tokens[0], batch.labels[0], batch.positions)).numpy()
        places = batch.segment.positions.numpy()
        inside = places < S
        assert (rows[:2, ~inside] == [[0], [-100]]).all()
        assert (found[0, places[inside]] == -1).all()
        found[:, places[inside]] = rows[:, inside]
    return found


def expected_row(split, packed, i):
    """(tokens, labels, positions) of packed sequence i, document by document."""
    rows = []
    for document, start, stop in packed.pieces(i):
        text = split.read(*split.documents()[document]).astype(np.int64)
        labels = np.append(text[1:], -100)
        rows.append(np.stack((text[start:stop], labels[start:stop], np.arange(stop - start))))
    row = np.concatenate(rows, axis=1)
    left = S - row.shape[1]
    return np.concatenate((row, np.stack((np.zeros(left), np.full(left, -100), np.arange(left)))), axis=1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_ranks_together_hold_each_packed_sequence(corpus, order, cp):
    loaders = [packed_loader(corpus, cp, rank, order) for rank in range(cp)]
    split, packed = loaders[0].split, loaders[0].packed
    assert len({loaders[0].sample(number) for number in range(len(packed))}) == len(packed) == loaders[0].samples
    for step in range(1, len(packed) // 4 + 2):
        for micro in range(4):
            batches = [mine.batch(step, micro) for mine in loaders]
            sample = loaders[0].sample((step - 1) * 4 + micro)
            for batch in batches:
                assert batch.sample_ids.tolist() == [(step - 1) * 4 + micro]
                assert torch.equal(batch.cu_seqlens, packed.cu_seqlens(sample))
                assert batch.segment.edges == tuple(batch.cu_seqlens.tolist())
                assert torch.equal(batch.positions, batch.segment.document_positions)
            assert np.array_equal(gathered(batches), expected_row(split, packed, sample))


def test_an_epoch_counts_every_byte_but_the_first_of_each_document(corpus):
    mine = packed_loader(corpus, batch_size=1)
    batches = [mine.batch(step, 0) for step in range(1, mine.samples + 1)]
    counted = sum(int((batch.labels != -100).sum()) for batch in batches)
    assert counted == len(mine.split) - len(mine.split.documents())
    labels = np.concatenate([batch.labels[batch.labels != -100].numpy() for batch in batches])
    text = np.concatenate([mine.split.read(a + 1, b) for a, b in mine.split.documents()])
    assert np.array_equal(np.bincount(labels, minlength=256), np.bincount(text, minlength=256))


@pytest.mark.parametrize("order", ORDERS)
def test_a_rank_reads_its_own_pieces_only(corpus, monkeypatch, order):
    for rank in range(3):
        mine = packed_loader(corpus, 3, rank, order)
        read = []

        def note(start, stop, read=read, take=mine.split.read):
            read.append((start, stop))
            return take(start, stop)

        monkeypatch.setattr(mine.split, "read", note)
        for step in range(1, 6):
            del read[:]
            before = mine.bytes_read
            batch = mine.batch(step, 0)
            own = int((batch.tokens != 0).sum())
            runs = len(batch.segment.local_runs)
            documents = len(mine.packed.pieces(mine.sample((step - 1) * 4)))
            total = sum(stop - start for start, stop in read)
            assert total == mine.bytes_read - before
            # one label byte for each part that does not end its document
            assert own <= total <= own + len(read)
            assert len(read) <= runs + documents


def test_dp_ranks_take_the_packed_sequences_in_turn(corpus):
    one = packed_loader(corpus, batch_size=4)
    for dp_rank in range(2):
        mine = packed_loader(corpus, batch_size=4, dp=2, dp_rank=dp_rank)
        for micro in range(2):
            found, expected = mine.batch(3, micro), one.batch(3, 2 * micro + dp_rank)
            assert torch.equal(found.tokens, expected.tokens)
            assert torch.equal(found.labels, expected.labels)
            assert found.slots.tolist() == expected.slots.tolist() == [2 * micro + dp_rank]


@pytest.mark.parametrize("order", ORDERS)
def test_prefix_and_masks_go_with_packing(corpus, order):
    plain = [packed_loader(corpus, 3, rank, order) for rank in range(3)]
    prefixed = [packed_loader(corpus, 3, rank, order, prefix=6) for rank in range(3)]
    masked = [packed_loader(corpus, 3, rank, order, mask_rate=0.3) for rank in range(3)]
    hidden = 0
    for step in range(1, 6):
        tokens, labels, positions = gathered([mine.batch(step, 1) for mine in plain])
        assert np.array_equal(gathered([mine.batch(step, 1) for mine in prefixed]),
                              (tokens, np.where(positions < 5, -100, labels), positions))  # fmt: skip
        found, targets, _ = gathered([mine.batch(step, 1) for mine in masked])
        chosen = targets != -100
        assert np.array_equal(chosen, found == 256)
        assert np.array_equal(np.where(chosen, targets, found), tokens)
        assert (tokens[chosen] > 0).all()
        alone = packed_loader(corpus, mask_rate=0.3).batch(step, 1)
        assert np.array_equal(alone.tokens[0], found)
        hidden += chosen.sum()
    assert 0.2 < hidden / (5 * S) < 0.4


def test_documents_of_one_sequence_are_masked_differently(corpus):
    mine = packed_loader(corpus, batch_size=1, mask_rate=0.5)
    compared = 0
    for step in range(1, mine.samples + 1):
        batch = mine.batch(step, 0)
        sizes = [stop - start for _, start, stop in mine.packed.pieces(mine.sample(step - 1))]
        parts = (batch.tokens[0, : sum(sizes)] == 256).split(sizes)
        starts = [tuple(part[:16].tolist()) for part in parts if len(part) >= 16]
        assert len(set(starts)) == len(starts)
        compared += len(starts) > 1
    assert compared > 3


def test_held_out_documents_are_packed_and_the_rest_is_padding(corpus):
    def segment_of(cu_seqlens):
        return make_segment(S, cp=2, rank=0, cu_seqlens=cu_seqlens)

    split = corpus.split(0.5)[1]
    shared = dict(seq_len=S, samples=3, dp=2, segment=segment_of(None), packing=True, segment_of=segment_of)
    loaders = [EvalLoader(split, rows_per_batch=1, dp_rank=rank, **shared) for rank in range(2)]
    assert loaders[0].chosen == [0, loaders[0].samples // 3, 2 * loaders[0].samples // 3]
    batches = [batch for pair in zip(*loaders, strict=True) for batch in pair]
    assert [batch.sample_ids.tolist() for batch in batches] == [[0], [1], [2], [-1]]
    for batch, sample in zip(batches, loaders[0].chosen, strict=False):
        assert torch.equal(batch.cu_seqlens, pack(split.documents() @ [-1, 1], S, 0).cu_seqlens(sample))
        places = batch.segment.positions.numpy()
        tokens, labels, _ = expected_row(split, loaders[0].packed, sample)[:, places]
        assert np.array_equal(batch.tokens[0], tokens)
        assert np.array_equal(batch.labels[0], labels)
    assert batches[3].cu_seqlens.tolist() == [0, S]
    assert not batches[3].tokens.any()
    assert bool((batches[3].labels == -100).all())
    with pytest.raises(Refused, match="rows_per_batch=2: packed sequences come one at a time"):
        EvalLoader(split, rows_per_batch=2, dp_rank=0, **shared)


def test_packing_refuses_what_it_cannot_do(corpus, tmp_path):
    words = r"train\.batch_size=8: packed sequences come one at a time.*dp x accumulate = 4, or train\.accumulate=8"
    with pytest.raises(Refused, match=words):
        Loader(corpus.split(0.1)[0], seq_len=S, batch_size=8, accumulate=4, dp=1, dp_rank=0, seed=0,
               segment=make_segment(S, cp=1, rank=0), packing=True)  # fmt: skip
    with pytest.raises(Refused, match=r"source_every=2: .* without packing"):
        packed_loader(corpus, source_every=2, source_segment=make_segment(32, cp=1, rank=0))
    for name in "ab":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(Refused, match=r"data\.path=.*the training part has 2 documents, the longest of 1 bytes"):
        packed_loader(ByteCorpus(str(tmp_path)), held_out=0)
    # a masked byte is its own label
    batch = packed_loader(ByteCorpus(str(tmp_path)), held_out=0, mask_rate=1.0).batch(1, 0)
    assert batch.tokens[0, :3].tolist() == [256, 256, 0]
    assert batch.labels[0, :3].tolist() == [ord("x"), ord("x"), -100]
