"""What each rank is sent: exactly the keys that its queries see, and how many those can be."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lss.segment import ORDERS, make_mask, make_segment, plan_fetch, runs_of
from lss.segment.blocks import keys_needed


def seen_by(segment, mask, seq_len):
    """Which keys any of this rank's queries sees, from the definition of a mask."""
    seen = torch.zeros(seq_len, dtype=torch.bool)
    j = torch.arange(seq_len)
    for _, _, start, stop in segment.local_runs:
        for i in range(start, stop):
            for a in mask.areas:
                if a.q_start <= i < a.q_stop:
                    inside = (j >= a.k_start) & (j < a.k_stop) & ((j <= i) | (not a.causal))
                    seen |= inside if mask.window is None else inside & ((i - j).abs() < mask.window)
    return seen


@st.composite
def plans(draw):
    """(seq_len, cp, order, mask)."""
    seq_len = draw(st.integers(1, 90))
    edges = tuple(sorted({0, seq_len, *draw(st.lists(st.integers(0, seq_len), max_size=6))}))
    causal, window = draw(st.booleans()), draw(st.none() | st.integers(1, seq_len))
    prefixes = tuple(draw(st.integers(0, b - a)) for a, b in pairwise(edges)) if causal else ()
    mask = make_mask(edges, causal=causal, window=window, prefixes=prefixes)
    return seq_len, draw(st.integers(2, 6)), draw(st.sampled_from(ORDERS)), mask


@given(plans())
def test_each_rank_is_sent_the_keys_that_its_queries_see_and_no_others(plan):
    seq_len, cp, order, mask = plan
    ranks = [make_segment(seq_len, cp=cp, rank=r, order=order) for r in range(cp)]
    fetches = [plan_fetch(s, s, (mask,)) for s in ranks]
    if fetches[0] is None:  # all ranks gather all keys: right where all see all, or where nothing can be spared
        assert all(f is None for f in fetches)
        everything = all(seen_by(s, mask, seq_len).all() for s in ranks)
        assert everything or (mask.window is None and len({a.k_start for a in mask.areas}) <= 1)
        return
    for rank, (segment, fetch) in enumerate(zip(ranks, fetches, strict=True)):
        # what the others say they send me, in the order of the ranks, then put in the order of the sequence
        received = torch.cat([other.positions[a:b] for other, f in zip(ranks, fetches, strict=True)
                              for a, b in f.sends[rank]] or [torch.empty(0, dtype=torch.int64)])  # fmt: skip
        assert fetch.length == len(received)
        ordered = torch.cat([received[a:b] for a, b in fetch.pieces] or [received])
        assert torch.equal(ordered, seen_by(segment, mask, seq_len).nonzero().flatten())
        assert fetch.sorted == torch.equal(ordered, received)
        for start, stop, first, end in fetch.runs:
            assert ordered[start:stop].tolist() == list(range(first, end))


@pytest.mark.parametrize("seq_len", [64, 1 << 10, 1 << 20])
def test_a_window_bounds_what_is_fetched(seq_len):
    """Contiguous T + w - 1, head_tail min(S, T + 2 (w - 1)) at cp = 8, the rank's own included."""
    for window in sorted({1, 2, 5, seq_len // 100 + 1, seq_len // 8, seq_len // 3, seq_len - 1, seq_len}):
        for order, reach in (("contiguous", window - 1), ("head_tail", 2 * (window - 1))):
            mask = make_mask((0, seq_len), causal=True, window=window)
            for rank in range(8):
                segment = make_segment(seq_len, cp=8, rank=rank, order=order)
                fetch = plan_fetch(segment, segment, (mask,))
                fetched = seq_len if fetch is None else fetch.length
                assert fetched <= min(seq_len, segment.local_len + reach)
                assert fetched == sum(b - a for a, b in keys_needed(segment.local_runs, (mask,)))


def test_a_rank_fetches_only_documents_that_its_queries_belong_to():
    edges = (0, 10, 20, 30, 64)
    mask = make_mask(edges, causal=False)
    segment = make_segment(64, cp=4, rank=0, order="contiguous", cu_seqlens=list(edges))  # tokens 0 to 15
    fetch = plan_fetch(segment, segment, (mask,))
    assert fetch.runs == ((0, 20, 0, 20),)


def test_runs_of_a_padding_mask():
    assert runs_of(torch.tensor([0, 1, 1, 0, 0, 1])) == ((1, 3), (5, 6))
    assert runs_of(torch.ones(4, dtype=torch.bool)) == ((0, 4),)
    assert runs_of(torch.zeros(4)) == ()
