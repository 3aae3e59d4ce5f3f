"""Loss on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from lss.config import Config
from lss.data.reader import Batch
from lss.parallel import layout_of
from lss.train.steps import forward_loss


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], config: Config, stop: Callable[[], bool] = lambda: False
) -> float:
    """Mean cross-entropy in nats over all labels of all batches on all ranks: one sum over one count.

    Every rank must be given equally many batches. `stop` is asked after each, and tells every rank the same: where it is
    true, evaluation ends there. Returns NaN then, and where no label is counted at all.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, counted = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        # divided by 1, the loss of a batch is its sum, so that batches weigh by their labels
        total += forward_loss(model, batch, 1, config)
        counted += int((batch.labels != -100).sum())
        if stop():
            model.train(was_training)
            return math.nan
    model.train(was_training)
    labels = torch.full((), counted, dtype=torch.int64, device=device)
    labels = int(layout_of(model).all.all_reduce(labels, "labels").wait())
    return float(total) / labels if labels else math.nan


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)
