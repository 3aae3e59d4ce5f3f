"""Index arithmetic of the orders: every token is somebody's, once, and work is balanced where it should be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lss.config.errors import Refused
from lss.segment import ORDERS, make_segment

CUTS = st.tuples(st.integers(1, 300), st.integers(1, 9), st.sampled_from(ORDERS))


def segments(seq_len, cp, order):
    return [make_segment(seq_len, cp=cp, rank=rank, order=order) for rank in range(cp)]


@given(CUTS)
def test_every_position_belongs_to_one_rank(cut):
    seq_len, cp, order = cut
    held = torch.cat([s.positions for s in segments(*cut)])
    assert sorted(held.tolist()) == list(range(len(held)))
    assert len(held) == segments(*cut)[0].padded_len >= seq_len
    assert len({s.local_len for s in segments(*cut)}) == 1
    assert sum(s.true_len for s in segments(*cut)) == seq_len
    # no more padding than one token short of a full round of chunks
    assert len(held) - seq_len < segments(*cut)[0].n_chunks


@given(CUTS)
def test_orders_undo_each_other(cut):
    for segment in segments(*cut):
        rank_ordered = torch.cat([s.positions for s in segments(*cut)])
        in_order = segment.reorder(rank_ordered, 0, segment.chunk_order)
        assert torch.equal(in_order, torch.arange(segment.padded_len))
        assert torch.equal(segment.reorder(in_order, 0, segment.rank_order), rank_ordered)


@given(CUTS, st.booleans())
def test_blocks_cover_exactly_the_visible_scores(cut, causal):
    seq_len, *_ = cut
    for segment in segments(*cut):
        seen = torch.zeros(segment.local_len, segment.padded_len, dtype=torch.int)
        for b in segment.blocks(causal):
            for row in range(b.q_start, b.q_stop):
                last = b.k_stop - (b.q_stop - 1 - row) if b.causal else b.k_stop
                seen[row, b.k_start : last] += 1
        position = segment.positions[:, None]
        key = torch.arange(segment.padded_len)[None, :]
        expected = (position < seq_len) & (key < seq_len) & ((key <= position) if causal else True)
        assert torch.equal(seen, expected.int())


@pytest.mark.parametrize("cp", [2, 3, 4, 8, 64])
def test_head_tail_balances_causal_work_and_contiguous_does_not(cp):
    def work(order):
        areas = []
        for s in segments(128 * cp, cp, order):
            # a causal block of q queries and k keys has q*k - q*(q-1)/2 scores
            sizes = [(b.q_stop - b.q_start, b.k_stop - b.k_start) for b in s.blocks(True)]
            areas.append(sum(q * k - q * (q - 1) // 2 for q, k in sizes))
        return max(areas) / (sum(areas) / len(areas))

    assert work("head_tail") == pytest.approx(1.0, abs=1e-9)
    assert work("contiguous") == pytest.approx(2 - 1 / cp, abs=0.02)


def test_head_tail_gives_first_and_last_chunk_to_rank_0():
    assert make_segment(16, cp=2, rank=0, order="head_tail").positions.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert make_segment(16, cp=2, rank=1, order="head_tail").spans == ((4, 12),)


def test_one_rank_needs_no_padding_in_either_order():
    for order in ORDERS:
        segment = make_segment(7, cp=1, rank=0, order=order)
        assert segment.local_len == 7
        assert segment.chunk_order is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"seq_len": 0}, "seq_len=0"),
        ({"seq_len": 2.5}, "seq_len=2.5"),
        ({"order": "zigzag"}, "order=zigzag"),
        ({"order": "balanced"}, "packed documents"),
        ({"rank": 2}, "rank=2"),
    ],
)
def test_refusals_name_the_setting(arguments, words):
    arguments = {"seq_len": 8, "cp": 2, "rank": 0, "order": "contiguous"} | arguments
    with pytest.raises(Refused, match=words):
        make_segment(arguments.pop("seq_len"), **arguments)
