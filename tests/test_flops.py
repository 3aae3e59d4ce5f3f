"""Model FLOPs: the published convention for plain causal models, and only visible scores for all others."""

from __future__ import annotations

from lss.config import load_config
from lss.config.hybrid import attention_layers, layer_kind, state_numbers
from lss.flops import model_flops
from lss.segment.documents import scores_seen


def test_causal_attention_counts_half_a_square():
    """6 N tokens + 6 layers N H S^2, as reported everywhere."""
    assert model_flops(1000, 64, 128, 2, scores=3 * 2 * 128**2 / 2) == 6 * 1000 * 256 + 6 * 3 * 64 * 128**2 * 2


def test_hidden_scores_count_nothing():
    assert scores_seen((0, 8), True, (), range(1)) == 36
    assert scores_seen((0, 8), False, (), range(2)) == 2 * 64
    assert scores_seen((0, 3, 8), True, (), range(1)) == 6 + 15
    assert scores_seen((0, 8), True, (1,), range(3)) == 3 * 8
    assert scores_seen((0, 8), True, (2, 0), range(3)) == 15 + 36 + 15
    assert scores_seen((0, 4, 8), False, (2,), range(1)) == 2 * 10


def test_a_scan_counts_its_states():
    """Two FLOPs to write and two to read each number of state, and twice that in backward."""
    assert model_flops(0, 64, 128, 2, scores=0, states=500) == 12 * 500 * 256
    config = load_config(None, ["model.preset=tiny-hybrid", "model.n_layers=6"]).model
    assert [layer_kind(config, layer) for layer in range(6)] == ["scan", "scan", "scan", "attention", "scan", "scan"]
    assert attention_layers(config) == (3,)
    assert state_numbers(config) == 5 * 2 * 128 * 16
    assert scores_seen((0, 8), True, (2, 0), (1, 2)) == 36 + 15
