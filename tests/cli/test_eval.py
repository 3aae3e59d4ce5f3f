"""`lss eval`: runs, checkpoints and models of transformers, on any number of ranks, and what it refuses."""

from __future__ import annotations

import json
import math
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


def found(done):
    """The one line that a command has printed, as JSON."""
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_a_run_its_checkpoint_and_any_ranks_score_alike(run):
    given = ["data.path=book.txt", "data.seq_len=100", "--json"]
    alone = found(lss("eval", "a", *given, cwd=run))
    assert alone["scored"] == alone["text_bytes"] == 20 * len(WORDS) - 1
    assert (alone["part"], alone["unit"], alone["mode"], alone["step"]) == ("all", "byte", "full", 2)
    assert alone["nats_per_token"] == pytest.approx(alone["nats"] / alone["scored"], rel=1e-15)
    assert alone["perplexity"] == pytest.approx(math.exp(alone["nats_per_token"]), rel=1e-15)
    assert alone["bits_per_byte"] == pytest.approx(alone["nats"] / math.log(2) / alone["text_bytes"], rel=1e-15)
    cut = found(lss("eval", "a/checkpoints/step_2", *given, "--nproc", 2, "--per-token", "l.npy", cwd=run))
    assert cut["nats"] == pytest.approx(alone["nats"], rel=1e-12)
    assert (cut["cp"], cut["order"]) == (2, "head_tail")
    losses = np.load(run / "l.npy")
    assert len(losses) == 20 * len(WORDS)
    assert np.isnan(losses[0])
    assert losses[1:].sum() == pytest.approx(alone["nats"], rel=1e-12)
    windowed = found(lss("eval", "a", "data.path=book.txt", "--window", 100, "--stride", 40, "--json", cwd=run))
    assert (windowed["mode"], windowed["window"], windowed["stride"]) == ("windowed", 100, 40)
    assert windowed["scored"] == alone["scored"]
    assert windowed["nats"] != alone["nats"]


def test_of_its_own_data_a_run_is_scored_on_what_it_was_not_trained_on(run):
    """The last step's evaluation had all whole held-out sequences; this has the rest of the part too."""
    row = json.loads((run / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    done = lss("eval", "a", cwd=run)
    assert done.returncode == 0, done.stderr
    assert "held-out" in done.stdout
    assert "bits per byte" in done.stdout
    facts = found(lss("eval", "a", "--json", "--per-token", "own.npy", cwd=run))
    whole = facts["scored"] // 64 * 64
    losses = np.load(run / "own.npy")[1:]
    assert facts["part"] == "held-out"
    assert losses[:whole].mean() == pytest.approx(row["eval_loss"], rel=1e-12)
    assert len(losses) == facts["scored"] > whole


def run_json(capsys, arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_of_transformers_on_text_and_on_token_files(tmp_path, capsys, monkeypatch):
    """Text is tokenised on the way, and its bytes are counted; of plain files of ids no bytes are known."""
    monkeypatch.chdir(tmp_path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build("llama", torch.float32, vocab_size=290).save_pretrained("model")
    save_tokenizer("model")
    book = WORDS * 3 + "\u00e9\u4e2d\n"
    (tmp_path / "book.txt").write_text(book)
    ids = np.array(AutoTokenizer.from_pretrained("model")(book)["input_ids"])
    ids.astype("<u2").tofile("ids.bin")
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float64).eval()
    expected = []
    for start in range(0, len(ids) - 1, 30):
        piece = torch.from_numpy(ids[start : start + 31])
        with torch.no_grad():
            logits = model(piece[None, :-1]).logits[0]
        expected += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none").tolist()
    given = ["data.seq_len=30", "train.dtype=float64", "--json"]
    facts = run_json(capsys, ["eval", "model", "data.source=tokens", "data.path=ids.bin", *given, "--per-token", "l.jsonl"])
    assert (facts["scored"], facts["text_bytes"], facts["bits_per_byte"]) == (len(ids) - 1, None, None)
    told = [json.loads(line)["nats"] for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(told, expected, rtol=2e-6)  # its rotary tables are float32
    assert facts["nats"] == pytest.approx(sum(expected), rel=2e-6)
    # the same text, with the token that ends it: one more is scored, and it stands for no byte
    text = run_json(capsys, ["eval", "model.hf=model", "data.path=book.txt", *given])
    assert text["scored"] == len(ids)
    first = len(AutoTokenizer.from_pretrained("model").decode(ids[:1]).encode())
    assert text["text_bytes"] == len(book.encode()) - first
    assert text["bits_per_byte"] == pytest.approx(text["nats"] / math.log(2) / text["text_bytes"], rel=1e-15)


@pytest.mark.parametrize("arguments, words", [
    (["absent"], "CKPT=absent"),
    (["a/absent"], "CKPT=a/absent"),
    (["model.hf=absent"], "model.hf=absent"),
    (["."], "CKPT=."),
    (["a", "data.path=absent"], "data.path='absent'"),
    (["a", "model.d_model=64"], "model.d_model=64"),
    (["a", "book.txt"], "CKPT=book.txt"),
    (["a", "data.seq_lenn=1"], "nearest is data.seq_len"),
    (["a", "--part", "some"], "--part=some"),
    (["a", "--window", "0"], "--window=0"),
    (["a", "--stride", "3"], "--stride=3"),
    (["a", "--window", "8", "--stride", "9"], "--stride=9"),
    (["a", "data.prefix=3"], "data.prefix=3"),
    (["a", "--per-token", "losses.csv"], "--per-token=losses.csv"),
    (["a", "--per-token", "absent/losses.npy"], "--per-token=absent/losses.npy"),
    (["a", "data.path=one"], "two in a row"),
    (["a/checkpoints"], "CKPT=a/checkpoints"),
    (["a", "parallel.cp=2"], "parallel.cp=2"),
])  # fmt: skip
def test_refusals(run, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(run)
    (run / "one").write_bytes(b"a")
    assert words in refusal(capsys, ["eval", *arguments])


def test_a_damaged_checkpoint_is_refused(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "step_2"
    folder.mkdir()
    for file in (run / "a" / "checkpoints" / "step_2").iterdir():
        data = bytearray(file.read_bytes())
        if file.name.startswith("weights"):
            data[-1] ^= 1
        (folder / file.name).write_bytes(data)
    told = refusal(capsys, ["eval", folder, f"data.path={run / 'book.txt'}"])
    assert "weights-00000-of-00001.safetensors" in told
