"""Mixtures: samples of each corpus by weight, each corpus a permutation an epoch, the same for any layout and resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lss.cli import main
from lss.config import Refused, load_config
from lss.data import Loader, open_corpus
from lss.segment import make_segment

S = 8


@pytest.fixture
def config(tmp_path):
    """Three corpora of 20, 7 and 50 samples whose items say where they are."""
    for number, count in enumerate((20, 7, 50)):
        folder = tmp_path / "abc"[number]
        folder.mkdir()
        ids = np.arange(count * S + 1) + 1000 * number
        for part, piece in enumerate(np.split(ids, [13, 30])):
            piece.astype("<u2").tofile(folder / f"{part}.bin")
    paths = ";".join(str(tmp_path / name) for name in "abc")
    return ["data.source=tokens", f"data.path={paths}", "data.weights=[3,1,2]", "model.vocab_size=4000", f"data.seq_len={S}",
            "data.held_out=0.000001", "train.batch_size=2"]  # fmt: skip


def loader(config, dp=1, dp_rank=0, batch_size=6, **kind):
    split, _ = open_corpus(load_config(None, config)).split(1e-6)
    segment = make_segment(S, cp=1, rank=0)
    place = {"dp": dp, "dp_rank": dp_rank, "segment": segment}
    return Loader(split, seq_len=S, batch_size=batch_size, accumulate=1, seed=4, **place, **kind)


def test_samples_come_by_weight_and_each_corpus_is_a_permutation_an_epoch(config):
    firsts = torch.cat([loader(config).batch(step, 0).tokens[:, 0] for step in range(1, 101)]).numpy()
    which = firsts // 1000
    for row in which.reshape(-1, 6):
        assert np.bincount(row, minlength=3).tolist() == [3, 1, 2]
    assert len({tuple(row) for row in which.reshape(-1, 6)}) > 20, "the order within is drawn"
    for number, count in enumerate((20, 7, 50)):
        mine = (firsts[which == number] - 1000 * number) // S
        epochs = [mine[i : i + count] for i in range(0, len(mine) - count + 1, count)]
        assert len(epochs) >= 4
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert not np.array_equal(epochs[0], epochs[1])
    batch = loader(config).batch(7, 0)
    assert torch.equal(batch.tokens + 1, batch.labels)


def test_a_layout_and_a_resume_change_nothing(config):
    whole = [loader(config).batch(step, 0).tokens for step in range(1, 9)]
    for step in range(1, 9):
        halves = [loader(config, dp=2, dp_rank=rank).batch(step, 0).tokens for rank in (0, 1)]
        assert torch.equal(torch.cat(halves), whole[step - 1])
    resumed = loader(config, batch_size=3)
    resumed.resume(4, loader(config).state(4))
    assert torch.equal(torch.cat([resumed.batch(step, 0).tokens for step in (5, 6)]), whole[4])


def test_packed_sequences_are_of_one_corpus(config):
    kind = {"packing": True, "segment_of": lambda edges: make_segment(S, cp=1, rank=0, cu_seqlens=edges)}
    packed = loader(config, batch_size=1, **kind)
    seen = []
    for step in range(1, 61):
        batch = packed.batch(step, 0)
        counted = batch.labels[0] != -100
        assert torch.equal(batch.tokens[0][counted] + 1, batch.labels[0][counted])
        seen.append(int(batch.tokens[0].max()) // 1000)
    assert np.bincount(seen).tolist() == [30, 10, 20]


def test_a_mixture_is_trained_on_and_resumed(config, tmp_path):
    small = ["model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.d_mlp=16",
             "train.eval_every=2", "train.eval_samples=2", "data.held_out=0.2"]  # fmt: skip
    words = ["train", *config, *small, "--out", str(tmp_path / "run")]
    assert main([*words, "train.steps=2"]) == 0
    assert main([*words, "train.steps=3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert main([*words, "train.steps=4", "data.weights=[1,1,1]"]) == 2


@pytest.mark.parametrize("change, words", [
    ("data.weights=[1,2]", "names 3 corpora"), ("data.weights=[0,1,1]", "each 1 or more"),
    ("data.source=fasta", "one corpus"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(config, change, words):
    with pytest.raises(Refused, match=words):
        load_config(None, [*config, change])
