"""`lss generate`: runs and models of transformers, on any number of ranks, and what it refuses."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from lss.cli import main
from tests.cli.conftest import WORDS
from tests.cli.test_cli import lss
from tests.cli.test_refusals import refusal
from tests.data.tokenizers import save_tokenizer
from tests.integrations.hf_cases import build


def test_a_run_continues_a_prompt_alike_on_any_ranks(run):
    given = ["generate", "a", "--prompt-file", "book.txt", "--max-new-tokens", 12, "--seed", 5]
    alone = lss(*given, "--json", cwd=run)
    assert alone.returncode == 0, alone.stderr
    cut = lss(*given, "--nproc", 3, "--json", "parallel.order=contiguous", cwd=run)
    assert cut.returncode == 0, cut.stderr
    facts = json.loads(cut.stdout)
    assert (facts["cp"], facts["step"], facts["prompt_tokens"]) == (3, 2, 20 * len(WORDS))
    assert len(facts["tokens"]) == 12
    assert (facts["tokens"], facts["text"]) == tuple(json.loads(alone.stdout)[name] for name in ("tokens", "text"))
    # the last letter may not be whole yet
    assert bytes(facts["tokens"]).decode("utf-8", "replace").startswith(facts["text"])


def test_the_prompt_stands_before_what_follows_it(run, capsys, monkeypatch):
    monkeypatch.chdir(run)
    assert main(["generate", "a/checkpoints/step_2", "--prompt", "the \u00e9", "--max-new-tokens", "3", "--seed", "1"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("the \u00e9")
    assert "a prompt of 6 tokens" in told.err
    assert "3 tokens; the first after" in told.err


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_of_transformers_continues_as_by_its_own_generate(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build("llama", torch.float32, vocab_size=290).save_pretrained("model")
    save_tokenizer("model")
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float64).eval()
    ids = tokenizer(WORDS, return_tensors="pt")["input_ids"]
    own = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=0, pad_token_id=0)[0, ids.shape[1] :]
    given = ["--prompt", WORDS, "--max-new-tokens", "20", "--temperature", "0", "--json", "train.dtype=float64"]
    assert main(["generate", "model", *given]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == own.tolist()
    whole = tokenizer.decode([*ids[0].tolist(), *facts["tokens"]], clean_up_tokenization_spaces=False)
    assert whole.startswith(WORDS + facts["text"])


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_run_with_adapters_generates_with_them(tmp_path, capsys, monkeypatch):
    """As transformers does with the export, into which they are merged."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build("llama", torch.float32, vocab_size=290).save_pretrained("model")
    save_tokenizer("model")
    (tmp_path / "book.txt").write_text(WORDS * 30)
    settings = ["data.path=book.txt", "data.seq_len=32", "train.batch_size=2", "train.eval_every=0", "train.dtype=float64",
                "model.lora_rank=4", "optim.lr=0.05", "optim.warmup=0", "train.steps=3"]  # fmt: skip
    assert main(["train", "model.hf=model", *settings, "--out", "run"]) == 0
    assert main(["export", "run", "-o", "out", "--format", "hf"]) == 0
    capsys.readouterr()
    assert main(["generate", "run", "--prompt", WORDS, "--max-new-tokens", "9", "--temperature", "0", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float64).eval()
    ids = AutoTokenizer.from_pretrained("out")(WORDS, return_tensors="pt")["input_ids"]
    own = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert facts["tokens"] == own.tolist()[: len(facts["tokens"])]
    # and is scored with them: eval reads the checkpoint into the model with adapters
    assert main(["eval", "run", "data.path=book.txt", "data.seq_len=32", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert main(["eval", "out", "data.path=book.txt", "data.seq_len=32", "--json", "train.dtype=float64"]) == 0
    assert json.loads(capsys.readouterr().out)["nats"] == pytest.approx(scored["nats"], rel=2e-6)


def test_a_model_of_genomes_reads_and_writes_letters(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    letters = np.random.default_rng(1).choice(list("ACGT"), 600)
    (tmp_path / "genome.fa").write_text(">one\n" + "".join(letters) + "\n")
    small = ["model.d_model=32", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=2", "model.d_mlp=48",
             "data.seq_len=32", "train.batch_size=2", "train.eval_every=0", "train.steps=1", "model.vocab_size=7"]
    assert main(["train", "data.source=fasta", "data.path=genome.fa", *small, "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["generate", "run", "--prompt", "acgtn ACG", "--max-new-tokens", "5", "--json", "--temperature", "0.1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompt_tokens"] == 8
    assert facts["text"] == "".join("ACGTN--"[i] for i in facts["tokens"]).replace("-", "")
    assert main(["eval", "run", "data.path=genome.fa", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # one more token ends the sequence; of the letters the first is no label
    assert (facts["tokens"], facts["scored"], facts["text_bytes"]) == (601, 600, 599)
    assert "no letter of a nucleotide" in refusal(capsys, ["generate", "run", "--prompt", "ACX"])


@pytest.mark.parametrize("arguments, words", [
    (["absent", "--prompt", "a"], "CKPT=absent"),
    (["a"], "--prompt, --prompt-file=none"),
    (["a", "--prompt", "a", "--prompt-file", "book.txt"], "--prompt, --prompt-file=both"),
    (["a", "--prompt", ""], "--prompt=''"),
    (["a", "--prompt-file", "absent"], "--prompt-file=absent"),
    (["a", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens=0"),
    (["a", "--prompt", "a", "--temperature", "-1"], "--temperature=-1"),
    (["a", "--prompt", "a", "--temperature", "nan"], "--temperature=nan"),
    (["a", "--prompt", "a", "--top-p", "0"], "--top-p=0"),
    (["a", "--prompt", "a", "--top-k", "-3"], "--top-k=-3"),
    (["a", "--prompt", "a", "data.prefix=3"], "data.prefix=3"),
    (["a", "--prompt", "a", "parallel.dp=2"], "parallel.dp"),
    (["a", "--prompt", "a", "model.n_layers=3"], "model.n_layers=3"),
    (["a", "--prompt", "a", "--tokenizer", "absent"], "absent"),
])  # fmt: skip
def test_refusals(run, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(run)
    assert words in refusal(capsys, ["generate", *arguments])
