"""Merging attention over disjoint sets of keys by their log-sum-exp."""

from __future__ import annotations

import torch


def lse_dtype(q: torch.Tensor) -> torch.dtype:
    """float64 for float64 queries, float32 for all others."""
    return torch.promote_types(q.dtype, torch.float32)


def no_keys_yet(q_BTNH: torch.Tensor) -> torch.Tensor:
    """An lse of shape (B, N, T) for which no key has been seen: -inf everywhere."""
    B, T, N, _ = q_BTNH.shape
    return torch.full((B, N, T), float("-inf"), dtype=lse_dtype(q_BTNH), device=q_BTNH.device)


def empty_lse(q_BTNH: torch.Tensor) -> torch.Tensor:
    """Room for an lse of shape (B, N, T)."""
    B, T, N, _ = q_BTNH.shape
    return torch.empty((B, N, T), dtype=lse_dtype(q_BTNH), device=q_BTNH.device)


def merge(
    out_BTNH: torch.Tensor, lse_BNT: torch.Tensor, other_BTNH: torch.Tensor, other_lse_BNT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two key sets, from attention over each.

    lse = logaddexp(lse_1, lse_2);  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.

    A query that sees no key of a set has lse -inf there and takes the other's result; one that sees none at all keeps
    out 0 and lse -inf. Computed in float32 for half precision inputs, in the inputs' dtype otherwise; `out` is
    returned in that dtype and lse in float32 (float64 for float64).
    """
    lse = torch.logaddexp(lse_BNT, other_lse_BNT)
    anchor = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)  # -inf - -inf would be NaN
    dtype = lse.dtype
    weight = (lse_BNT - anchor).exp().transpose(1, 2).unsqueeze(-1)
    other_weight = (other_lse_BNT - anchor).exp().transpose(1, 2).unsqueeze(-1)
    return out_BTNH.to(dtype) * weight + other_BTNH.to(dtype) * other_weight, lse


def merge_all(outs_RBTNH: torch.Tensor, lses_RBNT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of R key sets, from attention over each: `merge` of all at once.

    lse = logsumexp over r of lse_r;  out = sum over r of exp(lse_r - lse) out_r, in the dtype that the lses have.
    """
    lse = lses_RBNT.logsumexp(0)
    anchor = lse.masked_fill(torch.isneginf(lse), 0.0)
    weights = (lses_RBNT - anchor).exp().transpose(2, 3).unsqueeze(-1)
    return (outs_RBTNH.to(lse.dtype) * weights).sum(0), lse
