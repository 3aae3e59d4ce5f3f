"""What a layer's mask is, read from the mask function that the model composed, without building the mask.

transformers describes masks as functions of (row, head, query, key) composed from a few known ones. The same masks over
a cut sequence are rules of `lss.attention`: the functions are recognised by their code, and one that is not known is
refused. Padding and documents are no matter of the function: they come with the whole batch, before the cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch

from lss.config.errors import refuse


@dataclass(frozen=True)
class Pattern:
    """A layer's mask by place, as `lss.attention` has it: `window` is None, or w for 0 <= i - j < w (or |i - j| < w).

    `packed`: where positions break, the model's own mask begins a new document.
    """

    causal: bool
    window: int | None = None
    packed: bool = False


def mask_pattern(*_: Any, mask_function: Callable, **__: Any) -> Pattern:
    """The mask builder registered for transformers: returns what the mask is instead of the S x S mask.

    Raises:
        Refused: a mask function that is not composed from known ones.
    """
    causal, window, packed = False, None, False
    for part in _parts(mask_function):
        packed |= _is(part, _codes()["packed"])
        is_causal, size = _read(part)
        causal |= is_causal
        if size is not None:
            window = size if window is None else min(window, size)
    if window is not None and not causal and any(_is(p, _codes()["one-sided"]) for p in _parts(mask_function)):
        fit = "without a causal mask only windows to both sides are supported"
        raise refuse("attention mask", f"a window of {window} on the past alone", fit)
    return Pattern(causal, window, packed)


def _codes() -> dict[str, CodeType]:
    """The code of each known mask function."""
    from transformers import masking_utils as made

    anything, ids = made.causal_mask_function, torch.zeros(1, 1, dtype=torch.int64)
    return {
        "both": made.and_masks(anything).__code__,
        "by position": made.remap_positions_for_packed_sequence(anything, ids).__code__
        if hasattr(made, "remap_positions_for_packed_sequence") else made.and_masks(anything).__code__,
        "causal": made.causal_mask_function.__code__,
        "all": made.bidirectional_mask_function.__code__,
        "one-sided": made.sliding_window_overlay(1).__code__,
        "two-sided": made.sliding_window_bidirectional_overlay(1).__code__,
        "packed": made.packed_sequence_mask_function(ids).__code__,
    }  # fmt: skip


def _is(function: Callable, code: CodeType) -> bool:
    return getattr(function, "__code__", None) is code


def _parts(function: Callable) -> Iterator[Callable]:
    """The functions whose intersection this one is."""
    codes = _codes()
    inside = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    if _is(function, codes["both"]):
        for part in inside["mask_functions"]:
            yield from _parts(part)
    elif _is(function, codes["by position"]):
        # the places inside of documents: a window reaches as far by them as by those of the sequence
        yield from _parts(inside["mask_function"])
    else:
        yield function


def _read(part: Callable) -> tuple[bool, int | None]:
    """(causal, window) of one known function."""
    codes = _codes()
    if _is(part, codes["causal"]):
        return True, None
    # documents are told by the whole batch's positions; here, the jumps of a cut sequence look like documents
    if _is(part, codes["all"]) or _is(part, codes["packed"]):
        return False, None
    if _is(part, codes["one-sided"]):
        return False, inspect.getclosurevars(part).nonlocals["sliding_window"]
    if _is(part, codes["two-sided"]):
        return False, inspect.getclosurevars(part).nonlocals["sliding_window"] + 1  # distances up to it, itself included
    name = getattr(part, "__qualname__", repr(part)).split(".")[0]
    fit = "it is not one of those that can be cut: causal, bidirectional, sliding windows, padding, packed documents"
    raise refuse("attention mask", name, fit)
