"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lss.config.errors import refuse


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the largest.
        top_k: draw from so many of the largest; 0: from all.
        top_p: draw from the fewest of the largest whose probabilities make this together; 1: from all.
        seed: of the draws.

    Raises:
        Refused: a value that is none of these.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise refuse("--temperature", self.temperature, "use 0 for the likeliest token, or a number above 0")
        if self.top_k < 0:
            raise refuse("--top-k", self.top_k, "use how many tokens to draw from, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise refuse("--top-p", self.top_p, "a probability; use a number above 0, up to 1")

    def generator(self) -> torch.Generator:
        """What the draws of one text come from."""
        return torch.Generator().manual_seed(self.seed)


def sample(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """(B,) int64 on the CPU: a token a row. Probabilities are computed in float64 there, the same on any device."""
    logits = logits_BV.detach().double().cpu()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    sorted_BV, order_BV = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        sorted_BV = sorted_BV[:, : sampling.top_k]
    p_BV = sorted_BV.softmax(-1)
    # a token stays where those before it do not make top_p yet, so that one always does
    p_BV = p_BV.masked_fill(p_BV.cumsum(-1) - p_BV >= sampling.top_p, 0.0)
    drawn = torch.multinomial(p_BV, 1, generator=generator)
    return order_BV.gather(-1, drawn)[:, 0]
