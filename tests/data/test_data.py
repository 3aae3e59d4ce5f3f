"""Corpora, the order of samples, and that each rank reads its own bytes and the right labels."""

from __future__ import annotations

import io
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lss.config import Refused
from lss.data import ByteCorpus, EvalLoader, Loader
from lss.data.fetch import CORPORA, Corpus, fetch
from lss.data.info import describe
from lss.data.permutation import permute
from lss.segment import ORDERS, make_segment


@pytest.fixture
def folder(tmp_path):
    """Three files of 1000, 1 and 499 bytes in a tree, an empty one and a hidden one."""
    generator = np.random.default_rng(0)
    (tmp_path / "sub").mkdir()
    for name, size in (("a.bin", 1000), ("sub/b.bin", 1), ("sub/c.txt", 499), ("empty", 0), (".hidden", 7)):
        (tmp_path / name).write_bytes(generator.integers(0, 256, size, dtype=np.uint8).tobytes())
    return tmp_path


def whole(folder):
    return np.concatenate([np.fromfile(folder / name, np.uint8) for name in ("a.bin", "sub/b.bin", "sub/c.txt")])


def test_reads_any_span_over_files(folder):
    corpus, expected = ByteCorpus(str(folder)), whole(folder)
    assert len(corpus) == 1500
    assert [f.name for f in corpus.files] == ["a.bin", "b.bin", "c.txt"]
    for start, stop in ((0, 1500), (998, 1003), (1000, 1001), (0, 0), (1499, 1500), (3, 900)):
        assert np.array_equal(corpus.read(start, stop), expected[start:stop])


def test_file_glob_and_default(folder):
    assert len(ByteCorpus(str(folder / "sub/c.txt"))) == 499
    assert len(ByteCorpus(str(folder / "**/*.bin"))) == 1001
    library = ByteCorpus("")
    assert len(library) > 5_000_000
    assert not any("site-packages" in str(f) or "/test/" in str(f) for f in library.files)
    assert b"import" in library.read(0, 100_000).tobytes()
    assert library.digest == ByteCorpus("").digest != ByteCorpus(str(folder)).digest


@pytest.mark.parametrize("path, words", [("absent", "no such file"), ("*.none", "no file matches"), ("empty", "no bytes"),
                                         ("nothing", "holds no files")])  # fmt: skip
def test_what_cannot_be_read_is_refused(folder, path, words):
    (folder / "nothing").mkdir()
    with pytest.raises(Refused, match=words):
        ByteCorpus(str(folder / path))


def test_a_file_that_shrinks_is_noticed(folder):
    corpus = ByteCorpus(str(folder))
    (folder / "a.bin").write_bytes(b"short")
    with pytest.raises(Refused, match=r"a\.bin: shorter"):
        corpus.read(10, 20)


def test_split_holds_out_the_end(folder):
    train, held_out = ByteCorpus(str(folder)).split(0.1)
    assert (len(train), len(held_out)) == (1350, 150)
    assert np.array_equal(held_out.read(0, 150), whole(folder)[1350:])
    assert train.samples(100) == 13
    with pytest.raises(Refused, match=r"data\.seq_len=200: the held-out part .* use 149 or less"):
        held_out.samples(200)


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(permute(i, n, seed, epoch) for i in range(n)) == list(range(n))


def test_epochs_and_seeds_differ_and_stay_the_same_for_ever():
    orders = {(s, e): tuple(permute(i, 50, s, e) for i in range(50)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    # fixed numbers: an order that changes with a version would change what a resumed run reads
    assert orders[0, 0][:8] == (30, 25, 41, 0, 15, 19, 48, 31)


def loader(folder, cp, rank, order, *, dp=1, dp_rank=0, seq_len=13, batch_size=4, accumulate=2, seed=3):
    split, _ = ByteCorpus(str(folder)).split(0.1)
    segment = make_segment(seq_len, cp=cp, rank=rank, order=order)
    return Loader(split, seq_len=seq_len, batch_size=batch_size, accumulate=accumulate, dp=dp, dp_rank=dp_rank,
                  segment=segment, seed=seed)  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("seq_len", [1, 2, 13, 16])
def test_ranks_together_hold_each_sequence_and_its_labels(folder, order, cp, seq_len):
    text = whole(folder)
    ranks = [loader(folder, cp, rank, order, seq_len=seq_len).batch(2, 1) for rank in range(cp)]
    for row, sample in enumerate(ranks[0].sample_ids.tolist()):
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


def test_a_rank_reads_only_its_own_bytes(folder):
    for rank in range(4):
        mine = loader(folder, 4, rank, "head_tail", seq_len=64)
        mine.batch(1, 0)
        # two rows of 64 / 4 tokens, and one more byte for the last label of each run
        runs = len(mine.segment.local_runs)
        assert mine.bytes_read == 2 * (16 + runs)


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
                    step_ids |= dict(zip(batch.slots.tolist(), batch.sample_ids.tolist(), strict=True))
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
    ids = [i for pair in zip(*batches, strict=True) for batch in pair for i in batch.sample_ids.tolist()]
    assert ids == [0, 10, 21, 31, 42, 52, 63, -1]
    assert bool((batches[1][1].labels[1] == -100).all())
    few = EvalLoader(split, seq_len=300, samples=64, rows_per_batch=4, dp=1, dp_rank=0,
                     segment=make_segment(300, cp=1, rank=0))  # fmt: skip
    assert sum(int((batch.labels != -100).sum()) for batch in few) == 2 * 300


def test_batches_that_do_not_divide_are_refused(folder):
    with pytest.raises(Refused, match=r"train\.batch_size=4"):
        loader(folder, 1, 0, "contiguous", dp=3)


def test_description(folder):
    facts = describe(ByteCorpus(str(folder)), 100)
    assert (facts["files"], facts["bytes"], facts["shortest_file"], facts["longest_file"]) == (3, 1500, 1, 1000)
    assert facts["training_sequences_of_100"] == 14
    assert 7 < facts["bits_per_byte_without_context"] < 8


def archive(tmp_path, payload):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("corpus", payload)
    (tmp_path / "archive.zip").write_bytes(buffer.getvalue())
    return (tmp_path / "archive.zip").as_uri()


def test_fetch_checks_every_byte(tmp_path):
    import hashlib

    payload = b"some text " * 1000
    known = {"it": Corpus(archive(tmp_path, payload), "corpus", len(payload), hashlib.sha256(payload).hexdigest())}
    target = fetch("it", tmp_path / "to", known)
    assert target.read_bytes() == payload
    assert fetch("it", tmp_path / "to", known) == target
    assert sorted(p.name for p in target.parent.iterdir()) == ["it"]
    target.write_bytes(payload[:-1] + b"!")
    with pytest.raises(Refused, match="SHA-256"):
        fetch("it", tmp_path / "to", known)
    other = {"it": Corpus(known["it"].url, "corpus", len(payload), "0" * 64)}
    with pytest.raises(Refused, match="SHA-256"):
        fetch("it", tmp_path / "elsewhere", other)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_fetch_says_plainly_that_there_is_no_network(tmp_path):
    closed = Corpus("http://127.0.0.1:9/enwik8.zip", "enwik8", 1, "0" * 64)
    with pytest.raises(Refused, match=r"there is no network here.*put the unpacked file at .*enwik8"):
        fetch("enwik8", tmp_path, {"enwik8": closed})
    with pytest.raises(Refused, match="known: enwik8"):
        fetch("enwik9", tmp_path)
    assert CORPORA["enwik8"].size == 10**8


def test_batches_are_int64(folder):
    batch = loader(folder, 2, 1, "head_tail").batch(1, 0)
    assert {x.dtype for x in (batch.tokens, batch.labels, batch.positions, batch.slots, batch.sample_ids)} == {torch.int64}
