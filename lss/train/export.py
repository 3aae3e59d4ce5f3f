"""A trained model of transformers as the folder that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lss.checkpoint.files import hash_file
from lss.config.errors import Refused, refuse
from lss.integrations.hf.source import kept_source
from lss.train.models import KEPT


def write_pretrained(state: Mapping[str, Any], weights: Mapping[str, torch.Tensor], folder: Path, run: Path) -> str:
    """Write config, weights in safetensors and tokenizer into a folder; returns what was written, in words.

    The config is the model's own, with its rates of dropout; weights keep the dtype that they were trained in.

    Args:
        state: a checkpoint's.
        weights: its tensors, whole.
        run: the run's folder, which has the tokenizer's files.

    Raises:
        Refused: it is no checkpoint of a model of transformers, or its weights are not all of that model's.
    """
    kept, name = state.get("hf"), str(state.get("config", {}).get("model", {}).get("hf", ""))
    if not isinstance(kept, dict):
        raise refuse("--format", "hf", "this checkpoint is of the reference decoder; use safetensors")
    source = kept_source(kept, name)
    dtype = next(iter(weights.values())).dtype
    model = source.build(dtype=dtype, weights=False)
    _fill(model, weights)
    model.save_pretrained(folder)
    model.config.architectures = source.config.architectures = [type(model).__name__]
    source.config.dtype = dtype
    source.config.save_pretrained(folder)
    files = _copy_tokenizer(kept.get("tokenizer") or {}, run, folder)
    count = sum(tensor.numel() for tensor in weights.values())
    said = f"{count:,} parameters of {type(model).__name__} in {str(dtype).removeprefix('torch.')}"
    return f"{said}, {f'{len(files)} files of its tokenizer' if files else 'no tokenizer'}"


def _fill(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())[0]
        raise Refused(f"CKPT: its weights are not those of {type(model).__name__}; {odd} is in one of them only.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _copy_tokenizer(files: Mapping[str, str], run: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's files, each held against its digest; those that are gone are left out together."""
    if not all((run / KEPT / name).is_file() and Path(name).name == name for name in files):
        return []
    for name, digest in files.items():
        if hash_file(run / KEPT / name) != digest:
            raise Refused(f"{run / KEPT / name}: changed since the checkpoint was saved; restore it.")
        shutil.copyfile(run / KEPT / name, folder / name)
    return sorted(files)
