"""Models of transformers with layers of Mamba-2 on a cut sequence, against one process."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import lss
from lss.comm import count_collectives
from lss.infer import generate
from tests.distributed.pool import mesh
from tests.integrations import hf_cases as cases
from tests.integrations import hf_jobs as jobs
from tests.integrations.ranks import hf_pool as pool
from tests.integrations.test_hf_refusals import refusal

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

# transformers computes scans and norms in float32 in any dtype: what one rank of ours is off it too
FLOAT32, SUMMED = 2e-6, 1e-5


def hold(results):
    for loss_error, error, parameter in results:
        assert loss_error <= FLOAT32
        assert error <= SUMMED, parameter


@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("name", cases.HYBRIDS)
def test_every_class_equals_transformers(name, cp):
    for results in zip(*pool(cp).run(cases.parities, name, cp, ["plain", "padded"]), strict=True):
        hold(results)


@pytest.mark.parametrize("options", [{"order": "contiguous"}, {"checkpointing": "full"}, {"strategy": "ulysses"}])
def test_orders_strategies_and_checkpointing(options):
    hold(pool(4).run(cases.parity, "granite_hybrid", 4, "padded", 61, options=options))


def test_documents_by_their_borders_forget_the_state():
    hold(pool(2).run(jobs.documents, "granite_hybrid", 2))
    hold(pool(3).run(jobs.documents, "granite_hybrid", 3, order="balanced"))


def _counted(S):
    model = cases.build("granite_hybrid")
    names = [name for name, _ in model.named_parameters()]
    model = lss.parallelize(model, mesh(2))
    assert [name for name, _ in model.named_parameters()] == names
    ids = torch.randint(4, cases.V, (1, S), generator=torch.Generator().manual_seed(0))
    with count_collectives() as counter:
        model(ids, labels=ids).loss.backward()
    return {(kind, purpose): (calls, size) for kind, purpose, calls, size in counter.rows()}


def test_bytes_of_states_are_those_of_any_length():
    scans, heads, states = 2, 8, 6 * 8
    for S in (48, 192):
        for counts in pool(2).run(_counted, S):
            assert counts["all_gather", "state"] == (scans, scans * 4 * heads * (states + 1) * 8)
            assert counts["all_gather", "dstate"] == (scans, scans * 4 * heads * states * 8)
            assert counts["all_to_all", "halo"][0] == counts["all_to_all", "dhalo"][0] == scans


def _refusals():
    ids = torch.randint(4, cases.V, (1, 24))
    said = [refusal(generate, cases.build("granite_hybrid"), ids, mesh(2), max_new_tokens=2)]
    model = lss.parallelize(cases.build("granite_hybrid"), mesh(2))
    return [*said, refusal(model.model, ids)]


def test_generation_and_a_part_of_the_model_are_refused():
    for cache, inside in pool(2).run(_refusals):
        assert "GraniteMoeHybridForCausalLM: of transformers' models only keys and values are cached" in cache
        assert "GraniteMoeHybridMambaLayer was called without the batch" in inside
