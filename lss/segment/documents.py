"""Packed documents: where they begin and end, what each token sees, and how much work that is.

A packed sequence holds documents one behind another, given by `cu_seqlens`: document d is [edges[d], edges[d+1]), and
no token sees another document's. Index arithmetic only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch

from lss.config.errors import refuse

# Chunks a rank under the balanced order: from 8 on, until no rank has more than this much above the mean.
FEWEST_CHUNKS, MOST_CHUNKS, GOOD_BALANCE = 8, 64, 1.02
# Shorter chunks cost a kernel launch for little work.
SHORTEST_CHUNK = 128


def document_edges(cu_seqlens: torch.Tensor | Sequence[int], seq_len: int) -> tuple[int, ...]:
    """The edges of the documents, 0 first and S last, empty documents left out.

    Raises:
        Refused: not whole numbers in one dimension, not rising, or not from 0 to S.
    """
    tensor = torch.as_tensor(cu_seqlens)
    if tensor.dim() != 1 or tensor.numel() < 2 or tensor.dtype not in (torch.int32, torch.int64):
        found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise refuse("cu_seqlens", found, "give int32 in one dimension: 0, the end of each document, last the length S")
    edges = tensor.tolist()
    if edges[0] != 0 or edges[-1] != seq_len:
        raise refuse("cu_seqlens", f"{edges[0]} ... {edges[-1]}", f"it must begin with 0 and end with the length, {seq_len}")
    falls = [i for i, (a, b) in enumerate(pairwise(edges), 1) if a > b]
    if falls:
        shown = f"{edges[falls[0] - 1]}, {edges[falls[0]]}"
        raise refuse("cu_seqlens", shown, f"edges must not fall, as they do at place {falls[0]}")
    return tuple(dict.fromkeys(edges))


def positions_in_document(edges: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
    """Each token's place in its own document; padding counts on from the last one."""
    first = torch.tensor(edges[:-1])
    return positions - first[torch.searchsorted(first, positions, right=True) - 1]


def area_before(edges: Sequence[int], places: np.ndarray, causal: bool, window: int | None) -> np.ndarray:
    """Scores to compute in the rows before each place: the running sum of the number of keys that a token sees.

    Causal, a token at place i of its document sees min(i + 1, window) keys; not causal, those within window - 1 on both
    sides, or its whole document.
    """
    first, end = np.asarray(edges[:-1], np.int64), np.asarray(edges[1:], np.int64)
    length = end - first
    whole = np.concatenate(([0], np.cumsum(_rows_area(length, length, causal, window))))
    d = np.clip(np.searchsorted(first, places, side="right") - 1, 0, len(first) - 1)
    into = np.clip(places - first[d], 0, length[d])
    return whole[d] + _rows_area(into, length[d], causal, window)


def scores_seen(edges: Sequence[int], causal: bool, windows: Sequence[int], layers: Iterable[int]) -> int:
    """Visible scores of one head in these layers, whose windows (0: none) are taken in turn; no windows: none at all."""
    end = np.array([edges[-1]], np.int64)
    by_layer = [windows[layer % len(windows)] or None if windows else None for layer in layers]
    return sum(int(area_before(edges, end, causal, window)[0]) for window in by_layer)


def _rows_area(rows: np.ndarray, length: np.ndarray, causal: bool, window: int | None) -> np.ndarray:
    """Keys seen by the first `rows` tokens of documents of this length, summed."""
    w = length if window is None else np.minimum(window, length)
    past = _ramp(rows, w)  # sum of min(i + 1, w): keys up to and with the token itself
    if causal:
        return past
    # keys behind it: the mirror image, min(length - i, w) - 1
    return past + _ramp(length, w) - _ramp(length - rows, w) - rows


def _ramp(n: np.ndarray, w: np.ndarray) -> np.ndarray:
    """sum over i < n of min(i + 1, w)."""
    rising = np.minimum(n, w)
    return rising * (rising + 1) // 2 + (n - rising) * w


def balanced_chunks(
    seq_len: int, cp: int, edges: Sequence[int], causal: bool, window: int | None
) -> tuple[tuple[int, ...], ...]:
    """Which chunks each rank takes so that all have nearly the same scores to compute and equally many tokens.

    The sequence is cut into 8 or more equal chunks a rank; the heaviest goes first, to the rank with least work that has
    room. More chunks are tried until the worst rank is within 2 % of the mean or chunks get too short.
    """
    best: tuple[float, tuple[tuple[int, ...], ...]] | None = None
    per_rank = FEWEST_CHUNKS
    while best is None or (per_rank <= MOST_CHUNKS and seq_len // (per_rank * cp) >= SHORTEST_CHUNK):
        count = per_rank * cp
        chunk = -(-seq_len // count)
        borders = np.minimum(np.arange(count + 1, dtype=np.int64) * chunk, seq_len)
        areas = np.diff(area_before(edges, borders, causal, window))
        shares = _share_out(areas, cp, per_rank)
        loads = [int(areas[list(share)].sum()) for share in shares]
        worst = max(loads) * cp / max(sum(loads), 1)
        if best is None or worst < best[0]:
            best = (worst, shares)
        if best[0] <= GOOD_BALANCE:
            break
        per_rank *= 2
    return best[1]


def _share_out(areas: np.ndarray, cp: int, per_rank: int) -> tuple[tuple[int, ...], ...]:
    shares: list[list[int]] = [[] for _ in range(cp)]
    ranks = [(0, rank) for rank in range(cp)]
    # a stable sort, so that every rank comes to the same shares
    for chunk in np.argsort(-areas, kind="stable").tolist():
        load, rank = heapq.heappop(ranks)
        shares[rank].append(chunk)
        if len(shares[rank]) < per_rank:
            heapq.heappush(ranks, (load + int(areas[chunk]), rank))
    return tuple(tuple(sorted(share)) for share in shares)
