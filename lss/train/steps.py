"""The part of a training step that gives gradients; `lss check` holds it against one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from lss.config import Config
from lss.data.corpus import mask_id
from lss.data.reader import Batch, Kind
from lss.kernels.dropout import fold
from lss.mesh import moved
from lss.parallel import HFLayout, Layout, layout_of
from lss.segment import Segment, make_segment

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def parameter_dtype(dtype: str) -> torch.dtype:
    """Parameters are kept in float32 for bfloat16 training, whose matrix products alone are rounded."""
    return torch.promote_types(DTYPES[dtype], torch.float32)


def autocast(dtype: str, device_type: str) -> torch.autocast | nullcontext:
    """The context in which a forward pass runs.

    Casts of weights are not kept: each is used once a pass, and what is computed again is computed outside of it.
    """
    return torch.autocast(device_type, torch.bfloat16, cache_enabled=False) if dtype == "bfloat16" else nullcontext()


def count_labels(model: nn.Module, batches: Sequence[Batch]) -> torch.Tensor:
    """Labels counted in these micro-batches on all ranks, on the device. Collectives: one all-reduce of one number."""
    local = sum(int((batch.labels != -100).sum()) for batch in batches)
    total = torch.full((), local, dtype=torch.int64, device=next(model.parameters()).device)
    return layout_of(model).all.all_reduce(total, "labels").wait()


def loader_kind(config: Config, layout: Layout | HFLayout | None) -> Kind:
    """What the config's loaders make of the text; `layout` cuts it, None leaves it whole."""
    kind, data = config.model.kind, config.data
    settings: Kind = {"packing": data.packing, "reverse_complement": data.reverse_complement}
    if data.packing:
        settings["segment_of"] = lambda borders: segment_of(config, layout, borders)
    if kind == "decoder":
        settings["prefix"] = data.prefix
    elif kind == "encoder":
        settings |= {"mask_rate": data.mask_rate, "mask_id": mask_id(config)}
    else:
        length = -(-data.seq_len // data.source_every)
        settings["source_every"] = data.source_every
        assert not isinstance(layout, HFLayout), "a model of transformers here is a decoder"
        settings["source_segment"] = make_segment(length, cp=1, rank=0) if layout is None else layout.source_segment(length)
    return settings


def segment_of(config: Config, layout: Layout | HFLayout | None, borders: torch.Tensor | None) -> Segment:
    """A rank's segment of the config's sequences, packed from documents or one; whole without a layout."""
    if layout is None:
        return make_segment(config.data.seq_len, cp=1, rank=0, cu_seqlens=borders)
    return layout.segment(config.data.seq_len, borders)


def model_inputs(batch: Batch, config: Config, device: torch.device, *, cut: bool = True) -> dict[str, Any]:
    """A batch as the model takes it; `cut`: by a layout that expects segments."""
    if config.model.hf:
        return _inputs_hf(batch, config, device)
    inputs: dict[str, Any] = {
        "input_ids": moved(batch.tokens, device),
        "shift_labels": moved(batch.labels, device),
        "positions": moved(batch.positions, device),
        "samples": moved(batch.slots, device),
        "cu_seqlens": batch.cu_seqlens,
        "prefix": config.data.prefix,
    }
    if cut:
        inputs["seq_len"] = config.data.seq_len
    if batch.source is not None and batch.source_segment is not None:
        inputs["source_ids"] = moved(batch.source, device)
        inputs["source_positions"] = moved(batch.source_segment.positions * config.data.source_every, device)
        if cut:
            inputs["source_len"] = batch.source_segment.seq_len
    return inputs


def _inputs_hf(batch: Batch, config: Config, device: torch.device) -> dict[str, Any]:
    """A batch as a cut model of transformers takes it."""
    segment = batch.segment
    assert segment is not None
    # padding reaches nobody, and its own positions may lie beyond what the model has
    positions = segment.document_positions.masked_fill(segment.positions >= segment.seq_len, 0)
    return {
        "input_ids": moved(batch.tokens, device),
        "shift_labels": moved(batch.labels, device),
        "position_ids": moved(positions, device)[None],
        "cu_seqlens": batch.cu_seqlens,
        "seq_len": config.data.seq_len,
    }


def forward_loss(
    model: nn.Module, batch: Batch, count: int | torch.Tensor, config: Config, dropout_seed: int | None = None
) -> torch.Tensor:
    """Global loss of one micro-batch, divided by `count` labels."""
    device = next(model.parameters()).device
    with autocast(config.train.dtype, device.type):
        inputs = model_inputs(batch, config, device)
        if config.model.hf:  # evaluation is of the text alone, without losses of routers
            inputs |= {} if model.training else {"output_router_logits": False}
        else:
            inputs["dropout_seed"] = dropout_seed
        return model(**inputs, num_items_in_batch=count).loss


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Batch], config: Config, *, step: int, count: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leave the gradient of the step's mean loss in every `.grad`; returns that loss (float64) and the labels counted.

    Both are on the device, which has perhaps not yet computed them: nothing here waits for it. The mean runs over the
    labels of all micro-batches on all ranks together. A step without any label has loss 0 and gradient 0.
    """
    count = count_labels(model, batches) if count is None else count
    loss = torch.zeros((), dtype=torch.float64, device=count.device)
    for number, batch in enumerate(batches):
        last = number + 1 == len(batches)
        with nullcontext() if last else layout_of(model).no_sync():
            part = forward_loss(model, batch, count, config, fold(config.train.seed, step))
            part.backward()
        loss += part.detach()
    return loss, count
