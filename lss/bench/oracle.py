"""The truth to hold a step against: exact causal attention and its gradients in float64, at sampled places.

    out_i = sum_j P_ij v_j,   P_ij = exp(scale q_i . k_j - lse_i),  j <= i
    dS_ij = P_ij (dout_i . v_j - dout_i . out_i)
    dq_i = scale sum_j dS_ij k_j      dk_j = scale sum_i dS_ij q_i      dv_j = sum_i P_ij dout_i

A query's row needs its own scores only and is computed for all heads. A key's gradient needs every later query's lse,
so it costs a whole forward pass in float64; it is computed for as many key heads as a budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NAMES = ("out", "dq", "dk", "dv")
SAMPLES = 64  # queries, and as many keys
_TILE_BYTES = 1 << 30  # of one tile of scores on a GPU; a sixteenth of it on a CPU
_SCORES = 1 << 36  # computed for keys' gradients at most on a GPU; a 1024th of it on a CPU


@dataclass(frozen=True)
class Truth:
    """Exact values at sampled places.

    Attributes:
        queries: (M,) global positions, with `out` and `dq` (B, M, N, H).
        keys: (M,) global positions, with `dk` and `dv` (B, M, heads, H) of the key heads `key_heads`; None unchecked.
    """

    queries: torch.Tensor
    out: torch.Tensor
    dq: torch.Tensor
    keys: torch.Tensor
    key_heads: list[int] | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None


@torch.no_grad()
def exact(q, k, v, dout, *, keys_too: bool) -> Truth:
    """Compute the truth for whole tensors q, dout (B, S, N, H) and k, v (B, S, K, H), the same on every rank.

    Memory: one key head's k, v, q and dout in float64, and a tile of scores.
    """
    S, device = q.shape[1], q.device
    queries, keys = sampled_places(S, 0).to(device), sampled_places(S, 1).to(device)
    out, dq = _rows(q, k, v, dout, queries)
    if not keys_too:
        return Truth(queries, out, dq, keys, None, None, None)
    heads = _affordable_heads(S, q.shape[2] // k.shape[2], k.shape[2], device)
    parts = [_columns(_head(q, k, v, dout, head), keys) for head in heads]
    dk, dv = (torch.stack([part[i] for part in parts], dim=2) for i in range(2))
    return Truth(queries, out, dq, keys, heads, dk, dv)


def sampled_places(seq_len: int, seed: int) -> torch.Tensor:
    """Distinct places, the first and the last among them, sorted; all of them where there are few."""
    generator = torch.Generator().manual_seed(seed)
    # random places may repeat at great lengths without harm; a permutation of millions would be waste
    drawn = torch.randint(seq_len, (SAMPLES - 2,), generator=generator)
    return torch.unique(torch.cat((torch.tensor([0, seq_len - 1]), drawn)))


def _affordable_heads(S: int, share: int, K: int, device: torch.device) -> list[int]:
    budget = _SCORES if device.type == "cuda" else _SCORES >> 10
    count = max(1, min(K, budget // (S * S * share)))
    # evenly spread, the last one always: it lies in the last head chunk
    return sorted({K - 1 - K * i // count for i in range(count)})


def _head(q, k, v, dout, head: int) -> tuple[torch.Tensor, ...]:
    """One key head and its queries, in float64: (B, share, S, H) and (B, 1, S, H)."""
    share = q.shape[2] // k.shape[2]
    mine = slice(head * share, (head + 1) * share)
    queries = (x[:, :, mine].detach().transpose(1, 2).double() for x in (q, dout))
    keys = (x[:, :, head : head + 1].detach().transpose(1, 2).double() for x in (k, v))
    q64, dout64 = queries
    k64, v64 = keys
    return q64, k64, v64, dout64


def _tile(q, k, v, dout, places: torch.Tensor):
    """P, out, dS (times scale) of some queries of one key head, given at their places."""
    scale = q.shape[-1] ** -0.5
    scores = scale * (q @ k.transpose(-1, -2))
    scores.masked_fill_(torch.arange(k.shape[2], device=k.device) > places[:, None], -math.inf)
    P = scores.softmax(-1)
    del scores
    out = P @ v
    dS = dout @ v.transpose(-1, -2)
    dS -= (dout * out).sum(-1, keepdim=True)
    return P, out, dS.mul_(P).mul_(scale)


def _rows(q, k, v, dout, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outs, dqs = [], []
    for head in range(k.shape[2]):
        q64, k64, v64, dout64 = _head(q[:, places], k, v, dout[:, places], head)
        _, out, dS = _tile(q64, k64, v64, dout64, places)
        outs.append(out.transpose(1, 2))
        dqs.append((dS @ k64).transpose(1, 2))
    return torch.cat(outs, dim=2), torch.cat(dqs, dim=2)


def _columns(head: tuple[torch.Tensor, ...], places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv (B, M, H) of one key head at these places, by tiles of queries."""
    q, k, v, dout = head
    B, share, S, H = q.shape
    budget = _TILE_BYTES if q.device.type == "cuda" else _TILE_BYTES >> 4
    rows = max(1, budget // (8 * B * share * S))
    dk = q.new_zeros(B, len(places), H)
    dv = torch.zeros_like(dk)
    for start in range(0, S, rows):
        t = slice(start, min(start + rows, S))
        seen = slice(0, t.stop)
        P, _, dS = _tile(q[:, :, t], k[:, :, seen], v[:, :, seen], dout[:, :, t], torch.arange(S, device=q.device)[t])
        here = places < t.stop
        columns = places[here]
        dk[:, here] += torch.einsum("bntm,bnth->bmh", dS[..., columns], q[:, :, t])
        dv[:, here] += torch.einsum("bntm,bnth->bmh", P[..., columns], dout[:, :, t])
    return dk, dv


def squared_errors(truth: Truth, found: tuple[torch.Tensor, ...], places: torch.Tensor) -> list[float]:
    """[||found - exact||^2, ||exact||^2] of out, dq, dk and dv, one after another, over the samples among these tokens.

    Sums, so that those of several ranks add up to the whole; 0 and 0 for what is not checked.

    Args:
        found: (out, dq, dk, dv) of this rank's tokens.
        places: (T,) their global positions.
    """
    sums: list[float] = []
    heads = slice(None) if truth.key_heads is None else truth.key_heads
    for name, tensor in zip(NAMES, found, strict=True):
        expected, at = getattr(truth, name), truth.queries if name in ("out", "dq") else truth.keys
        if expected is None:
            sums += [0.0, 0.0]
            continue
        local, sample = (places.to(at.device)[:, None] == at).nonzero(as_tuple=True)
        mine = tensor.detach()[:, local].double()
        mine = mine if name in ("out", "dq") else mine[:, :, heads]
        wanted = expected[:, sample]
        if mine.shape != wanted.shape:
            raise ValueError(f"{name} of these tokens has shape {tuple(tensor.shape)}, which does not fit")
        sums += [float((mine - wanted).square().sum()), float(wanted.square().sum())]
    return sums


def relative_errors(sums: list[float], names: Sequence[str] = NAMES) -> dict[str, float]:
    """||found - exact|| / max(||exact||, 1e-6 x the norm of all) by tensor; NaN where anything is."""
    floor = 1e-6 * math.sqrt(sum(sums[1::2]))
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    # no square root of a sum that overflowed or is NaN is a number, and neither passes any bound
    return {name: math.sqrt(off) / max(math.sqrt(norm), floor, 1e-300) for name, off, norm in pairs}
