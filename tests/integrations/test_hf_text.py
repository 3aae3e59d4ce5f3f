"""`lss train model.hf=... data.path=book.txt` and genomes: tokens are made by the run; runs from the command line."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from lss.checkpoint import read_weights, verify
from lss.cli import main
from lss.config import Refused, load_config
from lss.data import Loader, TokenCorpus
from lss.data.tokenize import Recipe, tokenize
from lss.segment import make_segment
from lss.train.models import find_model
from tests.data.tokenizers import save_tokenizer
from tests.integrations.hf_cases import build

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
SMALL = ["data.seq_len=32", "train.batch_size=2", "train.eval_samples=2", "train.eval_every=0", "train.dtype=float64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer, and a book."""
    place = tmp_path_factory.mktemp("model")
    build("llama", torch.float32, vocab_size=290).save_pretrained(place)
    save_tokenizer(place)
    book = tmp_path_factory.mktemp("book") / "book.txt"
    book.write_text("the quick brown fox jumps over the lazy dog\n" * 99)
    return place, book


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_book_is_tokenised_and_trained_on_and_goes_on_without_the_models_folder(tmp_path, folder, capsys):
    place, book = folder
    moved = tmp_path / "model"
    shutil.copytree(place, moved)
    words = ["train", f"model.hf={moved}", f"data.path={book}", *SMALL, "--out", str(tmp_path / "run")]
    assert main([*words, "train.steps=2"]) == 0
    corpus = TokenCorpus(str(tmp_path / "run" / "tokens"), 290)
    assert corpus.tokenizer == str(moved)
    assert [row["tokens_counted"] for row in rows(tmp_path / "run")] == [64, 64]
    shutil.rmtree(moved)
    assert main([*words, "train.steps=3"]) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    exported(tmp_path / "run", place, capsys)


def exported(run, place, capsys):
    """The export loads by plain transformers, with the trained weights, the model's own config and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run.parent / "exported"
    assert main(["export", str(run), "-o", str(folder), "--format", "hf"]) == 0
    assert "LlamaForCausalLM in float64, " in capsys.readouterr().out
    assert not [path for path in folder.iterdir() if path.suffix not in (".json", ".safetensors", ".jinja")]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float64
    before = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64).eval()
    ours = find_model(load_config(None, [f"model.hf={place}"]), run)
    weights = read_weights(verify(run / "checkpoints/step_3"))
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    trained = ours.source.build(dtype=torch.float64, weights=False).eval()
    trained.load_state_dict(weights, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the quick brown fox", return_tensors="pt")["input_ids"]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(place).chat_template
    with torch.no_grad():
        assert (model(ids).logits - trained(ids).logits).abs().max() < 1e-13
        assert not torch.allclose(model(ids).logits, before(ids).logits)
    kept, old = model.config.to_dict(), before.config.to_dict()
    assert {key for key in kept if kept[key] != old[key]} <= {"dtype", "_name_or_path"}
    assert main(["export", str(run), "-o", str(folder), "--format", "hf"]) == 2
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    assert main(["export", str(run), "-o", str(run.parent / "other"), "--format", "hf"]) == 2
    assert "changed since" in capsys.readouterr().err


@pytest.mark.parametrize("overrides, words", [
    (["model.hf=nowhere"], "no such folder"),
    (["model.hf={empty}"], "transformers cannot load it"),
    (["model.hf={bert}", "data.source=tokens", "data.path={ids}"], "causal language models"),
    (["model.hf={place}", "model.d_model=64"], "model.d_model=64"),
    (["model.hf={place}", "data.source=bytes"], "data.source='bytes'"),
    (["model.hf={place}", "parallel.strategy=tp"], "parallel.strategy='tp'"),
    (["model.hf={place}", "memory.offload=host"], "memory.offload='host'"),
    (["model.hf={place}", "data.source=tokens", "data.path={ids}"], "is not of the vocabulary, 0 to 289"),
    (["model.hf={bare}", "data.path={book}"], "no tokenizer"),
    (["model.hf={place}", "parallel.head_chunks=3"], "model.n_kv_heads=2 bounds it"),
    (["data.source=text"], "model.hf"),
    (["model.hf=owner/that-is-not-there"], "no network"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_a_sentence(tmp_path, folder, capsys, monkeypatch, overrides, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {name: tmp_path / name for name in ("empty", "bert", "bare", "ids")}
    names["empty"].mkdir()
    if "{bert}" in overrides[0]:
        build("bert", torch.float32).save_pretrained(names["bert"])
    if "{bare}" in overrides[0]:
        build("llama", torch.float32).save_pretrained(names["bare"])
    names["ids"].mkdir()
    np.full(900, 290, "<u2").tofile(names["ids"] / "x.bin")
    given = [o.format(place=folder[0], book=folder[1], **names) for o in overrides]
    assert main(["train", *given, *SMALL, "train.steps=1", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_book_too_short_to_be_evaluated_on_is_refused_before_step_1(tmp_path, folder, capsys):
    given = [f"model.hf={folder[0]}", f"data.path={folder[1]}", *SMALL, "data.seq_len=64", "train.eval_every=1"]
    assert main(["train", *given, "--out", str(tmp_path / "run")]) == 2
    assert "the held-out part of" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_strands_are_turned_by_sample_alike_in_any_cut(tmp_path):
    letters = np.random.default_rng(2).choice(list("ACGT"), 4000)
    (tmp_path / "x.fa").write_text(">x\n" + "".join(letters) + "\n")
    tokenize([str(tmp_path / "x.fa")], Recipe("nucleotide"), tmp_path / "out", processes=1)
    split, _ = TokenCorpus(str(tmp_path / "out"), 7).split(0.1)
    whole = {"seq_len": 48, "batch_size": 4, "accumulate": 1, "dp": 1, "dp_rank": 0, "seed": 3}
    turned = 0
    for step in (1, 2, 3):
        plain = Loader(split, segment=make_segment(48, cp=1, rank=0), **whole).batch(step, 0)
        both = Loader(split, segment=make_segment(48, cp=1, rank=0), reverse_complement=True, **whole).batch(step, 0)
        for row in range(4):
            text = torch.cat((plain.tokens[row], plain.labels[row, -1:]))
            found = torch.cat((both.tokens[row], both.labels[row, -1:]))
            assert torch.equal(both.tokens[row, 1:], both.labels[row, :-1])
            if torch.equal(found, text):
                continue
            turned += 1
            assert torch.equal(found, 3 - text.flip(0))
        for rank in range(2):
            segment = make_segment(48, cp=2, rank=rank, order="head_tail")
            part = Loader(split, segment=segment, reverse_complement=True, **whole).batch(step, 0)
            assert torch.equal(part.tokens, both.tokens[:, segment.positions])
            assert torch.equal(part.labels, both.labels[:, segment.positions])
    assert 2 <= turned <= 10


def test_a_genome_is_trained_on(tmp_path):
    (tmp_path / "x.fa").write_text(">x\n" + "ACGGT" * 900 + "\n")
    out = tmp_path / "run"
    words = ["data.source=fasta", f"data.path={tmp_path / 'x.fa'}", "data.reverse_complement=true", "model.vocab_size=7",
             "model.d_model=32", "model.n_layers=1", "model.d_mlp=32"]  # fmt: skip
    assert main(["train", *words, *SMALL, "train.steps=20", "--out", str(out)]) == 0
    losses = [row["loss"] for row in rows(out)]
    assert losses[-1] < 1.4 < losses[0]
    with pytest.raises(Refused, match="packing"):
        load_config(None, [*words, "data.packing=true", "train.batch_size=1"])
