"""Token files: read as they are, refused by file and byte where they hold anything else."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lss.config import Refused, load_config
from lss.data import ByteCorpus, Loader, TokenCorpus, open_corpus
from lss.segment import make_segment

IDS = np.random.default_rng(3).integers(0, 256, 1500)


@pytest.fixture
def tokens(tmp_path):
    """The same ids three times over: as bytes, and as token files of four kinds in the same pieces."""
    parts = np.split(IDS, [400, 401, 1000])
    for folder in ("bytes", "tokens"):
        (tmp_path / folder / "sub").mkdir(parents=True)
    names = ("a", "b", "c", "sub/d")
    for name, part in zip(names, parts, strict=True):
        (tmp_path / "bytes" / name).write_bytes(part.astype(np.uint8).tobytes())
    part.astype("<u2").tofile(tmp_path / "tokens" / "sub" / "d.bin")
    for name, part, dtype in zip(names, parts, ("<u2", "<i8", ">i4", None), strict=True):
        if dtype:
            np.save(tmp_path / "tokens" / f"{name}.npy", part.astype(dtype))
    return tmp_path


def test_reads_any_span_of_any_kind_of_file(tokens):
    corpus = TokenCorpus(str(tokens / "tokens"), 256)
    corpus.scan()
    assert (len(corpus), [f.name for f in corpus.files]) == (1500, ["a.npy", "b.npy", "c.npy", "d.bin"])
    for start, stop in ((0, 1500), (399, 402), (400, 401), (0, 0), (1499, 1500), (3, 1400)):
        found = corpus.read(start, stop)
        assert found.dtype == np.int64
        assert np.array_equal(found, IDS[start:stop])
    assert len(TokenCorpus(str(tokens / "tokens/**/*.bin"), 256)) == 500
    assert len(TokenCorpus(str(tokens / "tokens/a.npy"), 256)) == 400


@pytest.mark.parametrize("packing", [False, True])
def test_batches_are_those_of_the_same_bytes(tokens, packing):
    """Splitting, sampling, packing and cutting know nothing of what an item is."""
    segment = make_segment(32, cp=2, rank=1, order="head_tail")
    kind = {"packing": True, "segment_of": lambda edges: make_segment(32, cp=2, rank=1, cu_seqlens=edges)} if packing else {}
    batches = []
    for corpus in (ByteCorpus(str(tokens / "bytes")), TokenCorpus(str(tokens / "tokens"), 256)):
        training, held_out = corpus.split(0.1)
        assert (len(training), len(held_out)) == (1350, 150)
        loader = Loader(training, seq_len=32, batch_size=1, accumulate=1, dp=1, dp_rank=0, segment=segment, seed=5, **kind)
        batches.append([loader.batch(step, 0) for step in range(1, 60)])
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.labels, b.labels)


def test_four_bytes_an_id(tmp_path):
    IDS.astype("<u4").tofile(tmp_path / "x.bin")
    assert np.array_equal(TokenCorpus(str(tmp_path), 256, 4).read(0, 1500), IDS)
    assert len(TokenCorpus(str(tmp_path), 256, 2)) == 3000
    assert TokenCorpus(str(tmp_path), 256, 2).digest != TokenCorpus(str(tmp_path), 256, 4).digest


def header(descr, shape):
    """A .npy file's beginning, as numpy writes it."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def npy(array):
    kind = np.dtype(array.dtype)
    return header(kind.str, array.shape) + array.tobytes()


BAD = {
    "empty.bin": (b"", "empty at byte 0"),
    "odd.bin": (b"abc", r"3 bytes do not make ids of data\.token_bytes=2, and the last begins at byte 2"),
    "empty.npy": (b"", "empty at byte 0"),
    "none.npy": (npy(np.zeros(0, np.int64)), "no ids after its header"),
    "text.npy": (b"to be or not to be", "byte 0 begins no .npy header"),
    "short.npy": (npy(IDS)[:40], "byte 0 begins no .npy header"),
    "cut.npy": (npy(IDS)[:-3], r"cut off at byte 12,12\d, and its header tells of 12,128"),
    "more.npy": (npy(IDS) + b"more", "goes on at byte 12,128"),
    "square.npy": (npy(IDS.reshape(30, 50)), r"has the shape \(30, 50\)"),
    "scalar.npy": (npy(np.array(3)), r"has the shape \(\)"),
    "floats.npy": (npy(np.ones(9, np.float32)), "holds float32, not whole numbers;"),
    "nan.npy": (npy(np.array([1.0, 2.0, np.nan, np.nan])), r"holds float64, .* NaN at item 2 \(byte 144\)"),
    "bools.npy": (npy(np.ones(9, bool)), "holds bool"),
    "objects.npy": (header("|O", (3,)) + b"cos\nsystem\n(S'touch hacked'\ntR.", "Python objects, which are never loaded"),
    "code.npy": (b"\x93NUMPY\x01\x00\x30\x00" + b"__import__('os').system('touch hacked')".ljust(47) + b"\n", "header"),
    "huge.npy": (header("<i8", (2**62,)) + b"12345678", "cut off"),
    "below.npy": (header("<i8", (-3,)) + b"12345678", "header"),
    "long.npy": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 1000, "header"),
    "version.npy": (b"\x93NUMPY\x09\x00" + b" " * 1000, "version 9.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_not_tokens_are_refused_by_name_and_byte(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    IDS.astype("<u2").tofile(tmp_path / "good.bin")
    with pytest.raises(Refused, match=rf"{re.escape(name)}: .*{words}") as refusal:
        TokenCorpus(str(tmp_path), 256)
    assert len(str(refusal.value)) < 300 + len(str(tmp_path))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "ids, dtype, shown, byte",
    [
        ([5, 255, 256, 7], "<u2", "256", 4),
        ([5, 255, 7, 70000], "<u4", "70000", 12),
        ([1, -1, 2], "<i8", "-1", 136),
        ([1, 2, -3], ">i2", "-3", 132),
        ([1, 2**63 + 5], "<u8", str(2**63 + 5), 136),
    ],
)
def test_ids_out_of_the_vocabulary_are_named_with_their_byte(tmp_path, ids, dtype, shown, byte):
    array = np.array(ids, dtype)
    raw = dtype in ("<u2", "<u4")
    file = tmp_path / ("ids.bin" if raw else "ids.npy")
    file.write_bytes(array.tobytes() if raw else npy(array))
    corpus = TokenCorpus(str(file), 256, array.itemsize if raw else 2)
    place = next(i for i, number in enumerate(ids) if not 0 <= number < 256)
    words = rf"id {shown} at token {place} \(byte {byte}\) is not of the vocabulary, 0 to 255 \(model\.vocab_size=256\)"
    for use in (corpus.scan, lambda: corpus.read(0, len(ids))):
        with pytest.raises(Refused, match=words):
            use()


def test_parts_of_a_scan_make_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("lss.data.tokens._BLOCK", 100)
    for place in (0, 99, 100, 950, 1499):
        ids = IDS.copy()
        ids[place] = 300
        ids.astype("<u2").tofile(tmp_path / "x.bin")
        corpus, found = TokenCorpus(str(tmp_path), 256), []
        for part in range(3):
            try:
                corpus.scan(part, 3)
            except Refused as refusal:
                found.append(str(refusal))
        assert len(found) == 1
        assert f"at token {place:,} (byte {2 * place:,})" in found[0]


def test_a_token_file_that_changes_under_the_run_is_noticed(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "x.bin")
    corpus = TokenCorpus(str(tmp_path), 256)
    corpus.scan()
    (IDS + 256).astype("<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(Refused, match="not of the vocabulary"):
        corpus.read(3, 9)
    (tmp_path / "x.bin").write_bytes(b"ab")
    with pytest.raises(Refused, match="shorter than when the run began"):
        corpus.read(100, 110)


def test_an_encoder_keeps_its_last_id_for_masks(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "x.bin")
    settings = ["data.source=tokens", f"data.path={tmp_path}", "model.kind=encoder"]
    open_corpus(load_config(None, [*settings, "model.vocab_size=257"])).scan()
    with pytest.raises(Refused, match="id 255"):
        open_corpus(load_config(None, [*settings, "model.vocab_size=256"])).scan()


def test_nothing_of_tokens_in_a_folder_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for path, words in ((tmp_path, "not a .bin or .npy file"), (tmp_path / "a.txt", "not a .bin"), ("", "needs a file")):
        with pytest.raises(Refused, match=words):
            TokenCorpus(str(path), 256)
