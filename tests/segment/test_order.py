"""Index arithmetic of the orders: every token is somebody's, once, and work is balanced where it should be."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lss.config.errors import Refused
from lss.segment import ORDERS, make_blocks, make_mask, make_segment
from lss.segment.documents import area_before

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


@given(CUTS, st.randoms())
def test_orders_undo_each_other_whichever_rank_comes_first(cut, dice):
    ranks = list(range(cut[1]))
    dice.shuffle(ranks)
    parts = segments(*cut)
    arrived = torch.cat([parts[rank].positions for rank in ranks])
    to_sequence, to_ranks = parts[0].orders(tuple(ranks))
    in_order = parts[0].reorder(arrived, 0, to_sequence)
    assert torch.equal(in_order, torch.arange(parts[0].padded_len))
    assert torch.equal(parts[0].reorder(in_order, 0, to_ranks), arrived)


@given(st.tuples(st.integers(1, 300), st.integers(1, 4), st.sampled_from(ORDERS)), st.integers(1, 3))
def test_neighbours_together_hold_one_segment(cut, inner):
    seq_len, groups, order = cut
    parts = segments(seq_len, groups * inner, order)
    for first in range(0, len(parts), inner):
        group = parts[first : first + inner]
        whole = group[0].merged(inner)
        assert all(part.merged(inner) == whole for part in group)
        held = torch.cat([part.positions for part in group])
        to_sequence, to_ranks = group[0].orders(tuple(range(first, first + inner)))
        in_order = group[0].reorder(held, 0, to_sequence)
        assert (whole.cp, whole.rank) == (groups, first // inner)
        # one group holds the sequence itself, without padding
        assert torch.equal(in_order[: whole.local_len], whole.positions)
        assert whole.local_len == (seq_len if groups == 1 and inner > 1 else inner * group[0].local_len)
        assert torch.equal(group[0].reorder(in_order, 0, to_ranks), held)


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
        ({"rank": 2}, "rank=2"),
    ],
)
def test_refusals_name_the_setting(arguments, words):
    arguments = {"seq_len": 8, "cp": 2, "rank": 0, "order": "contiguous"} | arguments
    with pytest.raises(Refused, match=words):
        make_segment(arguments.pop("seq_len"), **arguments)


@st.composite
def packed(draw):
    """(seq_len, cp, order, borders, causal, window)."""
    seq_len = draw(st.integers(1, 120))
    inner = draw(st.lists(st.integers(0, seq_len), max_size=8))
    borders = draw(st.sampled_from([None, sorted({0, seq_len, *inner})]))
    window = draw(st.none() | st.integers(1, seq_len))
    return seq_len, draw(st.integers(1, 6)), draw(st.sampled_from(ORDERS)), borders, draw(st.booleans()), window


def scores_seen(segment, blocks, key_positions, seq_len):
    """How often each (local query, global key) pair is computed by some blocks, from the definition of a block."""
    seen = torch.zeros(segment.local_len, seq_len, dtype=torch.int)
    for b in blocks:
        n, m = b.q_stop - b.q_start, b.k_stop - b.k_start
        offset = (torch.arange(m)[None, :] - torch.arange(n)[:, None]) - (m - n)
        left, right = b.window or (m + n, 0 if b.causal else m + n)
        visible = (offset >= -left) & (offset <= right)
        assert visible.any(1).all(), "a block has no query that sees nothing"
        for i in range(n):
            seen[b.q_start + i, key_positions[b.k_start : b.k_stop]] += visible[i].int()
    return seen


@given(packed())
def test_blocks_of_documents_and_windows_cover_exactly_what_is_visible(problem):
    seq_len, cp, order, borders, causal, window = problem
    distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)[None, :]
    allowed = distance >= 0 if causal else torch.ones(seq_len, seq_len, dtype=torch.bool)
    allowed &= distance.abs() < (window or seq_len)
    if borders:
        document = torch.bucketize(torch.arange(seq_len), torch.tensor(borders)[1:], right=True)
        allowed &= document[:, None] == document[None, :]
    ranks = [make_segment(seq_len, cp=cp, rank=r, order=order, cu_seqlens=borders, causal=causal, window=window)
             for r in range(cp)]  # fmt: skip
    held = torch.cat([s.positions for s in ranks])
    assert sorted(held.tolist()) == list(range(len(held)))
    for segment in ranks:
        expected = torch.zeros(segment.local_len, seq_len, dtype=torch.int)
        true = segment.positions < seq_len
        expected[true] = allowed[segment.positions[true]].int()
        gathered = scores_seen(segment, segment.blocks(causal, window), torch.arange(seq_len), seq_len)
        assert torch.equal(gathered, expected)
        mask = make_mask(segment.documents, causal=causal, window=window)
        travelling = sum(
            scores_seen(segment, make_blocks(segment.local_runs, other.local_runs, mask), other.positions, seq_len)
            for other in ranks
        )
        assert torch.equal(travelling, expected)


def long_tailed_borders(seq_len, seed):
    """Borders of documents whose lengths are log-normal: many short, a few that span segments."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(6.5, 1.6, size=seq_len // 50).astype(int).clip(1)
    edges = np.concatenate(([0], np.cumsum(lengths)))
    return [*edges[edges < seq_len].tolist(), seq_len]


@pytest.mark.parametrize("seq_len", [1 << 16, 1 << 18, 1 << 20, 1 << 22])
@pytest.mark.parametrize("cp", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("window", [None, 4096])
def test_balanced_order_balances_packed_documents(seq_len, cp, window):
    for seed in range(3):
        borders = long_tailed_borders(seq_len, seed)
        segment = make_segment(seq_len, cp=cp, rank=0, order="balanced", cu_seqlens=borders, window=window)
        work = []
        for share in segment.shares:
            starts = np.array(share) * segment.chunk_len
            stops = np.minimum(starts + segment.chunk_len, seq_len)
            areas = area_before(borders, np.stack((starts, stops)).clip(max=seq_len), True, window)
            work.append(int((areas[1] - areas[0]).sum()))
        assert max(work) <= 1.05 * sum(work) / cp
        assert len({len(share) for share in segment.shares}) == 1
        assert len(segment.shares[0]) >= 8


def test_balanced_order_is_planned_in_a_moment():
    borders = long_tailed_borders(1 << 20, 0)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        make_segment(1 << 20, cp=64, rank=0, order="balanced", cu_seqlens=borders)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05


@given(packed(), st.data())
def test_counted_area_is_the_number_of_visible_scores(problem, data):
    seq_len, _, _, borders, causal, window = problem
    edges = borders or [0, seq_len]
    place = data.draw(st.integers(0, seq_len))
    segment = make_segment(seq_len, cp=1, rank=0, cu_seqlens=borders)
    seen = scores_seen(segment, segment.blocks(causal, window), torch.arange(seq_len), seq_len)
    assert int(area_before(edges, np.array([place]), causal, window)[0]) == int(seen[:place].sum())


def test_positions_restart_in_documents_only_where_asked():
    segment = make_segment(10, cp=2, rank=1, order="contiguous", cu_seqlens=[0, 3, 7, 10])
    assert segment.positions.tolist() == [5, 6, 7, 8, 9]
    assert segment.document_positions.tolist() == [2, 3, 0, 1, 2]
