"""`lss export`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from lss.cli.verify import checkpoint_folder
from lss.config.errors import refuse

FORMATS = ("safetensors", "hf", "adapter")


def export(options: argparse.Namespace) -> int:
    """Verify a checkpoint, then write its weights: one safetensors file, or a folder that transformers loads."""
    if options.format not in FORMATS:
        raise refuse("--format", options.format, f"use {', '.join(FORMATS)}")
    source, target = checkpoint_folder(options.checkpoint), Path(options.output)
    return _file(source, target) if options.format == "safetensors" else _folder(source, target, options.format == "adapter")


def _file(source: Path, target: Path) -> int:
    """Whole tensors, by the names of the plain model."""
    from safetensors.torch import save_file

    from lss.checkpoint import read_weights, verify

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


def _folder(source: Path, target: Path, adapters: bool) -> int:
    """Config, weights and tokenizer, as `save_pretrained` writes them."""
    from lss.checkpoint import read_weights, verify
    from lss.train.export import write_pretrained

    checkpoint = verify(source)
    if target.exists():
        raise refuse("-o", target, "it is there already; give the name of a new folder")
    aside = target.with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        run, weights = source.absolute().parents[1], read_weights(checkpoint)
        line = write_pretrained(checkpoint.read_state(), weights, aside, run, adapters=adapters)
        aside.rename(target)
    except OSError as error:
        raise refuse("-o", target, f"cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{target}: {line}, step {checkpoint.step}")
    return 0
