"""Strategy "lss_2d": heads shared out inside groups of neighbours, LSS across them; equal to one process, to the byte."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lss
from lss.context_parallel import count_head_chunks, count_inner
from lss.context_parallel.heads import shares_of
from tests.distributed.cases import attention_case, counted_case, delayed_case
from tests.distributed.model_cases import parity_case
from tests.distributed.pool import mesh, pool
from tests.distributed.test_masks import problems
from tests.distributed.test_parity import FEATURES, LEARNED

# (query heads, key heads): key heads for each rank, for some, one for all; shares that end within a key head's queries
HEADS = [(4, 4), (4, 2), (9, 3), (3, 1), (6, 2)]
PROBLEMS = list(product(["head_tail", "contiguous", "balanced"], [16, 13, 3], HEADS))
# (cp, inner): both levels, heads alone, lss alone, a group of three, one rank; and which thirds of the problems each meets
PARTS = {(4, 2): [0, 1, 2], (4, 4): [0, 1], (4, 1): [1], (3, 3): [2, 0], (2, 2): [1], (1, 1): [2]}


@pytest.mark.parametrize("cp, inner, part", [(*cut, part) for cut, parts in PARTS.items() for part in parts])
def test_attention_equals_softmax_in_float64(cp, inner, part):
    for number, (order, S, (N, K)) in enumerate(PROBLEMS[part::3]):
        options = {"S": S, "N": N, "K": K, "order": order, "causal": number % 2 == 0, "regather": number % 3 != 0}
        if number % 4 == 0:
            options["head_chunks"] = K
        for errors, *_ in pool(cp).run(attention_case, cp, strategy="lss_2d", inner=inner, **options):
            assert max(errors) <= 1e-13, options


@given(problems(), st.sampled_from([1, 2, 4]), st.sampled_from([None, 2]), st.data())
@settings(max_examples=40, deadline=None)
def test_any_combination_equals_the_oracle(problem, inner, per_node, data):
    problem = problem | {"token_chunks": "auto"}  # a matter of "lss" alone
    problem |= {"strategy": "lss_2d", "head_chunks": data.draw(st.integers(1, problem["K"]))}
    for errors, *_ in pool(4).run(attention_case, 4, H=4, inner=inner, per_node=per_node, **problem):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("heads", [(6, 3), (6, 1)])
def test_lower_precision_is_as_good_as_that_of_lss(dtype, bound, heads):
    options = {"S": 40, "N": heads[0], "K": heads[1], "dtype": dtype, "strategy": "lss_2d", "inner": 2}
    for errors, *_ in pool(4).run(attention_case, 4, **options):
        assert max(errors) <= bound


@pytest.mark.parametrize("seed", range(3))
def test_parity_holds_when_ranks_are_late(seed):
    options = {"S": 13, "N": 4, "K": 2, "inner": 2, "per_node": 2, "head_chunks": 2}
    for errors, *_ in pool(4).run(delayed_case, 4, "lss_2d", seed, **options):
        assert max(errors) <= 1e-13


# -- whole models ----------------------------------------------------------------------------------------------------

HEADS_OF_MODEL = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48}
MODEL_MESHES = [(4, 1, 2), (4, 1, 4), (4, 1, 1), (3, 1, 3), (2, 2, 2), (2, 2, 1)]
MODELS = {
    "rope": {"labels": "uneven", "accumulate": 3},
    "learned-precut": {"model": LEARNED, "precut": True, "regather": False, "order": "contiguous"},
    "dropout-recompute": {"model": {"dropout": 0.25, "attention_dropout": 0.25}, "checkpointing": "full", "head_chunks": 2},
    "auto": {"inner": "auto"},
}


def model_cases():
    """Some models on every mesh, every feature on a mesh of two levels and on one of dp x groups."""
    for (cp, dp, inner), (name, options) in product(MODEL_MESHES, MODELS.items()):
        yield pytest.param(cp, dp, {"inner": inner} | options, id=f"{name}-cp{cp}-dp{dp}-inner{inner}")
    for number, (name, options) in enumerate(FEATURES.items()):
        order = ["head_tail", "balanced", "contiguous"][number % 3]
        for cp, dp in ((4, 1), (2, 2)) if number % 2 else ((4, 1),):
            rows = dp if "cu_seqlens" in options.get("given", {}) else 4
            how = {"order": order if rows != dp or dp == 1 else "head_tail", "rows": rows, "labels": "uneven"}
            yield pytest.param(cp, dp, {"inner": 2} | how | options, id=f"{name}-cp{cp}-dp{dp}")


@pytest.mark.parametrize("cp, dp, options", [*model_cases()])
def test_gradients_equal_one_process(cp, dp, options):
    options = {"seq_len": 23, **options, "model": HEADS_OF_MODEL | options.get("model", {})}
    results = pool(cp * dp).run(parity_case, cp, dp, strategy="lss_2d", per_node=2 if cp == 4 else None, **options)
    for rank, result in enumerate(results):
        assert result["gradient"] <= 1e-12, f"rank {rank}: {result['parameter']}"
        for what in ("loss", "logits", "norm", "clipped"):
            assert result[what] <= 1e-12, f"rank {rank}: {what}"
    assert all(result["checksum"] == results[0]["checksum"] for result in results)


# -- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regather", [True, False])
def test_heads_travel_inside_a_node_and_a_share_of_keys_across(regather):
    S, N, K, H, inner = 16, 4, 2, 8, 2
    there, back = S // 4 * (N + 2 * K) * H * 8, inner * S // 4 * N // inner * H * 8
    gathered = 2 * S * K // inner * H * 8
    options = {"S": S, "N": N, "K": K, "strategy": "lss_2d", "inner": inner, "per_node": 2, "regather": regather}
    for forward, backward, counter, _ in pool(4).run(counted_case, 4, **options):
        heads = {("all_to_all", "heads", "inside"): (2, there + back)}
        gather = {("all_gather", "kv", "across"): (1, gathered)}
        assert forward == heads | gather
        assert backward == heads | {("reduce_scatter", "dkv", "across"): (1, gathered)} | (gather if regather else {})
        assert counter.bytes(link="across") == gathered


def test_one_group_of_all_is_ulysses_and_groups_of_one_are_lss():
    shape = {"S": 16, "N": 4, "K": 4, "regather": False}
    for inner, other in ((4, "ulysses"), (1, "lss")):
        same = pool(4).run(counted_case, 4, strategy=other, **shape)
        for found, expected in zip(pool(4).run(counted_case, 4, strategy="lss_2d", inner=inner, **shape), same, strict=True):
            assert found[:2] == expected[:2]


def test_a_key_head_that_two_ranks_use_is_sent_to_both():
    # 2 ranks of a group share 4 query heads of one key head: two each, and the key head to both
    S, H = 16, 8
    out, back = S // 4 * (4 + 2 * 2) * H * 8, 2 * S // 4 * 2 * H * 8
    for forward, *_ in pool(4).run(counted_case, 4, S=S, N=4, K=1, strategy="lss_2d", inner=2):
        assert forward[("all_to_all", "heads", None)] == (2, out + back)
        assert forward[("all_gather", "kv", None)] == (1, 2 * S * H * 8)


def test_windows_fetch_what_the_group_sees():
    # groups hold 12 of 24 tokens; a window of 4 reaches 3 further back, over the border to the first group only
    options = {"S": 24, "N": 2, "K": 2, "B": 1, "strategy": "lss_2d", "inner": 2, "order": "contiguous", "window": 4}
    for rank, (_, forward, *_) in enumerate(pool(4).run(attention_case, 4, **options)):
        tokens = 12 if rank < 2 else 15
        assert forward[1] == ("all_to_all", "kv", 1, 2 * tokens * 8 * 8)


@pytest.mark.parametrize("N, K, ranks", [(4, 4, 2), (9, 3, 2), (9, 3, 4), (6, 2, 4), (3, 1, 4), (8, 2, 3)])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_every_run_of_a_share_groups_its_heads_evenly(N, K, ranks, chunks):
    shares = shares_of(N, K, ranks)
    assert [h for s in shares for h in range(N)[s.q]] == list(range(N))
    for share in shares:
        groups = share.groups(N // K, min(chunks, share.n_k)) if share.n_k else ()
        assert [h for q, _ in groups for h in range(share.n_q)[q]] == list(range(share.n_q))
        for q, k in groups:
            heads = [(share.q_start + h) // (N // K) - share.k_start for h in range(share.n_q)[q]]
            each = len(heads) // (k.stop - k.start)
            assert heads == [h for h in range(share.n_k)[k] for _ in range(each)]


# -- what is chosen, and what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cp, per_node, n_kv_heads, inner",
    [(8, 8, 8, 8), (8, 8, 4, 4), (16, 8, 8, 8), (6, 6, 5, 3), (8, 4, 8, 4), (8, 8, 1, 1), (12, 4, 3, 2), (1, 1, 8, 1)],
)
def test_auto_is_the_largest_group_of_a_node_with_a_key_head_each(cp, per_node, n_kv_heads, inner):
    assert count_inner("auto", "lss_2d", n_kv_heads, cp, per_node) == inner
    assert count_inner("auto", "lss", n_kv_heads, cp, per_node) == 1


def test_auto_head_chunks_count_a_rank_s_share_of_the_heads():
    k = torch.empty(1, 1 << 20, 8, 128, dtype=torch.bfloat16, device="meta")
    assert count_head_chunks("auto", "lss", k, 2) == 8
    assert count_head_chunks("auto", "lss_2d", k, 2, 1) == 8
    assert count_head_chunks("auto", "lss_2d", k[:, : 1 << 18], 2, 1) == 2
    assert count_head_chunks("auto", "lss_2d", k[:, : 1 << 18], 4, 4) == 1


def _attention(cp, given):
    x = torch.randn(1, 4, 2, 8)
    lss.attention(x, x, x, mesh=mesh(cp), **given)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"strategy": "lss_2d", "inner": 3}, "inner=3: it must divide the cp=4 ranks; use 2 or 4, or 'auto'"),
        ({"strategy": "lss_2d", "inner": 0}, "inner=0"),
        ({"strategy": "lss_2d", "inner": 2.0}, "inner=2.0"),
        ({"strategy": "lss_2d", "inner": "all"}, "inner=all"),
        ({"strategy": "lss", "inner": 2}, "inner=2: only strategy 'lss_2d'"),
        ({"strategy": "lss_2d", "head_chunks": 3}, "head_chunks=3"),
    ],
)
def test_groups_that_do_not_fit_are_refused_by_name(given, words):
    for ok, what in pool(4).outcomes(_attention, 4, given):
        assert not ok
        assert what[0] == "Refused", what[2]
        assert words in what[1]


def test_a_layout_that_does_not_fit_is_refused_before_a_step():
    for ok, what in pool(4).outcomes(parity_case, 4, strategy="lss_2d", inner=3):
        assert not ok
        assert what[0] == "Refused"
        assert "inner=3" in what[1]
