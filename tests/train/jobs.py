"""What rank processes compute in the tests of training."""

from __future__ import annotations

import hashlib
import io
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

from lss.config import Config, load_config
from lss.data.loader import Batch
from lss.model import Transformer
from lss.parallel import full_state_dict, layout_of
from lss.train.evaluate import evaluate
from lss.train.models import build_model
from lss.train.steps import accumulate_gradients
from lss.train.trainer import Trainer
from tests.distributed.model_cases import gradient_errors
from tests.distributed.pool import mesh
from tests.faults.ranks import TEXT

TINY = [
    TEXT,
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.d_mlp=48",
    "data.seq_len=48",
    "train.batch_size=4",
    "train.eval_samples=4",
    "train.eval_every=0",
    "train.dtype=float64",
]


def config_of(ranks: int, *overrides: str) -> Config:
    """A config small enough to train hundreds of steps in a test."""
    return load_config(None, [*TINY, *overrides]).resolved(ranks)


def train_run(ranks: int, out: str, overrides: list[str]):
    """Train in this pool's ranks; returns losses, held-out losses and a digest of this rank's view of all weights."""
    config = config_of(ranks, *overrides)
    trainer = Trainer(config, mesh(config.parallel.cp, config.parallel.dp), Path(out))
    losses, step = [], trainer.done_steps
    original = trainer.train_step

    def recorded(step):
        row = original(step)
        losses.append(row["loss"])
        return row

    trainer.train_step = recorded
    last = trainer.train()
    weights = full_state_dict(trainer.model)
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {"losses": losses, "from": step, "eval": last.get("eval_loss"), "digest": digest.hexdigest(),
            "weights": weights}  # fmt: skip


def deterministic_run(ranks: int, out: str, overrides: list[str]):
    """`train_run` as `lss train` runs it with train.deterministic=true."""
    torch.use_deterministic_algorithms(True)
    try:
        return train_run(ranks, out, ["train.deterministic=true", *overrides])
    finally:
        torch.use_deterministic_algorithms(False)


def uneven_batches(config: Config, segment, rows: slice, count: int) -> list[Batch]:
    """`count` micro-batches of random tokens whose numbers of labels differ widely, cut like `segment`."""
    generator = torch.Generator().manual_seed(7)
    S, total = config.data.seq_len, config.train.batch_size
    batches = []
    for micro in range(count):
        tokens = torch.randint(256, (total, S), generator=generator)
        labels = torch.randint(256, (total, S), generator=generator)
        for row in range(total):
            labels[row, : S * (row + 3 * micro) // (total + 3 * count)] = -100
        positions = segment.positions
        held = positions.clamp(max=S - 1)
        padding = positions >= S
        cut = [x[rows][:, held].masked_fill(padding, fill) for x, fill in ((tokens, 0), (labels, -100))]
        batches.append(Batch(tokens=cut[0], labels=cut[1], positions=positions, slots=torch.arange(total)[rows],
                             sample_ids=torch.arange(total)[rows]))  # fmt: skip
    return batches


def uneven_accumulation(ranks: int, overrides: list[str]):
    """Errors of loss and gradients, and of the held-out loss, over micro-batches with different numbers of labels."""
    config = config_of(ranks, *overrides)
    the_mesh = mesh(config.parallel.cp, config.parallel.dp)
    model = build_model(config, the_mesh)
    layout, S = layout_of(model), config.data.seq_len
    per_rank = config.train.batch_size // layout.dp.size
    mine = slice(layout.dp.rank * per_rank, (layout.dp.rank + 1) * per_rank)
    batches = uneven_batches(config, layout.segment(S), mine, 3)
    loss, counted = map(float, accumulate_gradients(model, batches, config, step=1))
    held_out = evaluate(model, batches, config)
    found = {name: layout.whole(name, p.grad) for name, p in model.named_parameters()}

    plain = Transformer(config.model, S, seed=config.train.seed).double()
    alone = replace(layout.segment(S), cp=1, rank=0)
    whole = uneven_batches(config, alone, slice(None), 3)
    count = sum(int((batch.labels != -100).sum()) for batch in whole)
    logits = [plain(batch.tokens).logits.flatten(0, 1) for batch in whole]
    expected = sum(torch.nn.functional.cross_entropy(x, batch.labels.flatten(), reduction="sum")
                   for x, batch in zip(logits, whole, strict=True)) / count  # fmt: skip
    expected.backward()
    errors = gradient_errors(found, {name: p.grad for name, p in plain.named_parameters()})
    value = float(expected.detach())
    return {"loss": abs(loss / value - 1), "held_out": abs(held_out / value - 1), "gradient": max(errors.values()),
            "counted": counted == count}  # fmt: skip


def no_labels(ranks: int):
    """A step in which no label is counted anywhere: loss, count, and whether all gradients are zero and finite."""
    config = config_of(ranks)
    model = build_model(config, mesh(ranks))
    S = config.data.seq_len
    batches = uneven_batches(config, layout_of(model).segment(S), slice(None), 1)
    batches = [replace(batch, labels=torch.full_like(batch.labels, -100)) for batch in batches]
    loss, counted = map(float, accumulate_gradients(model, batches, config, step=1))
    return loss, counted, all(not p.grad.any() for p in model.parameters())


def noted_run(out: str) -> str:
    """What one rank prints of a run whose steps are told of."""
    text = io.StringIO()
    with redirect_stdout(text):
        config = config_of(1, "train.steps=3")
        Trainer(config, mesh(1), Path(out), on_step=lambda row: [f"told of {row['step']}"]).train()
    return text.getvalue()
