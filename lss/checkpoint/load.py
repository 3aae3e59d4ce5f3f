"""Reading a checkpoint, into any layout: each rank reads the boxes that it holds and no others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lss.checkpoint.files import DTYPES, NAMES
from lss.checkpoint.layout import TensorLayout, home_of, local_of, name_of
from lss.checkpoint.manifest import Checkpoint
from lss.checkpoint.quantized import dtype_of, joined
from lss.config.errors import Refused, refuse
from lss.segment import Piece, overlap, whole_piece


class _Reader(ExitStack):
    """A checkpoint's open files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._checkpoint, self._files = checkpoint, {}

    def fill(self, target: torch.Tensor, entry: dict[str, Any], pieces: Sequence[Piece]) -> None:
        """Read a tensor's elements into the places that `pieces` gives them in `target`."""
        for stored in entry["pieces"]:
            for piece in pieces:
                met = overlap(tuple(stored["at"]), tuple(stored["size"]), piece)
                if met is not None:
                    target[met[1]] = self._read(stored["file"], stored["key"], met[0])

    def _read(self, name: str, key: str, box: tuple[slice, ...]) -> torch.Tensor:
        path = self._checkpoint.path / name
        try:
            if name not in self._files:
                self._files[name] = self.enter_context(safe_open(path, framework="pt"))
            return self._files[name].get_slice(key)[box] if box else self._files[name].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise Refused(f"{path}: damaged or unreadable ({error}).") from error


def read_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All parameters, whole, by name."""
    weights = {}
    with _Reader(checkpoint) as reader:
        for name, entry in checkpoint.tensors("weights").items():
            shape = tuple(entry["shape"])
            weights[name] = torch.empty(shape, dtype=DTYPES[entry["dtype"]])
            reader.fill(weights[name], entry, [whole_piece(shape)])
    return weights


def load_weights(checkpoint: Checkpoint, model: nn.Module, layout: TensorLayout) -> None:
    """Load weights alone into a model, each rank its part by `layout`, in whatever dtype the model has.

    Raises:
        Refused: they do not fit this model; nothing is loaded then.
    """
    weights, parameters = checkpoint.tensors("weights"), _same_names(checkpoint, model)
    for name in parameters:
        _refuse_shape(checkpoint, name, weights[name], layout.whole_shape(name))
    with _Reader(checkpoint) as reader, torch.no_grad():
        for name, parameter in parameters.items():
            _fill(parameter, reader, weights[name], layout.pieces(name))


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, layout: TensorLayout
) -> dict[str, Any]:
    """Load weights and optimizer state into a model, each rank its part by `layout`; returns what state.json holds.

    Everything is compared before anything is loaded, so that a refusal leaves the model as it was.

    Raises:
        Refused: it does not fit this model or optimizer.
    """
    state, path = checkpoint.read_state(), checkpoint.path
    if state["optimizer"] != name_of(optimizer):
        raise refuse("optim.name", name_of(optimizer).lower(), f"{path} was saved with {state['optimizer'].lower()}")
    weights, parameters = checkpoint.tensors("weights"), _same_names(checkpoint, model)
    states: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for entries in (checkpoint.tensors("optimizer"), state["optimizer_scalars"]):
        for title, entry in entries.items():
            name, _, key = title.rpartition("/")
            states.setdefault(name, {})[key] = entry
    for name, parameter in parameters.items():
        entries = {"": weights[name]} | {key: entry for key, entry in states[name].items() if isinstance(entry, dict)}
        for key, entry in entries.items():
            _refuse_misfit(checkpoint, name, entry, layout.whole_shape(name), dtype_of(key, parameter.dtype))
    with _Reader(checkpoint) as reader, torch.no_grad():
        for name, parameter in parameters.items():
            _fill(parameter, reader, weights[name], layout.pieces(name))
            loaded: dict[str, torch.Tensor] = {}
            home = home_of(optimizer, parameter)
            for key, entry in states[name].items():
                if isinstance(entry, dict):
                    dtype = dtype_of(key, parameter.dtype)
                    loaded[key] = torch.zeros_like(home, dtype=dtype, requires_grad=False)
                    _fill(loaded[key], reader, entry, layout.pieces(name))
                else:
                    loaded[key] = torch.tensor(float(entry), device=_scalar_device(optimizer, home))
            if loaded:
                joined(optimizer, parameter, loaded)
                optimizer.state[home] = loaded
    return state


def _same_names(checkpoint: Checkpoint, model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters that are trained, by name; refuses a checkpoint that has others."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = checkpoint.tensors("weights")
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())[0]
        raise Refused(f"{checkpoint.path}: its parameters are not this model's; {odd} is in one of them only.")
    return parameters


def _refuse_shape(checkpoint: Checkpoint, name: str, entry: dict[str, Any], shape: tuple[int, ...]) -> None:
    if tuple(entry["shape"]) != shape:
        raise refuse(name, tuple(entry["shape"]), f"{checkpoint.path} does not fit this model, which has {shape}")


def _refuse_misfit(
    checkpoint: Checkpoint, name: str, entry: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    _refuse_shape(checkpoint, name, entry, shape)
    if DTYPES[entry["dtype"]] != dtype:
        fit = f"{checkpoint.path} does not fit this run, whose train.dtype keeps it in {NAMES[dtype]}"
        raise refuse(name, entry["dtype"], fit)


def _fill(tensor: torch.Tensor, reader: _Reader, entry: dict[str, Any], pieces: Sequence[Piece]) -> None:
    part = local_of(tensor)
    host = torch.zeros(part.shape, dtype=part.dtype)  # padding rows, which no file has, are 0
    reader.fill(host, entry, pieces)
    part.copy_(host)


def _scalar_device(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.device:
    # the fused optimizer counts its steps on the parameter's device, the others on the CPU
    return parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
