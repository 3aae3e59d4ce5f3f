"""Activation checkpointing: what a block keeps for its backward."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from lss.config.errors import refuse

CHOICES = ("none", "full")


def block_runner(checkpointing: str | None):
    """How to run a block: keeping its activations ("none"), or only its input and computing it again ("full").

    The recomputation repeats the block's collectives; dropout is keyed by position, so it repeats exactly.
    """
    if checkpointing in (None, "none"):
        return lambda block, *args: block(*args)
    if checkpointing == "full":
        return _recomputed
    raise refuse("memory.checkpointing", checkpointing, f"use one of {', '.join(map(repr, CHOICES))}")


def _recomputed(block, *args) -> torch.Tensor:
    # nothing in a block draws from torch's generators, so their state need not be saved and restored
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
