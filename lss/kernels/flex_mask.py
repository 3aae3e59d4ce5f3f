"""Which blocks of 128 x 128 scores FlexAttention has to compute, and by which function it masks the rest.

Torch's own `create_block_mask` evaluates a mask as one matrix of queries by keys, 16 GiB for 131,072 tokens; here a
band is counted by arithmetic, and a mask_mod a few rows of blocks at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from lss.kernels.reference import Window
from lss.kernels.rules import MaskMod, Scores

BLOCK = 128
# Scores whose mask is evaluated at once: their places and what a mask_mod makes of them are int64, 256 MiB each.
CELLS = 1 << 25


@dataclass(frozen=True)
class _View:
    """The part of a score matrix that one call computes; `low` <= j - i <= `high` of its own rows i and columns j."""

    rows: int
    heads: int
    Tq: int
    Tk: int
    low: int
    high: int
    first_row: int
    first_head: int
    q_place: int
    k_place: int
    device: torch.device


def block_mask(
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    causal: bool,
    window: Window | None,
    scores: Scores | None,
    places: tuple[int, int],
) -> BlockMask | None:
    """The block mask of one call; None where everything is seen.

    Kept for the calls that follow (other layers, other groups of heads, backward) as long as what the mask_mod computes
    from is known and unchanged: tensors (by identity and version), numbers, and functions of such. A mask_mod that reads
    anything else is evaluated anew in each call.
    """
    (B, Tq, N, _), Tk = q_BTNH.shape, k_BSKH.shape[1]
    left, right = window or ((Tk, 0) if causal else (Tk + Tq, Tk + Tq))
    mask_mod = None if scores is None else scores.mask_mod
    low, high = max(Tk - Tq - left, 1 - Tq), min(Tk - Tq + right, Tk - 1)
    if mask_mod is None:
        if (low, high) == (1 - Tq, Tk - 1):
            return None
        return _known_blocks(_View(1, 1, Tq, Tk, low, high, 0, 0, 0, 0, q_BTNH.device), None, None)
    assert scores is not None
    state = _state_of(mask_mod)
    by_row, by_head = (_differs if state is not None else _differs.__wrapped__)(mask_mod, state, q_BTNH.device)
    view = _View(
        B if by_row else 1, N if by_head else 1, Tq, Tk, low, high, scores.first_row if by_row else 0,
        scores.first_head if by_head else 0, *places, q_BTNH.device,
    )  # fmt: skip
    return (_known_blocks if state is not None else _known_blocks.__wrapped__)(view, mask_mod, state)


@lru_cache(maxsize=4096)
def scalar(role: str, value: int | float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A number as a tensor: what compiled code reads from one may change without compiling again.

    Numbers of different roles are different tensors even where they are equal, since torch.compile guards which of its
    tensors are one and the same, and would compile again (torch 2.13: fail, where one of them is then missing).
    """
    return torch.full((), value, dtype=dtype, device=device)


@lru_cache(maxsize=16)
def _known_blocks(view: _View, mask_mod: MaskMod | None, state: Hashable) -> BlockMask:
    """The block mask; `state` is what the mask_mod's values follow from, and part of the key only."""
    counts = _counts(view, mask_mod)
    whole = counts == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_ordered((counts > 0) & ~whole), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=_mask_of(view, mask_mod),
        seq_lengths=(view.Tq, view.Tk),
    )  # fmt: skip


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many blocks each row of blocks has, their columns first in rising order), of int32."""
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), columns.to(torch.int32).contiguous()


def _counts(view: _View, mask_mod: MaskMod | None) -> torch.Tensor:
    """How many scores of each block are seen; (rows, heads, blocks of queries, blocks of keys)."""
    n_q, n_k = (-(-length // BLOCK) for length in (view.Tq, view.Tk))
    counts = torch.zeros(view.rows, view.heads, n_q, n_k, dtype=torch.int32, device=view.device)
    wide = max(1, CELLS // (view.rows * view.heads * BLOCK * n_k * BLOCK))
    for first in range(0, n_q, wide):
        a, b = first * BLOCK, min((first + wide) * BLOCK, view.Tq)
        start, stop = max(0, a + view.low) // BLOCK, -(-min(view.Tk, b + view.high) // BLOCK)
        if start < stop:
            c, d = start * BLOCK, min(stop * BLOCK, view.Tk)
            counts[:, :, first : first + wide, start:stop] = _blocks_of(_seen(view, mask_mod, (a, b), (c, d)))
    return counts


def _seen(view: _View, mask_mod: MaskMod | None, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
    """Which of these scores are seen; (rows or 1, heads or 1, queries, keys)."""
    i, j = (torch.arange(*run, device=view.device) for run in (rows, columns))
    distance = j.to(torch.int32) - i.to(torch.int32)[:, None]
    seen = ((distance >= view.low) & (distance <= view.high))[None, None]
    if mask_mod is None:
        return seen
    scores = Scores(mask_mod=mask_mod, first_row=view.first_row, first_head=view.first_head)
    visible = scores.visible(torch.Size((view.rows, view.heads)), i + view.q_place, j + view.k_place)
    assert visible is not None
    return seen & visible


def _blocks_of(seen: torch.Tensor) -> torch.Tensor:
    """How many of the scores are seen in each block; the last blocks may be smaller."""
    Tq, Tk = seen.shape[-2:]
    padded = torch.nn.functional.pad(seen, (0, -Tk % BLOCK, 0, -Tq % BLOCK))
    in_rows = padded.unflatten(-1, (-1, BLOCK)).sum(-1, dtype=torch.int32)
    return in_rows.unflatten(-2, (-1, BLOCK)).sum(-2, dtype=torch.int32)


def _mask_of(view: _View, mask_mod: MaskMod | None) -> MaskMod:
    """The mask as FlexAttention calls it: its numbers of rows, heads, queries and keys count from this call's first."""
    low, high = (scalar(role, getattr(view, role), view.device, torch.int32) for role in ("low", "high"))

    def in_band(row, head, i, j):
        return (j - i >= low) & (j - i <= high)

    if mask_mod is None:
        return in_band
    # int64, as in the plain kernels, since a mask_mod may do arithmetic of its own
    roles = ("first_row", "first_head", "q_place", "k_place")
    first_row, first_head, q_place, k_place = (scalar(r, getattr(view, r), view.device, torch.int64) for r in roles)

    def of_places(row, head, i, j):
        return in_band(row, head, i, j) & mask_mod(row + first_row, head + first_head, i + q_place, j + k_place)

    return of_places


# -- what a mask_mod depends on ----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _differs(mask_mod: MaskMod, state: Hashable, device: torch.device) -> tuple[bool, bool]:
    """Whether a mask_mod looks at the batch row, and whether at the head."""
    one = torch.zeros(1, dtype=torch.int64, device=device)
    # of (rows, heads, queries, keys), vmap returns as views of stride 0 those dimensions that the result lacks
    visible = Scores(mask_mod=mask_mod).visible(torch.Size((2, 2)), one, one)
    assert visible is not None
    return visible.stride(0) != 0, visible.stride(1) != 0


class _Same:
    """An object as a key: equal only to itself, and alive as long as the key is."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


# modules whose functions compute from their arguments alone
_STATELESS = ("torch", "math", "builtins", "operator")


class _Unknown(Exception):
    """A value that a mask_mod reads could change without a trace."""


def _state_of(mask_mod: Callable) -> Hashable:
    """What a function computes from, as a key that changes with it; None where that cannot be told."""
    try:
        return _state(mask_mod, 8)
    except _Unknown:
        return None


def _state(value: Any, depth: int) -> Hashable:
    if depth == 0:
        raise _Unknown
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, torch.Tensor):
        if value.is_inference():
            raise _Unknown
        return _Same(value), value._version
    if isinstance(value, tuple | list):
        return tuple(_state(entry, depth - 1) for entry in value)
    if isinstance(value, partial):
        return tuple(_state(entry, depth - 1) for entry in (value.func, value.args, list(value.keywords.items())))
    if isinstance(value, FunctionType):
        return _state_of_function(value, depth - 1)
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
    if isinstance(value, ModuleType | BuiltinFunctionType) and name.split(".")[0] in _STATELESS:
        return _Same(value)
    raise _Unknown


def _state_of_function(function: FunctionType, depth: int) -> Hashable:
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as error:  # a variable that has no value yet
        raise _Unknown from error
    if (function.__module__ or "").split(".")[0] == "torch":
        return _Same(function), *(_state(cell, depth) for cell in cells)
    known = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    read = (cells, function.__defaults__, list((function.__kwdefaults__ or {}).values()), list(known.values()))
    return _Same(function.__code__), *(_state(values, depth) for values in read)


def _names(code: CodeType) -> set[str]:
    """The global names that a function, or one written inside it, may read."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))
