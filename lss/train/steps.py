"""The part of a training step that gives gradients; `lss check` holds it against one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from lss.data.loader import Batch
from lss.kernels.dropout import fold
from lss.parallel import layout_of

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def parameter_dtype(dtype: str) -> torch.dtype:
    """Parameters are kept in float32 for bfloat16 training, whose matrix products alone are rounded."""
    return torch.promote_types(DTYPES[dtype], torch.float32)


def autocast(dtype: str, device_type: str) -> torch.autocast | nullcontext:
    """The context in which a forward pass runs."""
    return torch.autocast(device_type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def count_labels(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Labels counted in these micro-batches on all ranks. Collectives: one all-reduce of one number."""
    local = sum(int((batch.labels != -100).sum()) for batch in batches)
    total = torch.tensor(local, dtype=torch.int64, device=next(model.parameters()).device)
    return int(layout_of(model).all.all_reduce(total, "labels").wait())


def forward_loss(
    model: nn.Module, batch: Batch, count: int, seq_len: int, dtype: str, dropout_seed: int | None = None
) -> torch.Tensor:
    """Global loss of one micro-batch, divided by `count` labels."""
    device = next(model.parameters()).device
    with autocast(dtype, device.type):
        output = model(
            batch.tokens.to(device),
            shift_labels=batch.labels.to(device),
            positions=batch.positions.to(device),
            samples=batch.slots.to(device),
            num_items_in_batch=count,
            dropout_seed=dropout_seed,
            seq_len=seq_len,
        )
    return output.loss


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Batch], *, seq_len: int, dtype: str, seed: int, step: int
) -> tuple[float, int]:
    """Leave the gradient of the step's mean loss in every `.grad`; returns that loss and the labels counted.

    The mean runs over the labels of all micro-batches on all ranks together. A step without any label has loss 0 and
    gradient 0.
    """
    count = count_labels(model, batches)
    loss = torch.zeros(())
    for number, batch in enumerate(batches):
        last = number + 1 == len(batches)
        with nullcontext() if last else layout_of(model).no_sync():
            part = forward_loss(model, batch, max(count, 1), seq_len, dtype, fold(seed, step))
            part.backward()
        loss = loss + part.detach().double().cpu()
    return float(loss), count
