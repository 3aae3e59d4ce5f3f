"""Models of transformers on a cut sequence: loss and every gradient of one process, by class and by kind of batch."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.integrations import hf_cases as cases
from tests.integrations import hf_jobs as jobs
from tests.integrations.ranks import hf_pool as pool

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

# those whose own masks part documents by their positions
PACKED = [name for name, case in cases.CASES.items() if "MaskedLM" not in case.model and name != "gpt_oss"]


def hold(results, bound=1e-12, loss_bound=1e-12):
    for loss_error, *_, error, name in results:
        assert loss_error <= loss_bound
        assert error <= bound, name


# 37 tokens: odd, and no multiple of a number of ranks; windows of 5 to 9 are narrower than a segment
@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("name", cases.CASES)
def test_every_class_equals_one_process(name, cp):
    kinds = ["plain", "padded", *(["packed"] if name in PACKED else [])]
    for results in zip(*pool(cp).run(cases.parities, name, cp, kinds), strict=True):
        bound = cases.CASES[name].bound
        hold(results, bound, bound if bound == cases.ROUTER32 else 1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_four_ranks(name):
    options = {"order": "contiguous"} if name == "gemma3" else {}
    hold(pool(4).run(cases.parity, name, 4, "plain", 61, options=options), cases.CASES[name].bound)


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "lss_2d"])
def test_other_strategies(strategy):
    hold(pool(2).run(cases.parity, "llama-9-3", 2, "padded", options={"strategy": strategy}))


def test_float32_stays_within_its_rounding():
    import torch

    hold(pool(2).run(cases.parity, "qwen3", 2, "plain", dtype=torch.float32), 2e-6, 2e-6)


def test_data_parallel_ranks_with_other_counts_of_labels():
    results = pool(4).run(jobs.data_parallel, "llama")
    hold(results)
    assert all(norm <= 1e-12 for _, norm, *_ in results)


def test_accumulation_adds_up_to_the_mean_of_the_step():
    hold(pool(2).run(jobs.accumulation, 2))


def test_checkpointing_computes_again_by_the_batch_of_its_forward():
    for _, error, name in pool(3).run(jobs.checkpointed, 3):
        assert error <= 1e-12, name


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_load_balancing_loss_is_of_all_ranks_counts(name, kind):
    # transformers computes that loss in float32, and one process's gradient with it
    hold(pool(2).run(jobs.router, name, 2, kind), 2e-6, 2e-7)


def test_load_balancing_loss_over_data_parallel_ranks_and_by_config():
    hold(pool(4).run(jobs.router, "mixtral", 2, "padded", dp=2), 2e-6, 2e-7)
    for found, exact in pool(3).run(jobs.router_by_config, 3):
        assert found == pytest.approx(exact, rel=1e-6)


def test_segments_that_come_cut():
    hold(pool(3).run(jobs.precut, 3))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "bert", "modernbert", "esm"])
def test_documents_by_their_borders(name):
    hold(pool(2).run(jobs.documents, name, 2))


def test_documents_in_balanced_order():
    hold(pool(3).run(jobs.documents, "qwen3", 3, order="balanced"))


def test_what_comes_back_and_what_stays():
    assert all(pool(2).run(jobs.outputs, 2))


def test_nothing_leaks_into_the_past_or_another_document():
    results = pool(2).run(jobs.leaks, 2)
    assert sum(leaked for leaked, _ in results) == 0
    assert sum(affected for _, affected in results) > 0
