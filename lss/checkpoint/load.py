"""Reading a checkpoint, into any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lss.checkpoint.layout import TensorLayout
from lss.config.errors import Refused, refuse

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a run's `checkpoints` folder; None where there is none."""
    found = [p for p in folder.glob("step_*") if p.name[5:].isdigit()]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        Refused: not a checkpoint, a file is missing, or the JSON is damaged.
    """
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise Refused(f"{path}: not a checkpoint, {missing[0]} is missing; give a folder such as RUN/checkpoints/step_100.")
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path / 'state.json'}: damaged ({error}).") from error
    if not isinstance(state, dict) or state.get("format") != 1 or not isinstance(state.get("step"), int):
        raise Refused(f"{path / 'state.json'}: not of a format that this version reads (format 1).")
    return state


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All parameters, whole, by name."""
    return _read(path / "model.safetensors")


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, layout: TensorLayout) -> int:
    """Load weights and optimizer state into a model, each rank its part by `layout`; returns the step.

    Raises:
        Refused: a file is missing or damaged, or does not fit this model or optimizer.
    """
    state = read_state(path)
    if state["optimizer"] != type(optimizer).__name__:
        raise refuse("optim.name", type(optimizer).__name__.lower(), f"{path} was saved with {state['optimizer'].lower()}")
    weights, states = read_weights(path), _read(path / "optimizer.safetensors")
    names = [name for name, _ in model.named_parameters()]
    if set(names) != set(weights):
        odd = sorted(set(names) ^ set(weights))[0]
        raise Refused(f"{path}: its parameters are not this model's; {odd} is in one of them only.")
    for name, parameter in model.named_parameters():
        part = layout.part(name, weights[name])
        if part.shape != parameter.shape:
            fit = f"{path} does not fit this model, which has {tuple(parameter.shape)}"
            raise refuse(name, tuple(weights[name].shape), fit)
        with torch.no_grad():
            parameter.copy_(part)
        entries: dict[str, torch.Tensor] = {}
        for full_name, tensor in states.items():
            if full_name.rpartition("/")[0] == name:
                entries[full_name.rpartition("/")[2]] = layout.part(name, tensor).to(parameter.device)
        for full_name, value in state["optimizer_scalars"].items():
            if full_name.rpartition("/")[0] == name:
                entries[full_name.rpartition("/")[2]] = torch.tensor(value, device=_scalar_device(optimizer, parameter))
        if entries:
            optimizer.state[parameter] = entries
    return state["step"]


def _scalar_device(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.device:
    # the fused optimizer counts its steps on the parameter's device, the others on the CPU
    return parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{path}: damaged or unreadable ({error}).") from error
