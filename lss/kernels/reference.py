"""Attention in plain torch: the oracle that every other kernel is held to.

P = softmax(scale Q K^T + mask), out = P V; backward by the formulas of FlashAttention (Dao et al. 2022) from the
saved log-sum-exp, which may be that of a larger set of keys than this call's:

    P = exp(scale Q K^T - lse);  dV = P^T dO;  dP = dO V^T;  D = rowsum(dO * O)
    dS = P * (dP - D);  dQ = scale dS K;  dK = scale dS^T Q

Any device and float dtype; half precision is computed in float32. Holds a (B, N, Tq, Tk) matrix.
"""

from __future__ import annotations

import torch


def forward(
    q_BTNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B,T,N,H) in q's dtype, lse (B,N,T) float32 or float64); causal is bottom-right aligned, needs S >= T."""
    q, k, v = _grouped(q_BTNH, k_BSKH, v_BSKH)
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq (B,T,N,H), dk (B,S,K,H), dv (B,S,K,H)), float32 for half precision inputs."""
    q, k, v = _grouped(q_BTNH, k_BSKH, v_BSKH)
    groups = q.shape[2]
    dout, out = (_group_queries(x, k.shape[1]).to(q.dtype) for x in (dout_BTNH, out_BTNH))
    p = (_scores(q, k, causal, scale) - lse_BNT.unflatten(1, (-1, groups)).unsqueeze(-1)).exp()
    dv = (p.transpose(-1, -2) @ dout).sum(2)
    delta = (dout * out).sum(-1, keepdim=True)
    ds = p * (dout @ v.transpose(-1, -2) - delta) * scale
    dq = ds @ k
    dk = (ds.transpose(-1, -2) @ q).sum(2)
    return _ungroup(dq), dk.transpose(1, 2), dv.transpose(1, 2)


def _group_queries(x_BTNH: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """(B,T,N,H) -> (B,K,N/K,T,H): the queries that share a key head stand together."""
    return x_BTNH.transpose(1, 2).unflatten(1, (n_kv_heads, -1))


def _ungroup(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1, 2).transpose(1, 2)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.transpose(1, 2).unsqueeze(2).to(dtype) for x in (k, v))
    return _group_queries(q, k.shape[2]).to(dtype), keys, values


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        Tq, Tk = scores.shape[-2:]
        hidden = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(1 + Tk - Tq)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores
