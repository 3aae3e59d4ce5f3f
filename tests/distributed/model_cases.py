"""What rank processes compute in the parity tests of whole models: gradients of every parameter against one process."""

from __future__ import annotations

import torch

import lss
from lss.comm import count_collectives
from lss.config import ModelConfig
from lss.model import Transformer
from lss.parallel import clip_grad_norm_, layout_of
from tests.distributed.pool import mesh

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6}


def model_config(**changes) -> ModelConfig:
    """A small decoder with every part that parallel layouts treat specially."""
    values = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=48, vocab_size=61, positions="rope",
                  norm="rmsnorm", mlp="swiglu", tie_embeddings=True, dropout=0.0)  # fmt: skip
    return ModelConfig(**(values | changes))


def batches(seq_len: int, rows: int, vocab: int, labels: str, count: int, seed: int = 1):
    """`count` whole batches (ids, shifted labels). labels: "even", "uneven" (prompts masked), "one" (one row only)."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        tokens = torch.randint(vocab, (rows, seq_len + 1), generator=generator)
        ids, shifted = tokens[:, :-1], tokens[:, 1:].clone()
        if labels == "uneven":  # most of the beginning is masked, a different amount in each row
            for row in range(rows):
                shifted[row, : (seq_len * (5 + row)) // (8 + row)] = -100
            shifted[:, -1] = -100
        if labels == "one":  # a single counted label in the whole batch: most ranks count none
            keep = shifted[0, seq_len // 2].item()
            shifted.fill_(-100)
            shifted[0, seq_len // 2] = keep
        out.append((ids, shifted))
    return out


def one_process(config, seq_len, dtype, data, dropout_seed=None, device="cpu"):
    """Loss of each micro-batch and every gradient on one process, all labels of all micro-batches in one mean."""
    model = Transformer(config, seq_len, seed=3).to(device, dtype)
    count = sum(int((labels != -100).sum()) for _, labels in data)
    losses = []
    for ids, labels in data:
        output = model(ids, shift_labels=labels, num_items_in_batch=count, dropout_seed=dropout_seed)
        output.loss.backward()
        losses.append(float(output.loss.detach()))
    return losses, {name: p.grad for name, p in model.named_parameters()}, output.logits.detach()


def gradient_errors(found: dict, expected: dict) -> dict[str, float]:
    """||a-b|| / max(||b||, 1e-6 x the norm of all gradients), by parameter."""
    total = torch.stack([g.double().norm() for g in expected.values()]).norm()
    return {
        name: float((found[name].double() - g.double()).norm() / torch.maximum(g.double().norm(), 1e-6 * total))
        for name, g in expected.items()
    }


def parity_case(
    cp, dp=1, *, seq_len=24, rows=None, labels="even", accumulate=1, dtype=torch.float64, model=None, precut=False, **options
):
    """Compare one step's losses, gradients, gradient norm and clipped gradients with one process.

    Returns a dict: worst gradient error and its parameter, relative errors of loss, norm and logits, and the
    collectives counted.
    """
    the_mesh = mesh(cp, dp)
    config = model_config(**(model or {}))
    rows = rows or 2 * dp
    device = the_mesh.device_type
    data = [(ids.to(device), y.to(device)) for ids, y in batches(seq_len, rows, config.vocab_size, labels, accumulate)]
    seed = 11 if config.dropout else None
    losses, expected, expected_logits = one_process(config, seq_len, dtype, data, seed, device)
    parallel = lss.parallelize(Transformer(config, seq_len, seed=3).to(device, dtype), the_mesh, precut=precut, **options)
    layout = layout_of(parallel)
    count = sum(int((shifted != -100).sum()) for _, shifted in data)
    mine = slice(layout.dp.rank * rows // dp, (layout.dp.rank + 1) * rows // dp)
    found_losses = []
    with count_collectives() as counter:
        for number, (ids, shifted) in enumerate(data):
            batch = {"shift_labels": shifted[mine], "num_items_in_batch": count, "dropout_seed": seed}
            ids = ids[mine]
            if precut:
                segment = layout.segment(seq_len)
                ids = lss.shard(ids, the_mesh, seg=segment, pad_value=0)
                batch |= {"shift_labels": lss.shard(batch["shift_labels"], the_mesh, seg=segment),
                          "positions": segment.positions.to(device), "seq_len": seq_len}  # fmt: skip
            if number + 1 < len(data):
                with parallel.no_sync():
                    output = parallel(ids, **batch)
                    output.loss.backward()
            else:
                output = parallel(ids, **batch)
                output.loss.backward()
            found_losses.append(float(output.loss.detach()))
    found = {name: layout.whole(name, p.grad) for name, p in parallel.named_parameters()}
    errors = gradient_errors(found, expected)
    worst = max(errors, key=errors.get)
    logits = lss.unshard(output.logits.detach(), the_mesh, seg=layout.segment(seq_len))
    return {
        "gradient": errors[worst],
        "parameter": worst,
        "loss": max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(found_losses, losses, strict=True)),
        "logits": float((logits - expected_logits[mine]).norm() / expected_logits[mine].norm()),
        **_norm_errors(parallel, layout, expected),
        "rows": counter.rows(),
        "checksum": [float(g.double().sum()) for g in found.values()],
    }


def _norm_errors(parallel, layout, expected) -> dict[str, float]:
    """Relative errors of the gradient norm and of every clipped gradient against torch's clipping on one process."""
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm()
    limit = float(norm) / 3
    parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in expected.values()]
    for parameter, g in zip(parameters, expected.values(), strict=True):
        parameter.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    measured = clip_grad_norm_(parallel, limit)
    clipped = {name: layout.whole(name, p.grad) for name, p in parallel.named_parameters()}
    errors = gradient_errors(clipped, dict(zip(expected, (p.grad for p in parameters), strict=True)))
    return {"norm": abs(float(measured) / float(norm) - 1), "clipped": max(errors.values())}
