"""Dropout keyed by token: unbiased, independent over its keys, and the same for any cut."""

from __future__ import annotations

import pytest
import torch

from lss.kernels.dropout import fold, keyed_dropout

ONES = torch.ones(4, 64, 128, dtype=torch.float64)
SAMPLES, POSITIONS = torch.arange(4), torch.arange(64)


def mask(seed=5, p=0.3, samples=SAMPLES, positions=POSITIONS, x=ONES):
    return keyed_dropout(x, p, seed=seed, samples_B=samples, positions_T=positions)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    out = mask(p=p)
    kept = (out != 0).double()
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) < 5 * sigma
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - p), dtype=torch.float64))
    # no sample, position or feature is favoured
    for dims in ((1, 2), (0, 2), (0, 1)):
        n = kept.numel() / kept.mean(dims).numel()
        assert (kept.mean(dims) - (1 - p)).abs().max() < 6 * (p * (1 - p) / n) ** 0.5


def test_any_cut_gives_the_same_numbers():
    whole = mask()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask(positions=POSITIONS[order]), whole[:, order])
    assert torch.equal(mask(samples=SAMPLES[2:], x=ONES[2:]), whole[2:])


def test_seeds_samples_and_positions_are_independent():
    a = (mask(seed=5) != 0).double().flatten()
    others = [mask(seed=6), mask(samples=SAMPLES + 4), mask(positions=POSITIONS + 64), mask(seed=fold(5, 1))]
    for other in others:
        b = (other != 0).double().flatten()
        correlation = torch.corrcoef(torch.stack((a, b)))[0, 1]
        assert abs(float(correlation)) < 5 / len(a) ** 0.5


def test_fold_separates_its_numbers():
    seeds = {fold(s, step, layer) for s in range(8) for step in range(32) for layer in range(32)}
    assert len(seeds) == 8 * 32 * 32
    assert all(0 <= s < 1 << 63 for s in seeds)


def test_rate_zero_is_the_input_itself():
    assert mask(p=0.0) is ONES
