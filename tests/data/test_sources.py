"""Corpora: which files are read, in which order, and what is refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lss.config import Refused
from lss.data import ByteCorpus
from lss.data.info import describe


def test_reads_any_span_over_files(folder, whole):
    corpus, expected = ByteCorpus(str(folder)), whole
    assert len(corpus) == 1500
    assert [f.name for f in corpus.files] == ["a.bin", "b.bin", "c.txt"]
    for start, stop in ((0, 1500), (998, 1003), (1000, 1001), (0, 0), (1499, 1500), (3, 900)):
        assert np.array_equal(corpus.read(start, stop), expected[start:stop])


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_span_is_that_span_of_the_bytes(folder, whole, data):
    corpus = ByteCorpus(str(folder))
    start = data.draw(st.integers(0, len(corpus)))
    stop = data.draw(st.integers(start, len(corpus)))
    found = corpus.read(start, stop)
    assert found.dtype == np.uint8
    assert np.array_equal(found, whole[start:stop])


def test_more_files_than_stay_open(tmp_path):
    for number in range(200):
        (tmp_path / f"{number:03}").write_bytes(bytes([number]) * (number + 1))
    corpus = ByteCorpus(str(tmp_path))
    expected = np.repeat(np.arange(200, dtype=np.uint8), np.arange(1, 201))
    assert np.array_equal(corpus.read(0, len(corpus)), expected)
    assert np.array_equal(corpus.read(3, len(corpus)), expected[3:])
    assert corpus._map.cache_info().currsize == 64


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


@pytest.mark.parametrize(
    "path, words",
    [
        ("x" * 5000, "no such file|too long"),
        ("a\0b", "no such file|null"),
        ("~no such user/a", "home directory"),
        ("/dev/null", "not a regular file"),
    ],
)
def test_odd_paths_are_refused_shortly(path, words):
    with pytest.raises(Refused, match=words) as refusal:
        ByteCorpus(path)
    assert len(str(refusal.value)) < 300


def test_what_the_system_forbids_is_refused_not_left_out(folder, monkeypatch):
    """By stand-ins for the system's answers, since the superuser may read everything."""

    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        with pytest.raises(Refused, match=r"cannot be read \(Permission denied\)"):
            ByteCorpus(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: not str(path).endswith("b.bin"))
        with pytest.raises(Refused, match=r"b\.bin: no permission to read it"):
            ByteCorpus(str(folder))


def test_links_pipes_and_odd_names(folder):
    before = ByteCorpus(str(folder))
    os.symlink(folder, folder / "sub" / "circle")
    os.symlink(folder / "nowhere", folder / "broken")
    os.mkfifo(folder / "pipe")
    assert ByteCorpus(str(folder)).digest == before.digest
    (folder / ".git").mkdir()
    (folder / ".git" / "objects").write_bytes(b"not text")
    assert ByteCorpus(str(folder)).digest == before.digest
    (folder / "file [1].txt").write_bytes(b"brackets")
    assert len(ByteCorpus(str(folder / "file [1].txt"))) == 8
    with open(os.fsencode(folder) + b"/\xff.txt", "wb") as file:  # a name that is not UTF-8
        file.write(b"abc")
    assert len(ByteCorpus(str(folder))) == 1500 + 8 + 3


def test_a_pattern_that_meets_a_file_twice_reads_it_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(ByteCorpus("**/**")) == 1500
    assert len(ByteCorpus("**/*.bin")) == len(ByteCorpus(str(folder / "**/*.bin"))) == 1001
    assert ByteCorpus("**/*.bin").digest == ByteCorpus(str(folder / "**/*.bin")).digest


def test_the_digest_tells_names_and_sizes(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("copy")
    (elsewhere / "sub").mkdir()
    for file in ("a.bin", "sub/b.bin", "sub/c.txt"):
        (elsewhere / file).write_bytes((folder / file).read_bytes())
    digest = ByteCorpus(str(folder)).digest
    assert ByteCorpus(str(elsewhere)).digest == digest
    (elsewhere / "a.bin").rename(elsewhere / "A.bin")
    renamed = ByteCorpus(str(elsewhere)).digest
    (elsewhere / "A.bin").rename(elsewhere / "a.bin")
    (elsewhere / "a.bin").write_bytes(b"x" * 999)
    assert len({digest, renamed, ByteCorpus(str(elsewhere)).digest}) == 3


@pytest.mark.parametrize("opened", [False, True], ids=["before its first read", "after it"])
@pytest.mark.parametrize("content, words", [(b"short", "shorter"), (b"", "shorter"), (None, "cannot be read any more")])
def test_a_file_that_shrinks_or_goes_is_noticed(folder, opened, content, words):
    corpus = ByteCorpus(str(folder))
    if opened:
        corpus.read(10, 20)
    if content is None:
        (folder / "a.bin").unlink()
    else:
        (folder / "a.bin").write_bytes(content)
    with pytest.raises(Refused, match=rf"a\.bin: {words}"):
        corpus.read(10, 20)


def test_split_holds_out_the_end(folder, whole):
    train, held_out = ByteCorpus(str(folder)).split(0.1)
    assert (len(train), len(held_out)) == (1350, 150)
    assert np.array_equal(held_out.read(0, 150), whole[1350:])
    assert train.samples(100) == 13
    with pytest.raises(Refused, match=r"data\.seq_len=200: the held-out part .* use 149 or less"):
        held_out.samples(200)
    assert held_out.samples(149) == 1


@pytest.mark.parametrize("size", [1, 2])
def test_parts_too_small_for_any_sequence_ask_for_more_text(tmp_path, size):
    (tmp_path / "tiny").write_bytes(b"x" * size)
    for part in ByteCorpus(str(tmp_path)).split(0.5):
        with pytest.raises(Refused, match=r"give more text, in data\.path"):
            part.samples(1)


@given(st.integers(2, 10**6), st.floats(1e-6, 0.5))
@settings(max_examples=50, deadline=None)
def test_the_parts_make_the_whole(size, held_out):
    corpus = ByteCorpus.__new__(ByteCorpus)
    corpus._ends = [size]
    train, rest = corpus.split(held_out)
    assert (train.start, train.stop, rest.stop) == (0, rest.start, size)
    assert abs(len(rest) - held_out * size) <= 0.5


def test_description(folder):
    facts = describe(ByteCorpus(str(folder)), 100)
    assert (facts["files"], facts["bytes"], facts["shortest_file"], facts["longest_file"]) == (3, 1500, 1, 1000)
    assert facts["training_sequences_of_100"] == 14
    assert 7 < facts["bits_per_byte_without_context"] < 8


def test_description_of_known_bytes(tmp_path):
    (tmp_path / "four").write_bytes(bytes([7, 27, 65, 66]) * 100)
    facts = describe(ByteCorpus(str(tmp_path)), 19, held_out=0.1)
    assert (facts["bits_per_byte_without_context"], facts["distinct_bytes"]) == (2.0, 4)
    assert (facts["training_bytes"], facts["held_out_bytes"]) == (360, 40)
    assert (facts["training_sequences_of_19"], facts["held_out_sequences_of_19"]) == (18, 2)
    # a bell and an escape must not reach the terminal
    assert set(facts["sample"]) == {"A", "B", "\N{REPLACEMENT CHARACTER}"}
    (tmp_path / "four").write_bytes(b"aaaa")
    assert str(describe(ByteCorpus(str(tmp_path)), 1)["bits_per_byte_without_context"]) == "0.0"
