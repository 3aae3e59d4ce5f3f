"""The order of samples, and that each rank reads its own bytes and the right labels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lss.config import Refused
from lss.data import ByteCorpus, EvalLoader, Loader
from lss.data.permutation import permute
from lss.segment import ORDERS, make_segment

LIBRARY = ByteCorpus()


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(permute(i, n, seed, epoch) for i in range(n)) == list(range(n))


@given(st.integers(1, 2**45), st.integers(0, 2**40), st.integers(0, 2**20), st.data())
@settings(max_examples=50, deadline=None)
def test_long_epochs_stay_inside_and_never_meet(n, seed, epoch, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    images = [permute(i, n, seed, epoch) for i in indices]
    assert len(set(images)) == len(indices)
    assert all(0 <= image < n for image in images)


def test_an_epoch_is_well_mixed():
    """Neither neighbours nor places are kept: correlations of a random order are near 0, +- 1 / sqrt(n)."""
    n = 4001
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = np.array([permute(i, n, seed, epoch) for i in range(n)])
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.07
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.07
        assert (order == np.arange(n)).sum() < 8


def test_epochs_and_seeds_differ_and_stay_the_same_for_ever():
    orders = {(s, e): tuple(permute(i, 50, s, e) for i in range(50)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    # fixed numbers: an order that changes with a version would change what a resumed run reads
    assert orders[0, 0][:8] == (30, 25, 41, 0, 15, 19, 48, 31)


def loader(folder, cp, rank, order, *, dp=1, dp_rank=0, seq_len=13, batch_size=4, accumulate=2, seed=3, **kind):
    split, _ = ByteCorpus(str(folder)).split(0.1)
    segment = make_segment(seq_len, cp=cp, rank=rank, order=order)
    return Loader(split, seq_len=seq_len, batch_size=batch_size, accumulate=accumulate, dp=dp, dp_rank=dp_rank,
                  segment=segment, seed=seed, **kind)  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("seq_len", [1, 2, 13, 16])
def test_ranks_together_hold_each_sequence_and_its_labels(folder, whole, order, cp, seq_len):
    text = whole
    loaders = [loader(folder, cp, rank, order, seq_len=seq_len) for rank in range(cp)]
    ranks = [mine.batch(2, 1) for mine in loaders]
    assert ranks[0].sample_ids.tolist() == [4 + 2, 4 + 3]  # step 1 took 4, micro-batch 0 of step 2 two more
    for row, number in enumerate(ranks[0].sample_ids.tolist()):
        sample = loaders[0].sample(number)
        tokens, labels = {}, {}
        for batch in ranks:
            assert batch.sample_ids.tolist() == ranks[0].sample_ids.tolist()
            for position, token, label in zip(batch.positions.tolist(), batch.tokens[row].tolist(),
                                              batch.labels[row].tolist(), strict=True):  # fmt: skip
                if position < seq_len:
                    tokens[position], labels[position] = token, label
                else:
                    assert (token, label) == (0, -100)
        expected = text[sample * seq_len : sample * seq_len + seq_len + 1].tolist()
        assert [tokens[p] for p in range(seq_len)] == expected[:-1]
        assert [labels[p] for p in range(seq_len)] == expected[1:]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("seq_len", [1, 5, 13, 64])
def test_a_rank_reads_only_its_own_bytes(folder, monkeypatch, order, cp, seq_len):
    counted = 0
    for rank in range(cp):
        mine = loader(folder, cp, rank, order, seq_len=seq_len)
        read = []

        def note(start, stop, read=read, take=mine.split.read):
            read.append((start, stop))
            return take(start, stop)

        monkeypatch.setattr(mine.split, "read", note)
        batch = mine.batch(1, 0)
        expected = []
        for number in batch.sample_ids.tolist():
            first = mine.sample(number) * seq_len
            spans = [(a, min(b, seq_len)) for a, b in mine.segment.spans if a < seq_len]
            # one byte more than the tokens of a run: its last label
            expected += [(first + a, first + b + 1) for a, b in spans]
        assert read == expected
        assert mine.bytes_read == sum(b - a for a, b in expected)
        counted += int((batch.labels != -100).sum())
    assert counted == 2 * seq_len


def test_a_step_is_the_same_after_any_other(folder):
    straight, resumed = loader(folder, 2, 1, "head_tail"), loader(folder, 2, 1, "head_tail")
    for step in range(1, 60):  # over two ends of an epoch
        expected = straight.batch(step, 1)
    found = resumed.batch(59, 1)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.sample_ids, expected.sample_ids)
    assert found.sample_ids.tolist() == [58 * 4 + 2, 58 * 4 + 3]


def test_an_epoch_is_every_sample_once_whatever_the_layout(folder):
    seen = {}
    for dp, accumulate in ((1, 1), (2, 2), (4, 1)):
        ids = []
        for step in range(1, 28):
            step_ids = {}
            for micro in range(accumulate):
                for dp_rank in range(dp):
                    mine = loader(folder, 1, 0, "contiguous", dp=dp, dp_rank=dp_rank, accumulate=accumulate)
                    batch = mine.batch(step, micro)
                    numbers = batch.sample_ids.tolist()
                    assert numbers == [(step - 1) * 4 + slot for slot in batch.slots.tolist()]
                    step_ids |= {slot: mine.sample(g) for slot, g in zip(batch.slots.tolist(), numbers, strict=True)}
            assert sorted(step_ids) == [0, 1, 2, 3]
            ids += [step_ids[slot] for slot in range(4)]
        seen[dp, accumulate] = ids
    assert len({tuple(ids) for ids in seen.values()}) == 1
    samples = loader(folder, 1, 0, "contiguous").samples
    ids = seen[1, 1]
    assert samples == 103
    assert sorted(ids[:samples]) == list(range(samples))
    assert max(Counter(ids).values()) <= 2


def test_held_out_rows_are_spread_and_padded_evenly(folder):
    _, split = ByteCorpus(str(folder)).split(0.5)
    loaders = [EvalLoader(split, seq_len=10, samples=7, rows_per_batch=2, dp=2, dp_rank=r,
                          segment=make_segment(10, cp=1, rank=0)) for r in (0, 1)]  # fmt: skip
    batches = [list(x) for x in loaders]
    assert len(batches[0]) == len(batches[1]) == 2
    assert loaders[0].chosen == [0, 10, 21, 31, 42, 52, 63]
    ids = [i for pair in zip(*batches, strict=True) for batch in pair for i in batch.sample_ids.tolist()]
    assert ids == [0, 1, 2, 3, 4, 5, 6, -1]
    for batch in (b for rank in batches for b in rank):
        for row, number in enumerate(i for i in batch.sample_ids.tolist() if i >= 0):
            start = loaders[0].chosen[number] * 10
            assert np.array_equal(batch.tokens[row], split.read(start, start + 10))
            assert np.array_equal(batch.labels[row], split.read(start + 1, start + 11))
    assert bool((batches[1][1].labels[1] == -100).all())
    few = EvalLoader(split, seq_len=300, samples=64, rows_per_batch=4, dp=1, dp_rank=0,
                     segment=make_segment(300, cp=1, rank=0))  # fmt: skip
    assert sum(int((batch.labels != -100).sum()) for batch in few) == 2 * 300


def test_held_out_parts_without_a_sequence_are_refused(folder):
    _, split = ByteCorpus(str(folder)).split(0.01)
    with pytest.raises(Refused, match=r"data\.seq_len=15: the held-out part .* has 15 bytes.* use 14 or less"):
        EvalLoader(split, seq_len=15, samples=1, rows_per_batch=1, dp=1, dp_rank=0, segment=make_segment(15, cp=1, rank=0))


@given(
    cp=st.integers(1, 4),
    dp=st.integers(1, 3),
    rows=st.integers(1, 3),
    samples=st.integers(1, 9),
    order=st.sampled_from(ORDERS),
)
@settings(max_examples=30, deadline=None)
def test_every_label_of_an_evaluation_counts_once(cp, dp, rows, samples, order):
    split, _ = LIBRARY.split(0.5)
    counted, sizes = 0, set()
    for rank in range(cp):
        segment = make_segment(7, cp=cp, rank=rank, order=order)
        for dp_rank in range(dp):
            shared = {"seq_len": 7, "samples": samples, "rows_per_batch": rows, "segment": segment}
            batches = list(EvalLoader(split, dp=dp, dp_rank=dp_rank, **shared))
            sizes.add(tuple(batch.tokens.shape for batch in batches))
            counted += sum(int((batch.labels != -100).sum()) for batch in batches)
    assert counted == samples * 7
    assert len(sizes) == 1


def test_a_segment_of_another_length_is_refused(folder):
    split, _ = ByteCorpus(str(folder)).split(0.1)
    with pytest.raises(Refused, match="seq_len=8: the segment is of sequences of 9"):
        EvalLoader(split, seq_len=8, samples=1, rows_per_batch=1, dp=1, dp_rank=0, segment=make_segment(9, cp=1, rank=0))


def test_batches_that_do_not_divide_are_refused(folder):
    with pytest.raises(Refused, match=r"train\.batch_size=4"):
        loader(folder, 1, 0, "contiguous", dp=3)


def test_batches_are_int64(folder):
    batch = loader(folder, 2, 1, "head_tail").batch(1, 0)
    tensors = (batch.tokens, batch.labels, batch.positions, batch.slots, batch.sample_ids)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


# -- prefixes, masks and sources -------------------------------------------------------------------------------------


def union(loaders, step, micro, seq_len):
    """(tokens, labels) of the whole rows, (B, S) each, from the batches of all ranks of a cp group."""
    batches = [mine.batch(step, micro) for mine in loaders]
    found = np.full((2, batches[0].tokens.shape[0], seq_len), -1, np.int64)
    for batch in batches:
        places, rows = batch.positions.numpy(), torch.stack((batch.tokens, batch.labels)).numpy()
        assert batch.segment.positions is batch.positions
        assert batch.cu_seqlens is None
        found[:, :, places[places < seq_len]] = rows[:, :, places < seq_len]
        assert (rows[0][:, places >= seq_len] == 0).all()
        assert (rows[1][:, places >= seq_len] == -100).all()
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [{"prefix": 5}, {"mask_rate": 0.4}, {"prefix": 1}, {"prefix": 13}])
def test_ranks_together_hold_what_one_holds(folder, kind, order, cp):
    plain = union([loader(folder, 1, 0, order)], 2, 1, 13)
    one = union([loader(folder, 1, 0, order, **kind)], 2, 1, 13)
    found = union([loader(folder, cp, rank, order, **kind) for rank in range(cp)], 2, 1, 13)
    assert np.array_equal(found, one)
    tokens, labels = found
    if "prefix" in kind:
        assert np.array_equal(tokens, plain[0])
        assert np.array_equal(labels, np.where(np.arange(13) < kind["prefix"] - 1, -100, plain[1]))
    else:
        hidden = labels != -100
        assert np.array_equal(hidden, tokens == 256)
        assert np.array_equal(np.where(hidden, labels, tokens), plain[0])
        assert 0 < hidden.sum() < hidden.size


def test_masks_are_alike_in_any_layout_and_differ_by_sample_and_seed(folder):
    one = loader(folder, 1, 0, "contiguous", accumulate=1, mask_rate=0.5)
    rows = [one.batch(step, 0).tokens == 256 for step in (1, 2, 30)]
    for step, expected in zip((1, 2, 30), rows, strict=True):
        for dp, accumulate in ((2, 2), (4, 1), (1, 4)):
            for dp_rank in range(dp):
                mine = loader(folder, 1, 0, "contiguous", dp=dp, dp_rank=dp_rank, accumulate=accumulate, mask_rate=0.5)
                for micro in range(accumulate):
                    batch = mine.batch(step, micro)
                    assert torch.equal(batch.tokens == 256, expected[batch.slots])
    assert len({tuple(row.tolist()) for row in torch.cat(rows)}) == 12
    # the same text in the next epoch: other tokens of it are masked
    first, again = [number for number in range(2 * one.samples) if one.sample(number) == 5]
    numbers = [one.batch(number // 4 + 1, 0).tokens[number % 4] == 256 for number in (first, again)]
    assert not torch.equal(*numbers)
    other = loader(folder, 1, 0, "contiguous", accumulate=1, mask_rate=0.5, seed=4).batch(1, 0).tokens == 256
    assert not torch.equal(other, rows[0])


@pytest.mark.parametrize("rate", [0.0001, 0.15, 0.5, 1.0])
def test_so_many_tokens_are_masked(rate):
    split, _ = LIBRARY.split(0.5)
    mine = Loader(split, seq_len=20_000, batch_size=10, accumulate=1, dp=1, dp_rank=0, seed=1,
                  segment=make_segment(20_000, cp=1, rank=0), mask_rate=rate, mask_id=300)  # fmt: skip
    hidden = (mine.batch(1, 0).tokens == 300).float()
    assert abs(float(hidden.mean()) - rate) <= 4 * (rate * (1 - rate) / hidden.numel()) ** 0.5
    # neighbours, and rows at one place, are masked independently
    if rate == 0.5:
        assert abs(float(torch.corrcoef(torch.stack((hidden[:, 1:].flatten(), hidden[:, :-1].flatten())))[0, 1])) < 0.01
        assert abs(float(torch.corrcoef(torch.stack((hidden[0], hidden[1])))[0, 1])) < 0.04


def test_masked_samples_take_no_byte_more(folder):
    for rank in range(3):
        mine = loader(folder, 3, rank, "head_tail", mask_rate=0.4)
        batch = mine.batch(1, 0)
        assert mine.bytes_read == 2 * batch.segment.true_len
    split = ByteCorpus(str(folder)).split(0.01)[1]  # 15 bytes: one sequence of 15
    held_out = EvalLoader(split, seq_len=15, samples=1, rows_per_batch=2, dp=1, dp_rank=0, mask_rate=0.5,
                          segment=make_segment(15, cp=1, rank=0))  # fmt: skip
    (batch,) = held_out
    assert np.array_equal(torch.where(batch.labels == -100, batch.tokens, batch.labels)[0], split.read(0, 15))
    assert bool((batch.labels[1] == -100).all())
    assert not batch.tokens[1].any()
    with pytest.raises(Refused, match="has 15 bytes; use 15 or less"):
        EvalLoader(split, seq_len=16, samples=1, rows_per_batch=1, dp=1, dp_rank=0, mask_rate=0.5,
                   segment=make_segment(16, cp=1, rank=0))  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("every", [1, 2, 4, 13, 20])
def test_a_source_is_every_so_many_bytes(folder, whole, order, cp, every):
    length = -(-13 // every)
    plain = union([loader(folder, 1, 0, order)], 2, 1, 13)
    source = np.full((2, length), -1)
    loaders = []
    for rank in range(cp):
        segment = make_segment(length, cp=cp, rank=rank, order=order)
        loaders.append(loader(folder, cp, rank, order, source_every=every, source_segment=segment))
        batch = loaders[-1].batch(2, 1)
        assert batch.source.dtype == torch.int64
        assert batch.source_segment is segment
        assert batch.source.shape == (2, segment.local_len)
        own = segment.positions.numpy() < length
        assert not batch.source.numpy()[:, ~own].any()
        source[:, segment.positions.numpy()[own]] = batch.source.numpy()[:, own]
        runs = [(batch.segment, 1, 1), (segment, every, 1 - every)]
        expected = sum(b * n + more for cut, n, more in runs for b in [y - x for _, _, x, y in cut.local_runs])
        assert loaders[-1].bytes_read == 2 * expected
    starts = [loaders[0].sample(number) * 13 for number in (6, 7)]
    assert np.array_equal(source, [whole[start : start + 13 : every] for start in starts])
    assert np.array_equal(union(loaders, 2, 1, 13), plain)


def test_held_out_sources_are_padded(folder):
    split = ByteCorpus(str(folder)).split(0.1)[1]
    loaded = EvalLoader(split, seq_len=10, samples=3, rows_per_batch=4, dp=1, dp_rank=0, source_every=3,
                        segment=make_segment(10, cp=1, rank=0), source_segment=make_segment(4, cp=1, rank=0))  # fmt: skip
    (batch,) = loaded
    assert np.array_equal(batch.source[:3], [split.read(10 * i, 10 * i + 10)[::3] for i in loaded.chosen])
    assert not batch.source[3].any()


@pytest.mark.parametrize("kind, words", [({"prefix": 14}, "prefix=14: .*use 0 to 13"), ({"prefix": -1}, "prefix=-1"),
                                         ({"mask_rate": 1.5}, r"mask_rate=1\.5"), ({"mask_rate": -0.1}, "mask_rate"),
                                         ({"source_every": -1}, "source_every=-1")])  # fmt: skip
def test_settings_out_of_range_are_refused(folder, kind, words):
    with pytest.raises(Refused, match=words):
        loader(folder, 1, 0, "contiguous", **kind)
