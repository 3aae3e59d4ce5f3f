"""What is trained: the reference decoder, or a model of transformers; found, counted, built and laid out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.checkpoint import Checkpoint, check_together, find_checkpoint, load_weights, read_weights
from lss.checkpoint.files import hash_file
from lss.comm import control
from lss.config import Config
from lss.config.errors import Refused, refuse
from lss.data.tokenizer import Tokenizer
from lss.integrations.hf.adapters import add_adapters, merged, with_adapters
from lss.integrations.hf.source import Source, dropout_rates, kept_source, open_source, with_rope_scaling, with_shape
from lss.model import Transformer
from lss.model.size import parameter_count
from lss.parallel import layout_of, parallelize
from lss.train.steps import parameter_dtype

# folder of a run for the files of the model's tokenizer
KEPT = "tokenizer"


@dataclass(frozen=True)
class Subject:
    """What a config trains.

    Attributes:
        config: with the shape of a model of transformers read into [model].
        source: where that comes from; None for the reference decoder.
    """

    config: Config
    source: Source | None = None

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        if self.source is None:
            return parameter_count(self.config.model, self.config.data.seq_len)
        return sum(shape.numel() for shape in self.source.parameters().values())

    @cached_property
    def matrix_parameters(self) -> int:
        """Parameters that stand in matrix products: all matrices but look-up tables."""
        if self.source is not None:
            # a frozen weight takes two thirds of the work: it has no gradient of its own
            return self.source.matrix_parameters() * (2 if self.config.model.lora_rank else 3) // 3
        with torch.device("meta"):
            return matrix_parameters(Transformer(self.config.model, self.config.data.seq_len))

    @property
    def attention_width(self) -> int:
        """N * H, query heads times head size."""
        model = self.config.model
        return model.d_model if self.source is None else model.n_heads * self.source.head_size()

    def describe(self) -> str:
        """The model in a line."""
        model, source = self.config.model, self.source
        name = model.preset if source is None else f"{source.name} ({source.cls.__name__})"
        lora = f", adapters of rank {model.lora_rank} trained" if model.lora_rank else ""
        line = (f"{name}: {self.parameters:,} parameters, {model.n_layers} layers of {model.d_model}, "
                f"{model.n_heads}/{model.n_kv_heads} heads{lora}")  # fmt: skip
        rates = {} if source is None else dropout_rates(source.config)
        return f"{line}; dropout of its config ({', '.join(rates)}) set to 0" if rates else line

    def to_state(self, out: Path) -> dict[str, Any]:
        """What a checkpoint of the run in `out` keeps of it, to be built and exported without its folder or the Hub."""
        if self.source is None:
            return {}
        files = sorted((out / KEPT).glob("*")) if (out / KEPT).is_dir() else []
        return {"hf": self.source.to_state() | {"tokenizer": {file.name: hash_file(file) for file in files}}}

    def keep_tokenizer(self, out: Path) -> None:
        """Put the files of the model's tokenizer, and how it generates, where it has them, into the run's folder; once."""
        if self.source is None or (out / KEPT).exists():
            return
        aside = out / f".{KEPT}.writing"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with suppress(Refused):  # a run on token files needs none
            Tokenizer(self.source.name).save(aside)
        self.source.save_generation(aside)
        aside.rename(out / KEPT)

    def build(
        self, mesh: DeviceMesh, seq_len: int | None = None, *, weights: bool = True, packed: bool | None = None
    ) -> nn.Module:
        """The model, laid out over the mesh and given segments, on the mesh's device.

        `weights`: False where they are loaded afterwards, from a checkpoint. `packed`: as for `parallelize`, by default
        data.packing.
        """
        train, dtype = self.config.train, parameter_dtype(self.config.train.dtype)
        if self.source is not None:
            model = self.source.build(dtype=dtype, seed=train.seed, weights=weights)
            if self.config.model.lora_rank:
                model = add_adapters(model, self.config.model, train.seed)
            return lay_out(self.config, model.to(mesh.device_type).train(), mesh, packed)
        model = Transformer(self.config.model, seq_len or self.config.data.seq_len, seed=train.seed)
        return lay_out(self.config, model.to(device=mesh.device_type, dtype=dtype), mesh, packed)


def find_model(config: Config, out: Path | None = None) -> Subject:
    """What a config trains; a model of transformers that a run in `out` has saved is the one that was saved.

    Raises:
        Refused: no such model, one that cannot be trained exactly, or a setting that does not fit it.
    """
    name = config.model.hf
    if not name:
        return Subject(config)
    kept = {}
    if out is not None:
        newest = find_checkpoint(out / "checkpoints", fallback=config.checkpoint.fallback)
        state = {} if newest is None else newest.read_state()
        kept = state.get("hf", {})
        if newest is not None and not kept:
            raise refuse("model.hf", name, f"{out} holds a run of another model; choose another --out")
    return subject_of(config, kept)


def subject_of(config: Config, kept: Mapping[str, Any]) -> Subject:
    """What a config trains; a model of transformers is the one that a checkpoint kept, where it kept any.

    Raises:
        Refused: as `find_model`.
    """
    name, model = config.model.hf, config.model
    if not name:
        return Subject(config)
    if kept:  # its config has been stretched already
        source = kept_source(kept, name, weights=model.lora_rank > 0)
    else:
        source = with_rope_scaling(open_source(name), model.rope_scaling, model.rope_factor)
    return Subject(with_shape(config, source), source)


def load_model(subject: Subject, checkpoint: Checkpoint | None, mesh: DeviceMesh, rows: int) -> nn.Module:
    """A trained model for sequences of data.seq_len, laid out over the mesh and given segments.

    Args:
        checkpoint: its weights, every byte of which is checked; None for a model of transformers with its own.
        rows: what it was trained with as data.seq_len: the rows of a learned position table.

    Raises:
        Refused: damaged, or not this model's; the same on every rank.

    Collectives: with a checkpoint one gather, host to host; and those of laying out.
    """
    config = subject.config
    # a table that is cut has the rows of one length alone
    packed = config.data.packing or rows != config.data.seq_len
    if checkpoint is None:
        return subject.build(mesh, rows, packed=packed)
    _, reason = check_together(checkpoint.path, control(mesh, "checkpoints"), "weights")
    if reason:
        raise Refused(reason)
    model = subject.build(mesh, rows, weights=config.model.lora_rank > 0, packed=packed)
    load_weights(checkpoint, model, layout_of(model))
    return model


def load_plain(subject: Subject, checkpoint: Checkpoint | None, mesh: DeviceMesh, rows: int) -> nn.Module:
    """A trained model that is whole on every rank, not laid out, on the mesh's device; adapters are merged into it.

    Args:
        checkpoint, rows: as for `load_model`.

    Raises:
        Refused: as `load_model`.

    Collectives: with a checkpoint one gather, host to host.
    """
    config, source = subject.config, subject.source
    dtype, lora = parameter_dtype(config.train.dtype), config.model.lora_rank > 0
    weights = None
    if checkpoint is not None:
        _, reason = check_together(checkpoint.path, control(mesh, "checkpoints"), "weights")
        if reason:
            raise Refused(reason)
        weights = read_weights(checkpoint)
    if source is None:
        model: nn.Module = Transformer(config.model, rows, seed=config.train.seed).to(dtype)
    else:
        model = source.build(dtype=dtype, seed=config.train.seed, weights=weights is None or lora)
    if weights is not None:
        model = merged(with_adapters(model, config.model, weights)) if lora else _filled(model, weights)
    return model.to(mesh.device_type)


def _filled(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() | weights.keys()):
        found = [tuple(held[name].shape) for held in (parameters, weights) if name in held]
        if len(set(found)) != 1 or len(found) != 2:
            raise Refused(f"CKPT: its weights are not this model's; {name} is in one of them only, or of another shape.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model


def build_model(config: Config, mesh: DeviceMesh, seq_len: int | None = None) -> nn.Module:
    """The config's model, laid out over the mesh and given segments, on the mesh's device."""
    return find_model(config).build(mesh, seq_len)


def lay_out(config: Config, model: nn.Module, mesh: DeviceMesh, packed: bool | None = None) -> nn.Module:
    """A plain model laid out over the mesh as the config says."""
    parallel = config.parallel
    return parallelize(
        model,
        mesh,
        strategy=parallel.strategy,
        inner=parallel.inner,
        order=parallel.order,
        head_chunks=parallel.head_chunks,
        token_chunks=parallel.token_chunks,
        regather=parallel.regather,
        fsdp=parallel.fsdp,
        fsdp_reshard=parallel.fsdp_reshard,
        checkpointing=config.memory.checkpointing,
        offload=config.memory.offload,
        offload_gib=config.memory.offload_gib,
        offload_path=config.memory.offload_path,
        kernel=parallel.kernel,
        scan_kernel=parallel.scan_kernel,
        transport=parallel.transport,
        dkv_dtype=parallel.dkv_dtype,
        precut=True,
        packed=config.data.packing if packed is None else packed,
        tiles=config.memory.tiles,
        compile=config.train.compile,
    )


def matrix_parameters(model: Transformer) -> int:
    """Parameters of the plain model that stand in matrix products: all matrices but look-up tables."""
    total = sum(p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and "position_table" not in name)
    return total if model.lm_head is None else total - model.embedding.weight.numel()
