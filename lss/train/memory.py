"""The least memory that a run takes, by arithmetic, against what the machine has: refused before anything is built.

And what the loop asks of whoever measures what it takes in truth."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from lss.config import Config
from lss.config.errors import refuse
from lss.hosts import all_memory
from lss.model.size import parameter_count
from lss.offload import Offloader
from lss.train.optim import STATE_PART
from lss.train.steps import parameter_dtype


class StepMeter(Protocol):
    """Measures where a run's memory goes, on its first steps; `lss.planner.Meter` is one. All ranks call alike."""

    def step(self, number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Around each step."""
        ...

    def facts(self, last: bool) -> dict[str, Any] | None:
        """After each step, the last or not: what was found, once; else None."""
        ...

    def table(self, facts: dict[str, Any]) -> list[str]:
        """Lines that show it."""
        ...


class NoMeter:
    """Measures nothing."""

    def step(self, number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def facts(self, last: bool) -> dict[str, Any] | None:
        """None."""
        return None

    def table(self, facts: dict[str, Any]) -> list[str]:
        """No lines."""
        return []


class RoomNote:
    """Says, when it comes to be so, that host memory has no room for what memory.checkpointing="attention" keeps."""

    def __init__(self, offloader: Offloader | None, blocks: int) -> None:
        self._offloader, self._blocks, self._told = offloader, blocks, 0

    def lines(self) -> list[str]:
        """One line after a step whose number of blocks is another than that of the one before."""
        again = 0 if self._offloader is None else self._offloader.again
        if again == self._told or self._offloader is None:
            return []
        self._told = again
        room = (self._offloader.room or 0) / 2**30
        kept = f"the attention's output of {self._blocks - again} of {self._blocks} blocks"
        return [f"memory.offload: {room:.1f} GiB of host memory have room for {kept}; the others compute their attention "
                "again (memory.offload_gib gives more)"]  # fmt: skip


def state_bytes(config: Config, parameters: int | None = None) -> int:
    """The least that a rank holds for weights, gradients and optimizer state, cut as fsdp or tensor parallelism cuts them.

    A model is made whole on every rank before it is cut; what lies on the host is not counted. `parameters`: of a model of
    transformers.
    """
    on_device = config.memory.optimizer == "device"
    copies = 2 + 2 * STATE_PART[config.optim.name] * on_device
    copies = 1 if config.model.lora_rank else copies  # frozen weights have neither gradients nor state
    whole, parts = _weights(config, parameters)
    return max(whole, int(copies * whole) // parts)


def host_state_bytes(config: Config, parameters: int | None = None) -> int:
    """The least that a rank holds in host memory with memory.optimizer="host": weights once more, and both moments."""
    if config.memory.optimizer == "device" or config.model.lora_rank:
        return 0
    whole, parts = _weights(config, parameters)
    return int((1 + 2 * STATE_PART[config.optim.name]) * whole) // parts


def _weights(config: Config, parameters: int | None) -> tuple[int, int]:
    """(bytes of all weights, the number of ranks that they are cut over)."""
    parallel = config.parallel
    assert isinstance(parallel.cp, int)
    count = parameter_count(config.model, config.data.seq_len) if parameters is None else parameters
    parts = parallel.cp * parallel.dp if parallel.fsdp else parallel.cp if parallel.strategy == "tp" else 1
    return count * parameter_dtype(config.train.dtype).itemsize, parts


def sequence_bytes(config: Config) -> int:
    """The least that a rank holds of its tokens: every micro-batch's ids, and one's input of every block, for backward."""
    assert isinstance(config.parallel.cp, int)
    model, train = config.model, config.train
    tokens = -(-config.data.seq_len // config.parallel.cp)
    rows = train.batch_size // train.accumulate // config.parallel.dp
    itemsize = 2 if train.dtype == "bfloat16" else parameter_dtype(train.dtype).itemsize
    kept = model.n_layers if config.memory.offload == "none" else 1
    # ids, labels and positions are int64
    return rows * tokens * (24 * train.accumulate + model.d_model * kept * itemsize)


def refuse_too_large(config: Config, device_type: str, ranks_here: int, parameters: int | None = None) -> None:
    """Refuse a model or sequences that cannot be held, whatever else is running.

    Args:
        config: resolved.
        device_type: "cuda" for a GPU a rank; on "cpu" the host's ranks share its memory.
        ranks_here: ranks on this host.
        parameters: of a model of transformers, whose shape is the config's.

    Raises:
        Refused: naming the setting that asks for most, the bytes needed and those there are.
    """
    if device_type == "cuda":
        there, sharing, where = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, 1, "the GPU"
    else:
        there, sharing, where = all_memory(), ranks_here, "this host"
    state, sequence = state_bytes(config, parameters) * sharing, sequence_bytes(config) * sharing
    on_host = host_state_bytes(config, parameters) * ranks_here
    if on_host > all_memory():
        fit = f"{ranks_here} ranks take {_size(on_host)} of this host, which has {_size(all_memory())}"
        raise refuse("memory.optimizer", '"host"', f'{fit}; use "device", or more hosts')
    state += on_host if device_type == "cpu" else 0
    if state + sequence <= there:
        return
    of = f" of {sharing} ranks" if sharing > 1 else ""
    if state >= sequence:
        key, value = _largest_of_model(config)
        what = f"weights, gradients and optimizer state{of} take {_size(state)}"
    else:
        key, value = _largest_of_sequence(config)
        what = f"the tokens{of} and their block inputs take {_size(sequence)} or more"
    raise refuse(key, value, f"{what}, and {where} has {_size(there)}; use less, or more ranks or memory")


def _largest_of_model(config: Config) -> tuple[str, int | str]:
    """The key whose value stands furthest above what is usual, since sizes multiply."""
    model = config.model
    if model.hf:
        return "model.hf", model.hf
    usual = {"d_model": 4096, "n_layers": 32, "d_mlp": 14336, "vocab_size": 131072}
    excess = {f"model.{key}": getattr(model, key) / size for key, size in usual.items()}
    values = {f"model.{key}": getattr(model, key) for key in usual}
    if model.positions == "learned":
        excess["data.seq_len"], values["data.seq_len"] = config.data.seq_len / 131072, config.data.seq_len
    key = max(excess, key=excess.__getitem__)
    return key, values[key]


def _largest_of_sequence(config: Config) -> tuple[str, int]:
    rows = config.train.batch_size // config.train.accumulate // config.parallel.dp
    longer = config.data.seq_len >= max(rows, config.train.accumulate)
    return ("data.seq_len", config.data.seq_len) if longer else ("train.batch_size", config.train.batch_size)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
