"""`lss export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lss.config.errors import refuse


def export(options: argparse.Namespace) -> int:
    """Verify a checkpoint, then write its weights as one safetensors file: whole tensors, the names of the plain model."""
    from safetensors.torch import save_file

    from lss.checkpoint import read_weights, verify

    if options.format != "safetensors":
        raise refuse("--format", options.format, "this version writes safetensors")
    source, target = Path(options.checkpoint), Path(options.output)
    checkpoint = verify(source)
    weights = read_weights(checkpoint)
    if target.is_dir():
        raise refuse("-o", target, "a folder of this name is there; give a file name")
    aside = target.with_name(f".{target.name}.writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, aside, metadata={"format": "pt", "step": str(checkpoint.step)})
        aside.rename(target)
    except OSError as error:
        raise refuse("-o", target, f"cannot be written ({error.strerror})") from error
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{target}: {len(weights)} tensors, {count:,} parameters of step {checkpoint.step}")
    return 0
