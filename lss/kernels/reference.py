"""Attention in plain torch: the oracle that every other kernel is held to, and the one that knows every rule.

P = softmax(scale Q K^T + mask), out = P V; backward by the formulas of FlashAttention (Dao et al. 2022) from the
saved log-sum-exp, which may be that of a larger set of keys than this call's:

    P = exp(scale Q K^T - lse);  dV = P^T dO;  dP = dO V^T;  D = rowsum(dO * O)
    dS = P * (dP - D);  dQ = scale dS K;  dK = scale dS^T Q

with the scores changed, and P dropped out of, as `lss.kernels.rules` says. Any device and float dtype; half precision
is computed in float32. Holds a (B, N, Tq, Tk) matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lss.kernels.rules import Scores

Window = tuple[int, int]  # (left, right), see `lss.segment.Block`


def forward(
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    window: Window | None = None,
    scores: Scores | None = None,
    places: tuple[int, int] = (0, 0),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B,T,N,H) in q's dtype, lse (B,N,T) float32 or float64); masks bottom-right.

    `places` are those of the first query and the first key. A query that sees nothing has out 0 and lse -inf.
    """
    q, k, v = _grouped(q_BTNH, k_BSKH, v_BSKH)
    matrix = _matrix(q, k, causal, scale, window, scores, places)
    lse = matrix.scores.logsumexp(-1)
    p = (matrix.scores - _finite(lse).unsqueeze(-1)).exp()
    out = (p if matrix.kept is None else p * matrix.kept) @ v
    return _ungroup(out).to(q_BTNH.dtype), lse.flatten(1, 2)


def backward(
    dout_BTNH: torch.Tensor,
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    out_BTNH: torch.Tensor,
    lse_BNT: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    window: Window | None = None,
    scores: Scores | None = None,
    places: tuple[int, int] = (0, 0),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq (B,T,N,H), dk (B,S,K,H), dv (B,S,K,H)), float32 for half precision inputs."""
    q, k, v = _grouped(q_BTNH, k_BSKH, v_BSKH)
    groups = q.shape[2]
    dout, out = (_group_queries(x, k.shape[1]).to(q.dtype) for x in (dout_BTNH, out_BTNH))
    matrix = _matrix(q, k, causal, scale, window, scores, places)
    p = (matrix.scores - _finite(lse_BNT.unflatten(1, (-1, groups))).unsqueeze(-1)).exp()
    dv = ((p if matrix.kept is None else p * matrix.kept).transpose(-1, -2) @ dout).sum(2)
    delta = (dout * out).sum(-1, keepdim=True)
    dp = dout @ v.transpose(-1, -2)
    ds = p * ((dp if matrix.kept is None else dp * matrix.kept) - delta) * scale
    if matrix.slope is not None:
        ds = ds * matrix.slope
    dq = ds @ k
    dk = (ds.transpose(-1, -2) @ q).sum(2)
    return _ungroup(dq), dk.transpose(1, 2), dv.transpose(1, 2)


def band(Tq: int, Tk: int, left: int, right: int, device: torch.device) -> torch.Tensor:
    """Which keys each query sees, (Tq, Tk): those with -left <= (j - i) - (Tk - Tq) <= right."""
    visible = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    return visible.triu(Tk - Tq - left).tril(Tk - Tq + right)


class _Matrix(NamedTuple):
    """All of shape (B, K, N/K, Tq, Tk): scores (-inf where masked), P's dropout factor, and soft-capping's derivative."""

    scores: torch.Tensor
    kept: torch.Tensor | None
    slope: torch.Tensor | None


def _matrix(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    scale: float,
    window: Window | None,
    rules: Scores | None,
    places: tuple[int, int],
) -> _Matrix:
    s = q @ k.transpose(-1, -2) * scale
    Tq, Tk = s.shape[-2:]
    kept, slope = None, None
    if rules is not None:
        flat = s.flatten(1, 2).shape
        i, j = (first + torch.arange(n, device=q.device) for first, n in zip(places, (Tq, Tk), strict=True))
        if rules.softcap:
            tanh = (s / rules.softcap).tanh()
            s, slope = rules.softcap * tanh, 1 - tanh * tanh
        if rules.slopes is not None:
            distance = (i[:, None] - j[None, :]).abs().to(s.dtype)
            s = s - rules.slopes.to(s).view(s.shape[1:3])[:, :, None, None] * distance
        visible, keep = rules.visible(flat, i, j), rules.keep(flat, i, j)
        if visible is not None:
            s = s.masked_fill(~visible.view_as(s), float("-inf"))
        if keep is not None:
            kept = keep.view_as(s).to(s.dtype) / (1.0 - rules.dropout_p)
    if window is not None or causal:
        left, right = window or (Tk, 0)
        s = s.masked_fill(~band(Tq, Tk, left, right, q.device), float("-inf"))
    return _Matrix(s, kept, slope)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """lse with 0 for -inf, whose difference with a masked score would be NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _group_queries(x_BTNH: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """(B,T,N,H) -> (B,K,N/K,T,H): the queries that share a key head stand together."""
    return x_BTNH.transpose(1, 2).unflatten(1, (n_kv_heads, -1))


def _ungroup(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1, 2).transpose(1, 2)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.transpose(1, 2).unsqueeze(2).to(dtype) for x in (k, v))
    return _group_queries(q, k.shape[2]).to(dtype), keys, values
