"""A trained model of transformers as the folder that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lss.checkpoint.files import hash_file
from lss.config import Config
from lss.config.errors import Refused, refuse
from lss.integrations.hf.adapters import merged, with_adapters
from lss.integrations.hf.source import kept_source
from lss.train.models import KEPT


def write_pretrained(
    state: Mapping[str, Any], weights: Mapping[str, torch.Tensor], folder: Path, run: Path, *, adapters: bool = False
) -> str:
    """Write config, weights in safetensors and tokenizer into a folder; returns what was written, in words.

    The config is the model's own, with its rates of dropout; weights keep the dtype that they were trained in. Adapters
    are merged into the model's weights, which are read from where model.hf says; or written alone, as peft has them.

    Args:
        state: a checkpoint's.
        weights: its tensors, whole.
        run: the run's folder, which has the tokenizer's files.
        adapters: write them alone.

    Raises:
        Refused: it is no checkpoint of a model of transformers, or its weights are not all of that model's.
    """
    kept, name = state.get("hf"), str(state.get("config", {}).get("model", {}).get("hf", ""))
    if not isinstance(kept, dict):
        raise refuse("--format", "hf", "this checkpoint is of the reference decoder; use safetensors")
    settings = Config.from_dict({"model": state["config"]["model"]}).model
    if adapters and not settings.lora_rank:
        raise refuse("--format", "adapter", "this checkpoint has no adapters; use hf")
    source = kept_source(kept, name, weights=settings.lora_rank > 0)
    dtype = next(iter(weights.values())).dtype
    model = source.build(dtype=dtype, weights=settings.lora_rank > 0)
    if settings.lora_rank:
        wrapped = with_adapters(model, settings, weights)
        if adapters:
            wrapped.save_pretrained(folder)
            return f"adapters of rank {settings.lora_rank} of {name}"
        model = merged(wrapped)
    else:
        _fill(model, weights)
    model.save_pretrained(folder)
    model.config.architectures = source.config.architectures = [type(model).__name__]
    source.config.dtype = dtype
    source.config.save_pretrained(folder)
    files = _copy_tokenizer(kept.get("tokenizer") or {}, run, folder)
    count = sum(parameter.numel() for parameter in model.parameters())
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
