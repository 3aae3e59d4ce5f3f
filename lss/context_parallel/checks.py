"""Refusing what attention is given and would not compute."""

from __future__ import annotations

import math

import torch

from lss.config.errors import refuse
from lss.kernels import Rules
from lss.segment import Segment


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse tensors that do not fit together; their lengths are a matter of the segments."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise refuse(name, tuple(x.shape), "give four dimensions (batch, tokens, heads, head size)")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise refuse(name, x.dtype, f"q, k and v must have one floating point dtype; q has {q.dtype}")
    if k.shape != v.shape:
        raise refuse("v", tuple(v.shape), f"k and v must have one shape; k has {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise refuse("k", tuple(k.shape), f"batch and head size must be those of q, {tuple(q.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise refuse("q", tuple(q.shape), f"its heads must be a multiple of the {k.shape[2]} key heads")


def check_rules(
    rules: Rules, q: torch.Tensor, segment: Segment, kv_segment: Segment | None, attention_mask: torch.Tensor | None
) -> None:
    """Refuse rules whose values do not fit by themselves, or not these tensors and segments."""
    window, p, seed = rules.window, rules.dropout_p, rules.seed
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise refuse("window", window, "give the number of keys that a query sees, 1 or more, its own included")
    if not 0.0 <= p < 1.0:
        raise refuse("dropout_p", p, "give a probability, 0 or more and less than 1")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise refuse("seed", seed, "give a whole number, lss.kernels.dropout.fold(seed, step, layer) for one")
    if p and seed is None:
        raise refuse("seed", seed, f"dropout_p={p} is keyed by it; give a number that folds run, step and layer")
    if seed is not None and not p:
        raise refuse("seed", seed, "it keys attention dropout, and dropout_p is 0; use None")
    if not (rules.softcap >= 0 and math.isfinite(rules.softcap)):
        raise refuse("softcap", rules.softcap, "give a bound on the scores above 0, or 0 for none")
    for name, x in (("alibi_slopes", rules.slopes), ("sinks", rules.sinks)):
        if x is not None and tuple(x.shape) != (q.shape[2],):
            raise refuse(name, tuple(x.shape), f"give one number for each of the {q.shape[2]} query heads")
    if rules.slopes is not None and rules.slopes.requires_grad:
        raise refuse("alibi_slopes", "a tensor that requires a gradient", "slopes are fixed numbers; detach them")
    if rules.samples is not None and tuple(rules.samples.shape) != (q.shape[0],):
        raise refuse("samples", tuple(rules.samples.shape), f"give one number for each of the {q.shape[0]} rows")
    if attention_mask is not None:
        expected = (q.shape[0], (kv_segment or segment).seq_len)
        if tuple(attention_mask.shape) != expected:
            fit = f"give one value a token of the whole batch, {expected}"
            raise refuse("attention_mask", tuple(attention_mask.shape), fit)
    _check_prefix(rules, q.shape[0], segment)


def _check_prefix(rules: Rules, batch: int, segment: Segment) -> None:
    given = rules.prefix
    if isinstance(given, bool) or not isinstance(given, int | tuple):
        raise refuse("prefix", given, "give a whole number of tokens, 0 or more")
    numbers = (given,) if isinstance(given, int) else given
    if any(not isinstance(n, int) or n < 0 for n in numbers):
        raise refuse("prefix", given, "give whole numbers of tokens, 0 or more")
    documents = len(segment.documents) - 1
    expected = documents if documents > 1 else batch
    if not isinstance(given, int) and len(given) != expected:
        what = "documents" if documents > 1 else "rows"
        raise refuse("prefix", f"{len(given)} numbers", f"give one number, or one for each of the {expected} {what}")
