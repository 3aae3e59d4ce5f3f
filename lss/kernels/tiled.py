"""The reference kernel by tiles: every rule, any device, memory for one tile of scores instead of all.

Tiles that the mask empties are not computed: those outside the causal or windowed band by arithmetic, those that a
mask_mod empties by asking it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lss.kernels import reference
from lss.kernels.merge import lse_dtype, merge, no_keys_yet
from lss.kernels.reference import Window
from lss.kernels.rules import Scores

TILE = 256  # queries and keys of a tile: 8 heads' scores in float32 are 2 MiB, which caches hold


@dataclass(frozen=True)
class _Tile:
    rows: slice
    seen: slice
    window: Window | None
    places: tuple[int, int]


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
    """As `reference.forward`."""
    dtype, lse = lse_dtype(q_BTNH), no_keys_yet(q_BTNH)
    out = torch.zeros_like(q_BTNH, dtype=dtype)
    for t in tiles(q_BTNH, k_BSKH, causal, window, scores, places):
        # partial results stay in float32: rounding each to half precision would add up
        q, k, v = (x.to(dtype) for x in (q_BTNH[:, t.rows], k_BSKH[:, t.seen], v_BSKH[:, t.seen]))
        part = reference.forward(q, k, v, causal=False, scale=scale, window=t.window, scores=scores, places=t.places)
        out[:, t.rows], lse[:, :, t.rows] = merge(out[:, t.rows], lse[:, :, t.rows], *part)
    return out.to(q_BTNH.dtype), lse


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
    """As `reference.backward`."""
    dtype = lse_dtype(q_BTNH)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q_BTNH, k_BSKH, v_BSKH))
    for t in tiles(q_BTNH, k_BSKH, causal, window, scores, places):
        grads = reference.backward(
            dout_BTNH[:, t.rows], q_BTNH[:, t.rows], k_BSKH[:, t.seen], v_BSKH[:, t.seen], out_BTNH[:, t.rows],
            lse_BNT[:, :, t.rows], causal=False, scale=scale, window=t.window, scores=scores, places=t.places,
        )  # fmt: skip
        for whole, at, part in zip((dq, dk, dv), (t.rows, t.seen, t.seen), grads, strict=True):
            whole[:, at] += part
    return dq, dk, dv


def tiles(
    q: torch.Tensor, k: torch.Tensor, causal: bool, window: Window | None, scores: Scores | None, places: tuple[int, int]
) -> Iterator[_Tile]:
    """The tiles of the score matrix that hold any visible score."""
    Tq, Tk = q.shape[1], k.shape[1]
    left, right = window or ((Tk, 0) if causal else (Tk + Tq, Tk + Tq))
    for a in range(0, Tq, TILE):
        b = min(a + TILE, Tq)
        # of the keys that row i sees, the first is i + Tk - Tq - left and the last i + Tk - Tq + right
        first, end = max(0, a + Tk - Tq - left), min(Tk, b + Tk - Tq + right)
        for c in range(first, end, TILE):
            d = min(c + TILE, end)
            shift = (c - a) - (Tk - Tq) + (d - c) - (b - a)  # the tile's own bottom-right corner lies elsewhere
            lowest, highest = left + shift, right - shift
            masked = lowest < (d - c) - 1 or highest < (b - a) - 1
            tile = _Tile(slice(a, b), slice(c, d), (lowest, highest) if masked else None, (places[0] + a, places[1] + c))
            if _any_visible(q, tile, scores):
                yield tile


def _any_visible(q: torch.Tensor, tile: _Tile, scores: Scores | None) -> bool:
    if scores is None or scores.mask_mod is None:
        return True
    i, j = (
        first + torch.arange(run.stop - run.start, device=q.device)
        for first, run in zip(tile.places, (tile.rows, tile.seen), strict=True)
    )
    visible = scores.visible(torch.Size((q.shape[0], q.shape[2])), i, j)
    return visible is not None and bool(visible.any())
