"""Loss on held-out text, and on every token of a whole text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lss.config import Config
from lss.config.errors import refuse
from lss.data.reader import IGNORE_INDEX, Batch
from lss.data.sources import Split
from lss.data.windows import WindowReader, runs_of_items
from lss.parallel import layout_of
from lss.tiled import LOGITS_BYTES, compute_dtype, tile_budget, tile_size
from lss.train.steps import autocast, forward_loss, model_inputs

# what is told of each batch: it, and its losses by token (B, T) where they are asked for
Seen = Callable[[int, Batch, torch.Tensor | None], None]


def evaluate(
    model: nn.Module, batches: Iterable[Batch], config: Config, stop: Callable[[], bool] = lambda: False
) -> float:
    """Mean cross-entropy in nats over all labels of all batches on all ranks: one sum over one count.

    Every rank must be given equally many batches. `stop` is asked after each, and tells every rank the same: where it is
    true, evaluation ends there. Returns NaN then, and where no label is counted at all.
    """
    found = sum_losses(model, batches, config, stop=stop)
    if found is None:
        return math.nan
    nats, labels = found
    return nats / labels if labels else math.nan


@torch.no_grad()
def sum_losses(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config,
    *,
    stop: Callable[[], bool] = lambda: False,
    seen: Seen = lambda number, batch, losses: None,
    by_token: bool = False,
) -> tuple[float, int] | None:
    """(sum of the losses in nats, labels counted) over all batches on all ranks; None where `stop` ended it.

    Args:
        by_token: compute each token's loss by itself, for `seen`; the sum is of these.

    Collectives: those of the model's forward, an all-reduce of two numbers a batch (with `by_token` one at the end), and
    one of the count.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, counted = torch.zeros((), dtype=torch.float64, device=device), 0
    stopped = False
    for number, batch in enumerate(batches):
        losses = token_losses(model, batch, config) if by_token else None
        # divided by 1, the loss of a batch is its sum, so that batches weigh by their labels
        total += forward_loss(model, batch, 1, config) if losses is None else losses.sum(dtype=torch.float64)
        counted += int((batch.labels != IGNORE_INDEX).sum())
        seen(number, batch, losses)
        if stopped := stop():
            break
    model.train(was_training)
    if stopped:
        return None
    labels = torch.full((), counted, dtype=torch.int64, device=device)
    labels = int(layout_of(model).all.all_reduce(labels, "labels").wait())
    if by_token:  # a rank's own so far
        total = layout_of(model).all.all_reduce(total, "loss").wait()
    return float(total), labels


def token_losses(model: nn.Module, batch: Batch, config: Config) -> torch.Tensor:
    """Cross-entropy in nats of each of this rank's tokens: (B, T), float32 at least; 0 where no label is counted.

    Collectives: those of the model's forward; where its parameters are sharded, one more all-gather of its head.
    Memory: the logits of a tile of tokens; of a model of transformers those of all.
    """
    device = next(model.parameters()).device
    with autocast(config.train.dtype, device.type):
        inputs = model_inputs(batch, config, device)
        labels = inputs.pop("shift_labels")
        output: Any = model(**inputs)
        if config.model.hf:
            return _cross_entropy(output.logits, labels)
        hidden, weight = output.hidden, _head(model, output)
        size = hidden.shape[0] * weight.shape[0] * compute_dtype(hidden).itemsize
        step = tile_size("auto", hidden.shape[1], size, tile_budget(device, LOGITS_BYTES))
        parts = [_cross_entropy(F.linear(hidden[:, at : at + step], weight), labels[:, at : at + step])
                 for at in range(0, hidden.shape[1], step)]  # fmt: skip
    return torch.cat(parts, 1)


def _head(model: nn.Module, output: Any) -> torch.Tensor:
    """What logits are computed by; whole also where it is sharded, and given back at the end of the pass."""
    layout = layout_of(model)
    if layout.sharding is None:
        return output.weight
    layout.sharding.give_back()
    parameters = dict(model.named_parameters())
    name = next(name for name in ("lm_head.weight", "embedding.weight") if name in parameters)
    return layout.whole(name, parameters[name])


def _cross_entropy(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    logits = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, labels_BT.flatten(), reduction="none", ignore_index=IGNORE_INDEX).view(labels_BT.shape)


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)


# -- a whole text ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What `score` finds of a text.

    Attributes:
        nats: sum of the losses of all counted tokens.
        scored: how many these are.
        window, stride: the tokens that a sequence holds, and how far each lies behind the one before.
        seconds: what it took.
    """

    nats: float
    scored: int
    window: int
    stride: int
    seconds: float

    @property
    def nats_per_token(self) -> float:
        """Mean loss."""
        return self.nats / self.scored

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss; None where no float holds it."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else None

    @property
    def bits_per_token(self) -> float:
        """The mean loss in bits."""
        return bits(self.nats_per_token)

    def bits_per_byte(self, count: int | None) -> float | None:
        """The whole loss in bits over the bytes of text that the counted tokens stand for, where these are known."""
        return bits(self.nats) / count if count else None


def window_and_stride(config: Config, split: Split, window: int | None, stride: int | None) -> tuple[int, int]:
    """How a part is read: sequences of data.seq_len without overlap, or windows that overlap by half or by `stride`.

    No sequence is longer than what the part has of tokens in a row.

    Raises:
        Refused: a stride that leaves tokens out, or a part without two items in a row.
    """
    length = config.data.seq_len if window is None else window
    if window is None and stride is not None:
        raise refuse("--stride", stride, f"it is of windows; give --window too, as --window {length}")
    step = length if window is None else stride or max(1, length // 2)
    if step > length:
        raise refuse("--stride", step, f"tokens between windows of --window={length} would be left out; use 1 to {length}")
    runs = runs_of_items(split, config.data.packing)
    longest = int((runs[:, 1] - runs[:, 0]).max()) - 1
    # documents are laid behind one another, which takes room for several
    length = length if config.data.packing else min(length, longest)
    return length, min(step, length)


def score(
    model: nn.Module,
    split: Split,
    config: Config,
    stride: int,
    *,
    keep: Callable[[WindowReader], Seen] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """The loss of every token of a part but the first, each counted once, with the model's cut over ranks.

    Args:
        model: laid out, given segments.
        config: data.seq_len is the window.
        keep: made with the reader, it is told of every batch with the losses of its tokens.
        progress: called with (labels done, labels in all), on every rank.

    Collectives: those of `sum_losses`.
    """
    layout = layout_of(model)
    reader = WindowReader(
        split,
        window=config.data.seq_len,
        stride=stride,
        rows_per_batch=1 if config.data.packing else config.train.batch_size // config.train.accumulate // layout.dp.size,
        dp=layout.dp.size,
        dp_rank=layout.dp.rank,
        segment_of=lambda borders: layout.segment(config.data.seq_len, borders),
        documents=config.data.packing,
    )
    keeping, done = None if keep is None else keep(reader), 0

    def seen(number: int, batch: Batch, losses: torch.Tensor | None) -> None:
        nonlocal done
        if keeping is not None:
            keeping(number, batch, losses)
        done += sum(end - first for row in reader.rows_of(number) for first, end, _ in reader.places(row))
        progress(done, reader.labels)

    started = time.perf_counter()
    found = sum_losses(model, reader, config, seen=seen, by_token=keep is not None)
    assert found is not None
    nats, scored = found
    if not scored:
        raise refuse("data.path", split.corpus.name, f"no token of the {split.name} part is trained on, so none counts")
    return Score(nats, scored, config.data.seq_len, stride, time.perf_counter() - started)
