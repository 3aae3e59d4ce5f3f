"""What is asked of sharded parameters where none need be, without torch's FSDP2, which takes most of a second to import."""

from __future__ import annotations

import torch

from lss.config.errors import refuse

RESHARD = ("auto", True, False)


def check_reshard(reshard: bool | str) -> None:
    """Refuse what `reshard` cannot be."""
    if not any(reshard is choice or (type(reshard) is str and reshard == choice) for choice in RESHARD):
        raise refuse("fsdp_reshard", reshard, 'use "auto", True or False')


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: all of a plain one; in-place changes reach the tensor."""
    to_local = getattr(tensor, "to_local", None)  # a DTensor's
    if to_local is None:
        return tensor
    with torch.no_grad():
        return to_local()
