"""`lss data tokenize`: the tokenizer's own ids, alike in any number of parts and processes, resumed, checked."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec

import numpy as np
import pytest

from lss.cli import main
from lss.config import Refused
from lss.data import TokenCorpus, documents
from lss.data import tokenize as module
from lss.data.info import describe_tokens
from lss.data.tokenize import Recipe, tokenize
from tests.data.tokenizers import MARKED, save_tokenizer

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = save_tokenizer(folder)
    return str(folder), made


@pytest.fixture
def texts(tmp_path):
    """Five files, of lines of many kinds of ends."""
    draw = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(5):
        ends = ("", " ", "\n", "\n\n  ", "\t")
        lines = ("the lazy dög " * int(draw.integers(1, 9)) + ends[draw.integers(5)] for _ in range(200))
        (tmp_path / "in" / f"{number}.txt").write_text("\n".join(lines))
    (tmp_path / "in" / "empty.txt").write_text("")
    return tmp_path / "in"


def whole(fast, texts):
    """What the tokenizer makes of each file at once, ended."""
    kept = [path.read_text() for path in sorted(texts.iterdir()) if path.stat().st_size]
    return [[*fast(text, add_special_tokens=False)["input_ids"], fast.eos_token_id] for text in kept]


@pytest.mark.parametrize("part, chunk", [(16 << 20, 1 << 16), (5000, 700), (1000, 33)])
def test_cut_into_parts_it_is_what_the_tokenizer_makes_of_the_whole(tmp_path, monkeypatch, fast, texts, part, chunk):
    monkeypatch.setattr(documents, "PART", part)
    monkeypatch.setattr(documents, "CHUNK", chunk)
    seen = []
    index = tokenize([str(texts)], Recipe(fast[0]), tmp_path / "out", processes=1, progress=lambda *at: seen.append(at))
    corpus, expected = TokenCorpus(str(tmp_path / "out"), 290), whole(fast[1], texts)
    assert np.array_equal(corpus.read(0, len(corpus)), np.concatenate(expected))
    assert np.array_equal(corpus.document_ends(), np.cumsum([len(ids) for ids in expected]))
    assert (index["documents"], index["token_bytes"], index["vocab_size"]) == (5, 2, len(fast[1]))
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in texts.iterdir())


def test_broken_off_it_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch, fast, texts):
    monkeypatch.setattr(documents, "PART", 4000)
    tokenize([str(texts)], Recipe(fast[0]), tmp_path / "straight", processes=1)
    made, original = [], module._make

    def broken(part, recipe, out, number, tokenizer):
        if len(made) == 3:
            raise InterruptedError
        made.append(number)
        return original(part, recipe, out, number, tokenizer)

    monkeypatch.setattr(module, "_make", broken)
    with pytest.raises((InterruptedError, Refused)):
        tokenize([str(texts)], Recipe(fast[0]), tmp_path / "out", processes=1)
    assert not (tmp_path / "out" / "tokens.json").exists()
    again = []
    monkeypatch.setattr(module, "_make", lambda *args: again.append(args[3]) or original(*args))
    tokenize([str(texts)], Recipe(fast[0]), tmp_path / "out", processes=1)
    assert made == [0, 1, 2]
    assert again[0] == 3
    files = {path.name: path.read_bytes() for path in (tmp_path / "straight").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(Refused, match="other files"):
        tokenize([str(texts / "1.txt")], Recipe(fast[0]), tmp_path / "out")


def test_two_processes_make_the_same(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.fa").write_text(">x\n" + "ACGT" * (9 << 20 >> 2 if number else 4) + "\n")
    given = [str(tmp_path / f"{number}.fa") for number in range(3)]
    indices = [tokenize(given, Recipe("nucleotide"), tmp_path / f"out{n}", processes=n) for n in (1, 2)]
    assert indices[0] == indices[1]
    assert len([name for name in indices[0]["files"] if name.endswith(".bin")]) == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_are_documents(tmp_path, monkeypatch, fast, kind):
    monkeypatch.setattr(documents, "PART", 64)
    rows = ["the quick", "", "brown fox\njumps", "over"] * 9
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"body": row, "other": 1}) for row in rows) + "\n\n")
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"body": rows, "other": [1] * len(rows)}), path, row_group_size=7)
    index = tokenize([str(path)], Recipe(fast[0], field="body"), tmp_path / "out", processes=1)
    expected = [[*fast[1](row)["input_ids"], fast[1].eos_token_id] for row in rows if row]
    corpus = TokenCorpus(str(tmp_path / "out"), 290)
    assert np.array_equal(corpus.read(0, len(corpus)), np.concatenate(expected))
    assert index["documents"] == 27
    assert corpus.read_trained(0, 9) is None
    with pytest.raises(Refused, match="text"):
        tokenize([str(path)], Recipe(fast[0]), tmp_path / "other", processes=1)


CHAT = [{"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps over"},
                      {"role": "user", "content": "dog"}, {"role": "assistant", "content": "lazy"}]},
        {"prompt": "the quick", "completion": " fox"}]  # fmt: skip


@pytest.mark.parametrize("template", ["plain", "marked"])
def test_of_conversations_the_answers_are_trained_on(tmp_path, fast, template):
    folder, made = fast
    if template == "marked":
        folder, made = str(tmp_path / "tokenizer"), save_tokenizer(tmp_path / "tokenizer", MARKED)
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, CHAT)))
    tokenize([str(tmp_path / "x.jsonl")], Recipe(folder, field="messages", chat=True), tmp_path / "out", processes=1)
    corpus = TokenCorpus(str(tmp_path / "out"), 290)
    ids, trained = corpus.read(0, len(corpus)), corpus.read_trained(0, len(corpus))
    assert made.decode(ids) == "<user>the fox<eos><bot>jumps over<eos><user>dog<eos><bot>lazy<eos>the quick fox<eos>"
    assert made.decode(ids[trained]) == "jumps over<eos>lazy<eos> fox<eos>"
    assert np.array_equal(corpus.read_trained(3, 11), trained[3:11])
    assert describe_tokens(str(tmp_path / "out"), 4)["tokens_trained_on"] == trained.sum()


def test_genomes(tmp_path, capsys):
    with gzip.open(tmp_path / "a.fa.gz", "wt") as file:
        file.write(">one two\nACGTN\nacgun\nRYK\n>empty\n>other\n" + "ACGT" * 500_000 + "\n")
    (tmp_path / "b.fastq").write_text("@r1\nACG\n+\n!!!\n@r2\nTTN\n+r2\n@@@\n")
    out = tmp_path / "out"
    assert main(["data", "tokenize", str(tmp_path / "a.fa.gz"), str(tmp_path / "b.fastq"), "--tokenizer", "nucleotide",
                 "-o", str(out)]) == 0  # fmt: skip
    assert "2,000,023 tokens of 4 documents in 2 files" in capsys.readouterr().out
    corpus = TokenCorpus(str(out), 7)
    assert corpus.read(0, 18).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 4, 4, 5, 0, 1, 2, 3]
    assert corpus.read(2_000_014, 2_000_023).tolist() == [5, 0, 1, 2, 5, 3, 3, 4, 5]
    assert corpus.document_ends().tolist() == [14, 2_000_015, 2_000_019, 2_000_023]
    assert out.joinpath("part-00000.bin").stat().st_size == 2_000_023  # a byte a letter
    assert main(["data", "info", str(out), "--seq-len", "1000"]) == 0
    assert "nucleotide" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"good\nb\xffd", r"a\.txt: byte 6 is not UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl, byte 14: not a JSON object"),
    ("a.jsonl", b'{"body": "x"}\n', "no text in the field 'text' .* has body"),
    ("a.fa", b">x\nACGT\n", 'FASTA is read by the tokenizer "nucleotide"'),
    ("a.parquet", b"PAR1 it is not", "no Parquet file"),
    ("a.txt", b"", "holds no bytes"),
])  # fmt: skip
def test_what_is_no_text_is_refused_by_place(tmp_path, fast, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=words):
        tokenize([str(tmp_path / name)], Recipe(fast[0]), tmp_path / "out", processes=1)


@pytest.mark.parametrize("content, words", [
    (b">x\nAC-T\n", "'-' is no nucleotide"), (b"ACGT", "FASTA begins with"), (b"@r\nACGT\n+\n!!\n", "not four lines"),
])  # fmt: skip
def test_what_is_no_genome_is_refused(tmp_path, content, words):
    (tmp_path / "x.fa").write_bytes(content)
    with pytest.raises(Refused, match=words):
        tokenize([str(tmp_path / "x.fa")], Recipe("nucleotide"), tmp_path / "out", processes=1)


def test_a_changed_folder_is_noticed(tmp_path, fast, texts):
    out = tmp_path / "out"
    tokenize([str(texts)], Recipe(fast[0]), out, processes=1)
    with pytest.raises(Refused, match=r"of \d+ ids, and the model has 100"):
        TokenCorpus(str(out), 100)
    raw = bytearray((out / "part-00000.bin").read_bytes())
    raw[40] ^= 1
    (out / "part-00000.bin").write_bytes(raw)
    with pytest.raises(Refused, match=r"part-00000\.bin: damaged"):
        describe_tokens(str(out), 8)
    (out / "part-00000.bin").write_bytes(raw[:-2])
    with pytest.raises(Refused, match=r"part-00000\.bin: has"):
        TokenCorpus(str(out), 290)
