"""Writing a checkpoint: `step_N/` with model.safetensors, optimizer.safetensors and state.json.

Parameters are written whole, under the names of the plain model and without padding rows, so that any layout can load
them. The folder is written under another name, flushed to disk and renamed: a folder called `step_N` is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lss.checkpoint.layout import TensorLayout
from lss.config.errors import Refused


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    layout: TensorLayout,
    *,
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """Save a model and its optimizer as `folder/step_N`; the first rank writes, all ranks must call.

    Args:
        layout: how the model lies on the ranks.
        facts: JSON values stored beside step and optimizer settings: config, versions.
        keep: how many of the newest checkpoints stay; older ones are removed after this one is complete.

    Raises:
        Refused: the folder cannot be written; on every rank, and earlier checkpoints are left as they were.

    Collectives: one all-gather per cut parameter and state, and one all-reduce of the outcome.
    """
    weights = {name: layout.whole(name, parameter.detach()) for name, parameter in model.named_parameters()}
    states, scalars = _optimizer_tensors(model, optimizer, layout)
    path, reason = folder / f"step_{step}", ""
    if torch.distributed.get_rank() == 0:
        name = type(optimizer).__name__
        state = {"format": 1, "step": step, "optimizer": name, "optimizer_scalars": scalars, **facts}
        try:
            _write(path, weights, states, state)
            _prune(folder, keep)
        except OSError as error:
            reason = str(error)
    failed = torch.tensor([float(bool(reason))], device=next(model.parameters()).device)
    if layout.all.all_reduce(failed, "save outcome").wait().item():
        raise Refused(f"{path}: the checkpoint could not be written ({reason or 'see rank 0'}); free space or choose "
                      "another --out.")  # fmt: skip
    return path


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, layout: TensorLayout
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Whole state tensors under "parameter/state", and the scalars (step counts) beside them."""
    tensors, scalars = {}, {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.dim() > 0:
                tensors[f"{name}/{key}"] = layout.whole(name, value)
            else:
                scalars[f"{name}/{key}"] = float(value)
    return tensors, scalars


def _write(path: Path, weights: dict, states: dict, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file({name: t.contiguous().cpu() for name, t in weights.items()}, aside / "model.safetensors")
    save_file({name: t.contiguous().cpu() for name, t in states.items()}, aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for file in (*aside.iterdir(), aside):
        _flush(file)
    if path.exists():
        shutil.rmtree(path)  # the same step again, after a resume from an earlier one
    aside.rename(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    steps = sorted(int(p.name[5:]) for p in folder.glob("step_*") if p.name[5:].isdigit())
    for step in steps[:-keep]:
        shutil.rmtree(folder / f"step_{step}")
