"""A cp group on several nodes: keys enter a node once, gradients leave it once; four ranks stand for two nodes of two."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings

from lss.comm import cp_communicator
from tests.distributed.cases import attention_case, counted_case, delayed_case
from tests.distributed.model_cases import parity_case
from tests.distributed.pool import mesh, pool
from tests.distributed.test_masks import problems

# (cp, ranks per node): two nodes of two, nodes of one rank, one node
NODES = [(4, 2), (4, 1), (2, 1), (3, 1), (4, 4), (2, 4)]


@pytest.mark.parametrize("cp, per_node", NODES)
@pytest.mark.parametrize("order", ["head_tail", "contiguous", "balanced"])
def test_attention_equals_softmax_in_float64(cp, per_node, order):
    for number, (S, (N, K), causal) in enumerate(product([16, 13, 3], [(4, 2), (3, 1)], [True, False])):
        options = {"S": S, "N": N, "K": K, "causal": causal, "order": order, "regather": number % 3 != 0}
        for errors, *_ in pool(cp).run(attention_case, cp, per_node=per_node, head_chunks=K if number % 2 else 1, **options):
            assert max(errors) <= 1e-13, options


@given(problems())
@settings(max_examples=40, deadline=None)
def test_any_combination_equals_the_oracle(problem):
    for errors, *_ in pool(4).run(attention_case, 4, H=4, per_node=2, **(problem | {"strategy": "lss"})):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_parity_holds_when_ranks_are_late(seed):
    options = {"S": 13, "N": 4, "K": 2, "per_node": 2, "head_chunks": 2}
    for errors, *_ in pool(4).run(delayed_case, 4, "lss", seed, **options):
        assert max(errors) <= 1e-13


MODELS = {
    "rope": {},
    "learned-chunks": {"model": {"positions": "learned"}, "head_chunks": 2, "regather": False, "labels": "uneven"},
    "contiguous": {"order": "contiguous", "accumulate": 3},
    "dropout-recompute": {"model": {"attention_dropout": 0.3}, "checkpointing": "full"},
    "windows": {"model": {"windows": (5, 0)}},
    "encoder-decoder": {"model": {"kind": "encoder_decoder"}},
}


@pytest.mark.parametrize("cp, dp, per_node", [(4, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_one_process(cp, dp, per_node, name):
    results = pool(cp * dp).run(parity_case, cp, dp, seq_len=23, rows=4, per_node=per_node, **MODELS[name])
    for rank, result in enumerate(results):
        for what in ("gradient", "loss", "logits", "norm", "clipped"):
            assert result[what] <= 1e-12, f"rank {rank}: {what} {result['parameter']}"


@pytest.mark.parametrize("regather", [True, False])
@pytest.mark.parametrize("chunks", [1, 2])
def test_each_byte_enters_a_node_once(regather, chunks):
    B, S, K, H = 2, 24, 2, 8
    whole = 2 * B * S * K * H * 8
    gather = {("all_gather", "kv", "across"): (chunks, whole // 2), ("all_gather", "kv", "inside"): (chunks, whole)}
    scatter = {("reduce_scatter", "dkv", x): (chunks, size) for x, size in (("inside", whole), ("across", whole // 2))}
    options = {"S": S, "N": 4, "K": K, "B": B, "per_node": 2, "regather": regather, "head_chunks": chunks}
    found = pool(4).run(counted_case, 4, **options)
    for forward, backward, *_ in found:
        assert forward == gather
        assert backward == scatter | (gather if regather else {})
    for node in (found[:2], found[2:]):  # the payload across of a node's ranks together: K and V once
        assert sum(forward.bytes(link="across") for *_, forward, _ in node) == whole
        assert sum(backward.bytes("reduce_scatter", link="across") for *_, backward in node) == whole


@pytest.mark.parametrize("cp, per_node, link", [(4, 1, "across"), (2, 1, "across"), (4, 4, None), (4, None, None)])
def test_where_there_is_one_stage_it_is_the_one_collective_of_before(cp, per_node, link):
    whole = 2 * 16 * 2 * 8 * 8
    for forward, backward, *_ in pool(cp).run(counted_case, cp, S=16, N=2, K=2, per_node=per_node, regather=False):
        assert forward == {("all_gather", "kv", link): (1, whole)}
        assert backward == {("reduce_scatter", "dkv", link): (1, whole)}


def test_counts_over_all_links_are_as_they_were():
    for *_, counter, _ in pool(4).run(counted_case, 4, S=16, N=2, K=2, per_node=2):
        whole = 2 * 16 * 2 * 8 * 8
        assert counter.rows() == [("all_gather", "kv", 2, whole + whole // 2)]
        assert counter.calls("all_gather") == counter.calls() == 2
        assert counter.bytes("all_gather", "kv") == whole + whole // 2
        assert counter.elements(link="inside") == whole // 8


def _arrivals(cp, dp, per_node):
    comm = cp_communicator(mesh(cp, dp, per_node))
    inner, outer = comm.levels(2)
    return comm.arrival, comm.per_node, (inner.size, inner.rank, inner.link), (outer.size, outer.rank, outer.link)


def test_groups_and_the_order_in_which_parts_arrive():
    two = [((0, 2, 1, 3), 2, (2, r % 2, "inside"), (2, r // 2, "across")) for r in range(4)]
    assert pool(4).run(_arrivals, 4, 1, 2) == two
    assert pool(4).run(_arrivals, 4, 1, 4) == [(None, 4, (2, r % 2, None), (2, r // 2, None)) for r in range(4)]
    assert pool(4).run(_arrivals, 2, 2, 1) == [(None, 1, (2, r % 2, "across"), (1, 0, "across")) for r in range(4)]
