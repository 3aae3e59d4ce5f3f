"""Recurrences and convolutions over a cut sequence: equal to the loop over tokens, with bytes that know nothing of S."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import lss
from tests.distributed.pool import mesh, pool
from tests.distributed.scan_cases import conv_case, drawn, scan_case

ORDERS = ["head_tail", "contiguous", "balanced"]
# S = 1 and 5: ranks of padding alone; 130: several blocks a chunk, and a last one that is filled up
LENGTHS = [1, 5, 24, 37, 130]
# documents that begin at a chunk's border, inside of a block, and one token long
DOCUMENTS = [0, 1, 2, 9, 65, 66, 130]


@pytest.mark.parametrize("cp, order, S", list(product([1, 2, 3, 4], ORDERS, LENGTHS)))
def test_a_scan_equals_the_loop_over_tokens(cp, order, S):
    for errors, *_ in pool(cp).run(scan_case, cp, S=S, order=order):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("cp, order", list(product([1, 2, 3, 4], ORDERS)))
def test_documents_forget_the_state(cp, order):
    for edges in (DOCUMENTS, [0, 33, 66, 130], [0, 65, 130]):
        for errors, *_ in pool(cp).run(scan_case, cp, S=130, B=1, order=order, edges=edges):
            assert max(errors) <= 1e-12


@pytest.mark.parametrize("N, K, P, H", [(1, 1, 1, 1), (4, 4, 8, 8), (6, 1, 2, 7), (6, 3, 16, 1)])
def test_heads_and_sizes_of_any_number(N, K, P, H):
    for errors, *_ in pool(2).run(scan_case, 2, S=70, N=N, K=K, P=P, H=H):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("edges", [None, DOCUMENTS])
def test_strong_decays_overflow_nowhere(edges):
    """exp of the decays of a whole block, turned round, is beyond float32."""
    for errors, *_ in pool(2).run(scan_case, 2, S=130, B=1, edges=edges, decay=8.0, dtype=torch.float32):
        assert max(errors) <= 2e-6


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_rounds_inputs_and_results_alone(dtype, bound):
    """States are float32: the error is that of rounding y and its gradients, whatever the ranks."""
    for errors, *_ in pool(4).run(scan_case, 4, S=130, dtype=dtype):
        assert max(errors) <= bound


@pytest.mark.parametrize("cp, order, S", list(product([1, 2, 3, 4], ORDERS, [1, 37, 130])))
def test_decays_of_channels_equal_the_loop_over_tokens(cp, order, S):
    for errors, *_ in pool(cp).run(scan_case, cp, S=S, order=order, by_channel=True):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("cp, order", list(product([1, 3, 4], ORDERS)))
def test_documents_forget_states_whose_channels_decay_apart(cp, order):
    for edges in (DOCUMENTS, [0, 33, 66, 130]):
        for errors, *_ in pool(cp).run(scan_case, cp, S=130, B=1, order=order, edges=edges, by_channel=True):
            assert max(errors) <= 1e-12


@pytest.mark.parametrize("N, K, P, H", [(1, 1, 1, 1), (4, 4, 8, 8), (6, 1, 2, 7), (6, 3, 16, 1)])
def test_channels_of_any_number(N, K, P, H):
    """H = 1 with one head: Mamba's diagonal states of one channel of its inner width."""
    for errors, *_ in pool(2).run(scan_case, 2, S=70, N=N, K=K, P=P, H=H, by_channel=True):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("edges", [None, DOCUMENTS])
@pytest.mark.parametrize("decay, dtype, bound", [(30.0, torch.float32, 2e-6), (300.0, torch.float64, 1e-12),
                                                 (0.25, torch.bfloat16, 4e-3)])  # fmt: skip
def test_strong_decays_of_channels_overflow_nowhere(edges, decay, dtype, bound):
    """exp of the decays of a block of 16, turned round, is beyond float32, and float64."""
    how = {"S": 130, "B": 1, "edges": edges, "decay": decay, "dtype": dtype, "by_channel": True}
    for errors, *_ in pool(2).run(scan_case, 2, **how):
        assert max(errors) <= bound


@pytest.mark.parametrize("order, chunks", [("head_tail", 2), ("contiguous", 1)])
def test_bytes_of_decays_of_channels(order, chunks):
    B, N, P, H, cp = 2, 4, 3, 5, 3
    number = cp * chunks * B * N * 8
    for S in (48, 4 * 48):
        for _, forward, backward in pool(cp).run(scan_case, cp, S=S, order=order, by_channel=True):
            assert forward == {("all_gather", "state"): (1, number * (P * H + P))}
            assert backward == {("all_gather", "dstate"): (1, number * P * H)}


@pytest.mark.parametrize("cp, order, S", list(product([1, 2, 3, 4], ORDERS, LENGTHS)))
def test_a_convolution_equals_torchs(cp, order, S):
    for width in (1, 2, 4, 7):  # 7 reaches over several chunks of few tokens
        for errors, *_ in pool(cp).run(conv_case, cp, S=S, order=order, W=width):
            assert max(errors) <= 1e-12


@pytest.mark.parametrize("cp, order", list(product([1, 2, 3, 4], ORDERS)))
def test_a_convolution_keeps_documents_apart(cp, order):
    for errors, *_ in pool(cp).run(conv_case, cp, S=130, B=1, order=order, edges=DOCUMENTS):
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("order, chunks", [("head_tail", 2), ("contiguous", 1)])
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_bytes_are_those_of_states_at_any_length(cp, order, chunks):
    """One all-gather each way, of cp states in contiguous order and 2 cp in head_tail; the same at S and at 4 S."""
    B, N, P, H = 2, 4, 3, 5
    number = cp * chunks * B * N * 8
    for S in (48, 4 * 48):
        for _, forward, backward in pool(cp).run(scan_case, cp, S=S, order=order):
            assert forward == {("all_gather", "state"): (1, number * (P * H + 1))}
            assert backward == {("all_gather", "dstate"): (1, number * P * H)}


@pytest.mark.parametrize("order, chunks", [("head_tail", 2), ("contiguous", 1)])
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_halos_are_as_many_bytes_at_any_length(cp, order, chunks):
    """W - 1 tokens to each chunk from the one before it; the sequence's last chunk has nobody behind it to send to."""
    B, C, W = 2, 6, 4
    for S in (48, 4 * 48):
        found = pool(cp).run(conv_case, cp, S=S, order=order)
        token = B * C * 8 * (W - 1)
        last, first = (0 if order == "head_tail" else cp - 1), 0
        for rank, (_, forward, backward) in enumerate(found):
            assert forward == {("all_to_all", "halo"): (1, token * (chunks - (rank == last)))}
            assert backward == {("all_to_all", "dhalo"): (1, token * (chunks - (rank == first)))}


def test_one_rank_moves_nothing():
    for case in (scan_case, conv_case):
        assert pool(1).run(case, 1, S=24)[0][1:] == ({}, {})


def _several_nodes():
    return [max(case(4, S=53, per_node=2)[0]) for case in (scan_case, conv_case)]


def test_ranks_on_several_nodes():
    for errors in pool(4).run(_several_nodes):
        assert max(errors) <= 1e-12


def _misuse(what):
    q, k, v, g = drawn((1, 8, 2, 3), (1, 8, 2, 3), (1, 8, 4, 5), (1, 8, 4))
    given = {
        "k": (q, k[..., :2], v, g), "v": (q, k, v[:, :, :3], g), "log_decay": (q, k, v, g[:, :, :2]), "q": (q[0], k, v, g),
        "dims": (q, k, v, g[..., None]), "dtype": (q, k.float(), v, g),
    }  # fmt: skip
    if what in given:
        lss.scan(*given[what], mesh=mesh(2))
    if what == "length":
        lss.scan(q, k, v, g, mesh=mesh(2), seq_len=40)
    if what == "x":
        lss.causal_conv(q, torch.ones(2, 4), mesh=mesh(2))
    if what == "weight":
        lss.causal_conv(q[..., 0], torch.ones(3, 4), mesh=mesh(2))


@pytest.mark.parametrize(
    "what, words",
    [
        ("k", "k=(1, 8, 2, 2)"),
        ("v", "v=(1, 8, 3, 5)"),
        ("log_decay", "log_decay=(1, 8, 2)"),
        ("q", "q=(8, 2, 3)"),
        ("dims", "one for each row of its state, (1, 8, 4, 3)"),
        ("dtype", "k=torch.float32"),
        ("length", "seq_len=40"),
        ("x", "x=(1, 8, 2, 3)"),
        ("weight", "weight=(3, 4)"),
    ],
)
def test_misuse_is_said_in_words(what, words):
    for ok, error in pool(2).outcomes(_misuse, what):
        assert not ok
        assert error[0] == "Refused", error[2]
        assert words in error[1]
