"""Optimizer states of 8 bits in checkpoints: codes and scales, each as a tensor of the parameter's shape.

torchao keeps such a state as one code (uint8) for each element and one scale (float32) for each block of 256 elements of a
rank's part, flattened; the value is map[code] x scale. Blocks are a matter of the layout, so a checkpoint has each
element's own scale: where the blocks are the same again, so is every bit; elsewhere values are quantized anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lss.checkpoint.layout import local_of

CODES, SCALE = ".codes", ".scale"


def parts_of(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state's tensors by their names in a checkpoint: itself, or its codes and scales where it is quantized."""
    quantized: Any = value
    if not hasattr(value, "codes"):
        return {key: value}
    scale = quantized.scale.repeat_interleave(quantized.block_size).view(quantized.codes.shape)
    return {key + CODES: quantized.codes, key + SCALE: scale}


def dtype_of(key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a part by its name, for a parameter of `dtype`."""
    return torch.uint8 if key.endswith(CODES) else torch.float32 if key.endswith(SCALE) else dtype


def joined(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, loaded: dict[str, torch.Tensor]) -> None:
    """Put what was loaded by parts together again, in place, as this optimizer keeps it; others are left as they are."""
    low_bit: Any = optimizer
    if not hasattr(low_bit, "_new_buffer"):  # torchao's own; it has no public way to make a state
        return
    for key in sorted({name.removesuffix(CODES).removesuffix(SCALE) for name, x in loaded.items() if x.dim()}):
        signed = key == "exp_avg"
        state = low_bit._new_buffer(parameter, signed)
        part: Any = local_of(state)
        if key in loaded:
            part.copy_(local_of(loaded.pop(key)))
        else:
            codes, scale = (local_of(loaded.pop(key + suffix)) for suffix in (CODES, SCALE))
            blocks = scale.reshape(-1, part.block_size) if hasattr(part, "codes") else None
            if blocks is not None and bool((blocks == blocks[:, :1]).all()):
                part.codes.copy_(codes)
                part.scale.copy_(blocks[:, 0])
            else:
                block = low_bit.block_size
                values = low_bit._subclass_zeros(codes.new_empty(block, dtype=torch.float32), signed, block).qmap
                part.copy_(values[codes.long()] * scale)
        loaded[key] = state
