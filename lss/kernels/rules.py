"""What attention computes, whatever computes it: who sees whom, and what becomes of the scores.

    s_ij = softcap(scale q_i . k_j) - slope_h |i - j|      softcap(x) = c tanh(x / c)
    P_ij = exp(s_ij) / (sum over visible j of exp(s_ij) + exp(sink_h))
    out_i = sum over visible j of P_ij keep_ij / (1 - p) v_j

Sources: soft-capping, Gemma 2 (2024); slopes, ALiBi (Press et al. 2022); sinks, gpt-oss (2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch

from lss.config.errors import refuse
from lss.kernels.dropout import keyed_keep
from lss.segment import Mask, Run, make_mask, runs_of

# (batch row, head, query's place, key's place) -> whether it is seen, as in torch.nn.attention.flex_attention
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """What becomes of the scores of some rows and heads, besides the scale and the block's mask.

    Attributes:
        softcap: c of c * tanh(s / c); 0 for none.
        slopes: (N,), subtracted times |i - j|; None for none.
        mask_mod: which scores count, by place; None for all.
        dropout_p, seed, samples: dropout of P, keyed by (seed, sample, head, i, j); samples (B,) int64.
        first_row, first_head: the numbers of the first row and head at hand among all.
    """

    softcap: float = 0.0
    slopes: torch.Tensor | None = None
    mask_mod: MaskMod | None = None
    dropout_p: float = 0.0
    seed: int = 0
    samples: torch.Tensor | None = None
    first_row: int = 0
    first_head: int = 0

    def of(self, rows: slice = slice(None), heads: slice = slice(None)) -> Scores:
        """The same for some of these rows and heads."""
        return replace(
            self,
            slopes=None if self.slopes is None else self.slopes[heads],
            samples=None if self.samples is None else self.samples[rows],
            first_row=self.first_row + (rows.start or 0),
            first_head=self.first_head + (heads.start or 0),
        )

    def keep(self, shape: torch.Size, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor | None:
        """Which of P's elements (B, N, q, k) dropout keeps, for queries and keys at these places; None for all."""
        if self.dropout_p == 0.0:
            return None
        heads = self.first_head + torch.arange(shape[1], device=i.device)
        assert self.samples is not None
        return keyed_keep(self.dropout_p, seed=self.seed, samples_B=self.samples, heads_N=heads, i=i, j=j)

    def visible(self, shape: torch.Size, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor | None:
        """Which scores (B, N, q, k) the mask_mod lets count; None for all.

        Raises:
            Refused: it does not return booleans.
        """
        if self.mask_mod is None:
            return None
        seen = self.mask_mod
        for axis in (3, 2, 1, 0):
            seen = torch.vmap(seen, in_dims=tuple(0 if a == axis else None for a in range(4)))
        rows = self.first_row + torch.arange(shape[0], device=i.device)
        heads = self.first_head + torch.arange(shape[1], device=i.device)
        name = getattr(self.mask_mod, "__name__", "function")
        try:
            result = seen(rows, heads, i, j)
        except (RuntimeError, ValueError) as error:  # a Python bool returned, an `if` on a tensor
            fit = f"it cannot be computed for many places at once ({str(error).splitlines()[0][:80]}); use tensor operations"
            raise refuse("mask_mod", name, fit) from error
        if result.dtype != torch.bool:
            fit = f"it must return a boolean for each (batch row, head, query, key), and returned {result.dtype}"
            raise refuse("mask_mod", name, fit)
        return result


@dataclass(frozen=True)
class Rules:
    """One layer's attention, by the names and with the meanings of `lss.attention`.

    `prefix` is one number for all documents, or one for each document, or (one document) for each row of the batch;
    `keep` holds each row's runs of tokens that are no padding; `sinks` (N,) may require a gradient.
    """

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    prefix: int | tuple[int, ...] = 0
    keep: tuple[tuple[Run, ...], ...] | None = None
    softcap: float = 0.0
    slopes: torch.Tensor | None = None
    mask_mod: MaskMod | None = None
    sinks: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    samples: torch.Tensor | None = None

    def features(self) -> dict[str, str]:
        """The features of `lss.config.support` that are on, each with its setting and value as a refusal names them."""
        active = {"causal": "causal=True"} if self.causal else {"not causal": "causal=False"}
        for name, value in (("window", self.window), ("prefix", self.prefix), ("softcap", self.softcap),
                            ("dropout_p", self.dropout_p)):  # fmt: skip
            if value:
                active[name] = f"{name}={value}"
        for name, value in (("attention_mask", self.keep), ("mask_mod", self.mask_mod), ("alibi_slopes", self.slopes),
                            ("sinks", self.sinks)):  # fmt: skip
            if value is not None:
                active[name] = name
        return active

    def scores(self) -> Scores | None:
        """What becomes of the scores; None where nothing does, which every kernel can compute."""
        if not (self.softcap or self.dropout_p or self.slopes is not None or self.mask_mod is not None):
            return None
        return Scores(self.softcap, self.slopes, self.mask_mod, self.dropout_p, self.seed or 0, self.samples)

    def masks(
        self, edges: tuple[int, ...], batch: int, k_edges: tuple[int, ...] | None = None
    ) -> tuple[tuple[slice, Mask], ...]:
        """The masks of the rows of a batch: (rows that share it, mask), neighbours with equal masks together."""
        lengths = [b - a for a, b in pairwise(edges)]
        documents = len(lengths)
        rows = []
        for row in range(batch):
            given = self.prefix
            if isinstance(given, int):
                prefixes = (given,) * documents if given else ()
            else:
                prefixes = given if documents > 1 else (given[row],)
            # a document shorter than its prefix is all prefix
            prefixes = tuple(min(p, length) for p, length in zip(prefixes, lengths, strict=False))
            keep = None if self.keep is None else self.keep[row]
            rows.append((prefixes, keep))
        groups, start = [], 0
        for (prefixes, keep), same in groupby(rows):
            stop = start + len(list(same))
            mask = make_mask(
                edges, causal=self.causal, window=self.window, k_edges=k_edges, prefixes=prefixes, keep=keep
            )
            groups.append((slice(start, stop), mask))
            start = stop
        return tuple(groups)


def keep_rows(attention_mask: torch.Tensor) -> tuple[tuple[Run, ...], ...] | None:
    """Each row's runs of tokens that are no padding, from a (B, S) mask of booleans or 0 and 1; None where all are kept."""
    if bool(attention_mask.all()):
        return None
    return tuple(runs_of(row != 0) for row in attention_mask)
