"""Model FLOPs: the published convention for plain causal models, and only visible scores for all others."""

from __future__ import annotations

from lss.flops import model_flops
from lss.segment.documents import scores_seen


def test_causal_attention_counts_half_a_square():
    """6 N tokens + 6 layers N H S^2, as reported everywhere."""
    assert model_flops(1000, 64, 128, 2, scores=3 * 2 * 128**2 / 2) == 6 * 1000 * 256 + 6 * 3 * 64 * 128**2 * 2


def test_hidden_scores_count_nothing():
    assert scores_seen((0, 8), True, (), 1) == 36
    assert scores_seen((0, 8), False, (), 2) == 2 * 64
    assert scores_seen((0, 3, 8), True, (), 1) == 6 + 15
    assert scores_seen((0, 8), True, (1,), 3) == 3 * 8
    assert scores_seen((0, 8), True, (2, 0), 3) == 15 + 36 + 15
    assert scores_seen((0, 4, 8), False, (2,), 1) == 2 * 10
