"""LSS attention and its rivals against plain softmax attention, and what they send."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import lss
from lss.segment import make_segment
from tests.distributed.cases import attention_case, delayed_case, order_of_events
from tests.distributed.pool import mesh, pool


@pytest.mark.parametrize(
    "cp, strategy, causal, order, seq_len, heads",
    list(product([1, 2, 3, 4], ["lss", "ring", "ulysses"], [True, False], ["head_tail", "contiguous"], [16, 13, 3],
                 [(4, 2), (9, 3), (3, 1)])),
)  # fmt: skip
def test_attention_equals_softmax_in_float64(cp, strategy, causal, order, seq_len, heads):
    options = {"S": seq_len, "N": heads[0], "K": heads[1], "causal": causal, "order": order, "strategy": strategy}
    for errors, *_ in pool(cp).run(attention_case, cp, **options):
        assert max(errors) <= 1e-14


@pytest.mark.parametrize("strategy", ["lss", "ring", "ulysses"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_lower_precision_is_rounded_once(strategy, dtype, bound, kernel):
    """Bounds are the dtype's own rounding: partial results are merged and summed in float32."""
    for errors, *_ in pool(4).run(attention_case, 4, S=40, N=6, K=3, dtype=dtype, strategy=strategy, kernel=kernel):
        assert max(errors) <= bound


@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize("order", ["contiguous", "head_tail"])
def test_papers_setting_issues_two_collectives_a_layer(cp, order):
    B, S, N, K, H = 2, 24, 4, 2, 8
    options = {"S": S, "N": N, "K": K, "H": H, "B": B, "order": order, "head_chunks": 1, "regather": False}
    payload = 2 * B * S * K * H
    for _, forward, backward, sent, returned in pool(cp).run(attention_case, cp, **options):
        assert forward == [("all_gather", "kv", 1, payload * 8)]
        assert backward == [("reduce_scatter", "dkv", 1, payload * 8)]
        assert (sent, returned) == (payload, payload)


@pytest.mark.parametrize("chunks, regather", [(1, True), (2, True), (4, True), (3, False)])
def test_head_chunks_send_the_same_bytes_in_more_calls(chunks, regather):
    B, S, K, H = 2, 24, 4, 8
    options = {"S": S, "N": 8, "K": K, "H": H, "B": B, "head_chunks": chunks, "regather": regather}
    size = 2 * B * S * K * H * 8
    for _, forward, backward, *_ in pool(3).run(attention_case, 3, **options):
        assert forward == [("all_gather", "kv", chunks, size)]
        again = [("all_gather", "kv", chunks, size)] if regather else []
        assert backward == [*again, ("reduce_scatter", "dkv", chunks, size)]


def test_padding_is_sent_but_counted_to_the_byte():
    # 23 tokens over 3 ranks in head_tail order: 6 chunks of 4, 24 tokens
    for _, forward, *_ in pool(3).run(attention_case, 3, S=23, N=4, K=2, B=1):
        assert forward == [("all_gather", "kv", 1, 2 * 24 * 2 * 8 * 8)]


def test_half_precision_gradients_are_reduced_in_float32():
    for _, forward, backward, *_ in pool(2).run(attention_case, 2, S=16, N=2, K=2, B=1, dtype=torch.bfloat16):
        elements = 2 * 16 * 2 * 8
        assert forward == [("all_gather", "kv", 1, elements * 2)]
        assert backward == [("all_gather", "kv", 1, elements * 2), ("reduce_scatter", "dkv", 1, elements * 4)]


@pytest.mark.parametrize("cp", [2, 4])
def test_ring_sends_each_segment_around(cp):
    size = 2 * 16 // cp * 2 * 8 * 8  # fused K and V of one segment: 2, T, K, H in float64
    for _, forward, backward, *_ in pool(cp).run(attention_case, cp, S=16, N=2, K=2, B=1, strategy="ring"):
        assert forward == [("send_recv", "kv", cp - 1, (cp - 1) * size)]
        assert backward == [("send_recv", "dkv", cp, cp * size), ("send_recv", "kv", cp - 1, (cp - 1) * size)]


def test_ulysses_exchanges_heads_twice_each_way():
    # 16 tokens over 2 ranks, 8 each: q, k, v of 4 + 2 + 2 heads out, outputs of 4 heads back
    out, back = 8 * (4 + 2 + 2) * 8 * 8, 8 * 4 * 8 * 8
    options = {"S": 16, "N": 4, "K": 2, "B": 1, "strategy": "ulysses", "regather": False}
    for _, forward, backward, *_ in pool(2).run(attention_case, 2, **options):
        assert forward == [("all_to_all", "heads", 2, out + back)]
        assert backward == [("all_to_all", "heads", 2, back + out)]


def test_one_rank_sends_nothing():
    for strategy in ("lss", "ring", "ulysses"):
        ((_, forward, backward, *_),) = pool(1).run(attention_case, 1, S=9, N=2, K=1, strategy=strategy)
        assert forward == backward == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"dropout_p": 1.0, "seed": 1}, "dropout_p=1.0"),
        ({"seed": 3}, "seed=3"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"prefix": -2}, "prefix=-2"),
        ({"prefix": [1, 2, 3]}, "3 numbers"),
        ({"keep": [[(i, i + 1) for i in range(0, 300, 2)]], "S": 300, "B": 1}, "150 separate runs"),
        ({"kv": (9, "cut", "cut", [0, 4, 9]), "causal": False, "B": 1}, "kv_seg=2 documents"),
        ({"cu_seqlens": [0, 9, 16]}, "one at a time"),
        ({"cu_seqlens": [0, 9, 15], "B": 1}, "end with the length, 16"),
        ({"cu_seqlens": [0, 9, 5, 16], "B": 1}, "must not fall"),
        ({"cu_seqlens": [0.0, 16.0], "B": 1}, "give int32"),
        ({"strategy": "tp"}, "lss.parallelize"),
        ({"strategy": "rings"}, "ring"),
        ({"order": "zigzag"}, "head_tail"),
        ({"head_chunks": 3}, "head_chunks=3"),
        ({"head_chunks": 0}, "head_chunks=0"),
        ({"strategy": "ring", "head_chunks": 2}, "head_chunks=2"),
        ({"kernel": "sdpa_flash"}, "CUDA"),
        ({"kernel": "flashy"}, "reference"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(options, words):
    for ok, what in pool(2).outcomes(attention_case, 2, **({"S": 16, "N": 4, "K": 2} | options)):
        assert not ok
        assert what[0] == "Refused"
        assert words in what[1]


def _refused_outright(options):
    x = torch.randn(2, 4, 2, 8)
    lss.attention(x, x, x, mesh=mesh(2), **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dropout_p": 0.1, "seed": 1.5}, "seed=1.5"),
        ({"sinks": [0.0, 1.0, 2.0]}, "sinks=(3,)"),
        ({"alibi_slopes": [0.5]}, "alibi_slopes=(1,)"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask=(2, 5)"),
        ({"samples": torch.arange(3), "dropout_p": 0.1, "seed": 1}, "samples=(3,)"),
        ({"seg": make_segment(4, cp=1, rank=0)}, "seg=a segment of cp=1"),
    ],
)
def test_values_that_fit_nothing_are_refused_by_name(options, words):
    for ok, what in pool(2).outcomes(_refused_outright, options):
        assert not ok
        assert what[0] == "Refused", what[2]
        assert words in what[1]


def _bad_heads():
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 3, 8)
    lss.attention(q, k, k, mesh=mesh(2))


def test_heads_that_do_not_group_are_refused():
    for ok, what in pool(2).outcomes(_bad_heads):
        assert not ok
        assert what[0] == "Refused"
        assert "multiple of the 3 key heads" in what[1]


def test_the_next_chunk_is_gathered_while_this_one_computes():
    """A gather is issued before the chunk ahead of it is attended to; a scatter is waited for after the chunk behind it."""
    forward = ["gather", "gather done", "gather", "attend", "gather done", "gather", "attend", "gather done", "attend"]
    backward = [event if event != "attend" else "attend back" for event in forward]
    scattered = ["attend back", "scatter done", "scatter"]
    with_scatters = [x for event in backward for x in (scattered if event == "attend back" else [event])]
    with_scatters.remove("scatter done")  # nothing is under way yet
    for events in pool(2).run(order_of_events, 2, 3):
        assert events == [*forward, *with_scatters, "scatter done"]


@pytest.mark.parametrize("strategy", ["lss", "ring", "ulysses"])
@pytest.mark.parametrize("seed", range(3))
def test_parity_holds_when_ranks_are_late(strategy, seed):
    chunks = {"head_chunks": 2} if strategy == "lss" else {}
    for errors, *_ in pool(3).run(delayed_case, 3, strategy, seed, S=13, N=4, K=2, **chunks):
        assert max(errors) <= 1e-14


def _balanced_by_name():
    x = torch.randn(1, 8, 2, 8)
    lss.attention(x, x, x, mesh=mesh(2), order="balanced")


def test_the_balanced_order_is_given_as_a_segment():
    for ok, what in pool(2).outcomes(_balanced_by_name):
        assert not ok
        assert what[0] == "Refused"
        assert "lss.make_segment" in what[1]
