"""`lss export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lss.config.errors import refuse


def export(options: argparse.Namespace) -> int:
    """Write a checkpoint's weights as one safetensors file: whole tensors, the names of the plain model."""
    from safetensors.torch import save_file

    from lss.checkpoint import read_state, read_weights

    if options.format != "safetensors":
        raise refuse("--format", options.format, "this version writes safetensors")
    source, target = Path(options.checkpoint), Path(options.output)
    state = read_state(source)
    weights = read_weights(source)
    if target.is_dir():
        raise refuse("-o", target, "a folder of this name is there; give a file name")
    aside = target.with_name(f".{target.name}.writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, aside, metadata={"format": "pt", "step": str(state["step"])})
        aside.rename(target)
    except OSError as error:
        raise refuse("-o", target, f"cannot be written ({error.strerror})") from error
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{target}: {len(weights)} tensors, {count:,} parameters of step {state['step']}")
    return 0
