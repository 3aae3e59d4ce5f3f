"""Merging attention over disjoint sets of keys by their log-sum-exp."""

from __future__ import annotations

import torch


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
