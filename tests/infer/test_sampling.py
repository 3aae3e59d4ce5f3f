"""Tokens are drawn from what temperature, top-k and top-p leave, and as often as their probabilities say."""

from __future__ import annotations

import pytest
import torch

from lss.config.errors import Refused
from lss.infer import Sampling
from lss.infer.sampling import sample

P = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1], dtype=torch.float64)


def drawn(sampling, draws=20000):
    """How often each token comes."""
    tokens = sample(P.log().expand(draws, 5), sampling, sampling.generator())
    return torch.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize("sampling, weights", [
    (Sampling(), [0.05, 0.4, 0.3, 0.15, 0.1]),
    (Sampling(temperature=0), [0, 1, 0, 0, 0]),
    (Sampling(temperature=0.5), [0.0025, 0.16, 0.09, 0.0225, 0.01]),
    (Sampling(top_k=2), [0, 0.4, 0.3, 0, 0]),
    (Sampling(top_k=9), [0.05, 0.4, 0.3, 0.15, 0.1]),
    (Sampling(top_p=0.69), [0, 0.4, 0.3, 0, 0]),
    (Sampling(top_p=0.71), [0, 0.4, 0.3, 0.15, 0]),
    (Sampling(top_p=1e-9), [0, 1, 0, 0, 0]),
    (Sampling(top_k=3, top_p=0.8), [0, 0.4, 0.3, 0, 0]),
])  # fmt: skip
def test_tokens_come_as_often_as_they_should(sampling, weights):
    expected = torch.tensor(weights, dtype=torch.float64)
    found = drawn(sampling)
    assert ((found > 0) <= (expected > 0)).all()
    torch.testing.assert_close(found.double(), expected / expected.sum(), atol=0.015, rtol=0)


def test_a_seed_gives_the_same_tokens_and_another_one_others():
    one, again, other = (sample(P.log().expand(50, 5), s, s.generator()) for s in (Sampling(), Sampling(), Sampling(seed=1)))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("settings, words", [
    ({"temperature": -1.0}, "--temperature=-1.0"),
    ({"temperature": float("nan")}, "--temperature=nan"),
    ({"top_k": -1}, "--top-k=-1"),
    ({"top_p": 0.0}, "--top-p=0.0"),
    ({"top_p": 1.1}, "--top-p=1.1"),
])  # fmt: skip
def test_refusals(settings, words):
    with pytest.raises(Refused, match=words):
        Sampling(**settings)
