"""Documents, windows, prefixes, padding and all else, in every order and strategy, against softmax with the mask."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lss
from lss.segment import make_segment
from tests.distributed.cases import attention_case, visible
from tests.distributed.pool import mesh, pool

STRATEGIES = ["lss", "ring", "ulysses"]
ORDERS = ["head_tail", "contiguous", "balanced"]
# lengths from 1 on; borders on, beside and far over those of segments
DOCUMENTS = {"one": [0, 23], "short and long": [0, 1, 2, 3, 19, 23], "halves": [0, 12, 23], "ones": list(range(24))}
BOUND = 1e-13


@pytest.mark.parametrize(
    "strategy, order, causal, documents, window",
    list(product(STRATEGIES, ORDERS, [True, False], DOCUMENTS, [None, 1, 5, 23])),
)
def test_documents_and_windows(strategy, order, causal, documents, window):
    options = {"cu_seqlens": DOCUMENTS[documents], "window": window, "causal": causal, "order": order}
    for errors, *_ in pool(4).run(attention_case, 4, strategy=strategy, S=23, N=4, K=2, H=4, B=1, **options):
        assert max(errors) <= BOUND


@st.composite
def problems(draw):
    """A length, borders, window, prefixes, padding, heads, mask, order, strategy and head chunks drawn at random."""
    S, K, B = draw(st.integers(1, 70)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    inner = draw(st.lists(st.integers(1, max(S - 1, 1)), max_size=6)) if B == 1 else []
    strategy, causal, N = draw(st.sampled_from(STRATEGIES)), draw(st.booleans()), K * draw(st.integers(1, 3))
    edges = sorted({0, S, *(x for x in inner if x < S)})
    problem = {
        "S": S, "B": B, "K": K, "N": N, "causal": causal, "strategy": strategy,
        "window": draw(st.none() | st.integers(1, S)),
        "order": draw(st.sampled_from(ORDERS)),
        "head_chunks": draw(st.integers(1, K)) if strategy == "lss" else 1,
        "regather": draw(st.booleans()),
        "transport": draw(st.sampled_from(["collective", "symmetric"])),
        "kernel": draw(st.sampled_from(["auto", "reference", "tiled"])),
    }  # fmt: skip
    if strategy == "lss" and problem["transport"] == "collective":
        problem["token_chunks"] = draw(st.integers(1, max(1, S // 4)))
    if len(edges) > 2:
        problem["cu_seqlens"] = edges
    if causal and draw(st.booleans()):
        one = st.integers(0, S)
        each = st.lists(one, min_size=len(edges) - 1, max_size=len(edges) - 1)
        problem["prefix"] = draw(each) if len(edges) > 2 and draw(st.booleans()) else draw(one)
    if draw(st.booleans()):
        problem["keep"] = [_runs(draw(st.lists(st.integers(0, S), max_size=6, unique=True))) for _ in range(B)]
    if draw(st.booleans()):
        problem |= _scores(draw, N)
        problem["kernel"] = draw(st.sampled_from(["auto", "reference", "tiled"]))
    return problem


def _runs(places):
    """Sorted places as runs [a, b), an odd one left out."""
    places = sorted(places)
    return list(zip(places[::2], places[1::2], strict=False))


def _scores(draw, N):
    """Some of what changes the scores."""
    number = st.floats(-2, 2, allow_nan=False)
    every = {
        "softcap": st.floats(0.5, 5),
        "alibi_slopes": st.lists(st.floats(0, 1), min_size=N, max_size=N),
        "sinks": st.lists(number, min_size=N, max_size=N),
        "dropout_p": st.floats(0.1, 0.9),
        "mask_mod": st.sampled_from(["checkerboard", "blocks_of_eight"]),
    }
    chosen = {name: draw(values) for name, values in every.items() if draw(st.booleans())}
    return chosen | ({"seed": draw(st.integers(0, 2**60))} if "dropout_p" in chosen else {})


@given(st.integers(1, 4), problems())
@settings(max_examples=200, deadline=None)
def test_any_combination_equals_the_oracle(cp, problem):
    for errors, *_ in pool(cp).run(attention_case, cp, H=4, **problem):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("regather", [True, False])
def test_ranks_without_heads_have_no_blocks_to_compute_together(regather):
    """One head on four ranks of Ulysses, and documents so short that a kernel takes many in one call."""
    options = {"cu_seqlens": list(range(0, 41, 4)), "kernel": "reference", "regather": regather}
    for errors, *_ in pool(4).run(attention_case, 4, strategy="ulysses", S=40, N=1, K=1, H=4, B=1, **options):
        assert max(errors) <= BOUND


@st.composite
def crossings(draw):
    """Two lengths, which sides are cut, documents on both, padding of the keys, heads and scores."""
    S, length, K = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    n = draw(st.integers(1, min(S, length, 4)))
    borders = [[0, *sorted(draw(st.permutations(range(1, s)))[: n - 1]), s] for s in (S, length)]
    N, B = K * draw(st.integers(1, 2)), 1 if n > 1 else draw(st.integers(1, 2))
    sides = draw(st.sampled_from([("cut", "cut"), ("cut", "whole"), ("whole", "cut"), ("whole", "whole")]))
    problem = {
        "S": S, "B": B, "K": K, "N": N, "causal": False, "order": draw(st.sampled_from(ORDERS)),
        "kv": (length, sides[0], sides[1], borders[1] if n > 1 else None),
        "head_chunks": draw(st.integers(1, K)), "regather": draw(st.booleans()),
    }  # fmt: skip
    if n > 1:
        problem["cu_seqlens"] = borders[0]
    if draw(st.booleans()):
        problem["keep"] = [_runs(draw(st.lists(st.integers(0, length), max_size=6, unique=True))) for _ in range(B)]
    if draw(st.booleans()):
        scores = _scores(draw, N)
        problem |= {name: value for name, value in scores.items() if name not in ("alibi_slopes", "sinks")}
    return problem


@given(st.integers(1, 4), crossings())
@settings(max_examples=100, deadline=None)
def test_cross_attention_equals_the_oracle(cp, problem):
    for errors, *_ in pool(cp).run(attention_case, cp, H=4, **problem):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("kernel", ["sdpa", "tiled"])
def test_lower_precision_with_a_window(strategy, dtype, bound, kernel):
    options = {"dtype": dtype, "window": 9, "cu_seqlens": [0, 30, 80], "kernel": kernel}
    for errors, *_ in pool(4).run(attention_case, 4, S=80, N=4, K=2, B=1, strategy=strategy, **options):
        assert max(errors) <= bound


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "window, cu_seqlens, prefix", [(5, None, 0), (40, None, 0), (None, [0, 10, 33, 64], 0), (7, [0, 50, 64], 3)]
)
def test_bytes_sent_are_those_of_the_keys_seen_and_no_more(order, window, cu_seqlens, prefix):
    """2 B L K H elements forward and back, L the keys that any query of the rank sees, counted from the mask itself."""
    S, K, H = 64, 2, 4
    options = {"S": S, "N": 4, "K": K, "H": H, "B": 1, "order": order, "window": window, "prefix": prefix, "regather": False}
    if cu_seqlens:
        options["cu_seqlens"] = cu_seqlens
    allowed = visible(S, True, window, cu_seqlens, prefix)
    for rank, (errors, forward, backward, *_) in enumerate(pool(4).run(attention_case, 4, **options)):
        assert max(errors) <= BOUND
        segment = make_segment(S, cp=4, rank=rank, order=order, cu_seqlens=cu_seqlens, window=window)
        seen = int(allowed[segment.positions].any(0).sum())
        assert forward == [("all_to_all", "kv", 1, 2 * seen * K * H * 8)]
        assert backward == [("all_to_all", "dkv", 1, 2 * seen * K * H * 8)]
        if order == "contiguous" and window and not cu_seqlens:
            assert seen <= S // 4 + window - 1


def _influence(strategy, order, change, window, cu_seqlens):
    """How many outputs and gradients outside change when the tokens [change) of the sequence do."""
    S, the_mesh = 64, mesh(4)
    borders = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    seg = lss.make_segment(S, the_mesh, order, borders)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, S, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    results = []
    for changed in (False, True):
        if changed:
            for x in (q, k, v):
                x[:, slice(*change)] = torch.randn(1, change[1] - change[0], 2, 8, generator=generator, dtype=torch.float64)
        local = [lss.shard(x, the_mesh, seg=seg).requires_grad_() for x in (q, k, v)]
        out = lss.attention(*local, mesh=the_mesh, seg=seg, window=window, strategy=strategy)
        results.append([lss.unshard(x.detach(), the_mesh, seg=seg) for x in (out, *torch.autograd.grad(out.sum(), local))])
    different = [(a != b).any(-1).any(-1)[0] for a, b in zip(*results, strict=True)]
    return [[int(i) for i in d.nonzero()] for d in different]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("order", ORDERS)
def test_documents_have_exactly_no_influence_on_others(strategy, order):
    for different in pool(4).run(_influence, strategy, order, (10, 33), None, [0, 10, 33, 64]):
        assert different[0] == list(range(10, 33))
        assert all(10 <= i < 33 for d in different for i in d)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_reaches_beyond_the_window(strategy, order):
    for out, dq, dk, dv in pool(4).run(_influence, strategy, order, (30, 32), 5, None):
        assert out == list(range(30, 36))  # queries at most 4 behind key 31
        assert all(30 <= i < 36 for i in dq)
        # a key's gradient feels every query that sees it, and through their softmax the keys that they see
        assert all(26 <= i < 36 for i in dk + dv)
