"""What rank processes compute in the parity tests of whole models: gradients of every parameter against one process."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

import lss
from lss.comm import count_collectives
from lss.config import ModelConfig
from lss.kernels.conv import conv_reference
from lss.kernels.dropout import keyed_keep
from lss.kernels.scan import scan_reference
from lss.model import ModelOps, Transformer
from lss.parallel import clip_grad_norm_, layout_of
from tests.distributed.cases import visible
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


def one_process(config, seq_len, dtype, data, dropout_seed=None, device="cpu", **given):
    """Loss of each micro-batch and every gradient on one process, all labels of all micro-batches in one mean.

    Attention is `softmax_attention` below, a scan the loop over tokens, and convolution and loss torch's, of all logits:
    plain, whole, by autograd.
    """
    model = Transformer(config, seq_len, seed=3).to(device, dtype)
    count = sum(int((labels != -100).sum()) for _, labels in data)
    edges = given.pop("edges", None)
    ops = ModelOps(attention=partial(softmax_attention, edges=edges), source_attention=softmax_attention,
                   cross_attention=partial(softmax_attention, cross=True), loss=torch_loss,
                   scan=partial(scan_reference, edges=tuple(edges or ())),
                   conv=partial(conv_reference, edges=tuple(edges or ())))  # fmt: skip
    positions = torch.arange(seq_len, device=device)
    if edges is not None:
        positions = torch.cat([torch.arange(b - a, device=device) for a, b in pairwise(edges)])
    losses = []
    for ids, labels in data:
        output = model(ids, shift_labels=labels, num_items_in_batch=count, dropout_seed=dropout_seed, positions=positions,
                       ops=ops, **given)  # fmt: skip
        output.loss.backward()
        losses.append(float(output.loss.detach()))
    return losses, {name: p.grad for name, p in model.named_parameters()}, output.logits.detach()


def torch_loss(hidden, weight, labels, count):
    """Cross-entropy of all logits by autograd, what the loss by tiles is held to."""
    logits = F.linear(hidden, weight).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.flatten(), reduction="sum") / count


def softmax_attention(q, k, v, rules, edges=None, cross=False):
    """Attention by the rules, in plain torch and by autograd: what every layout is held to."""
    allowed = visible(q.shape[1], rules.causal, rules.window, edges, rules.prefix, k.shape[1] if cross else None)
    if rules.keep is not None:
        kept = torch.zeros(k.shape[0], k.shape[1], dtype=torch.bool)
        for row, runs in enumerate(rules.keep):
            for a, b in runs:
                kept[row, a:b] = True
        allowed = allowed & kept[:, None, None, :] & (True if cross else kept[:, None, :, None])
    if rules.mask_mod is not None:
        allowed = allowed & create_mask(rules.mask_mod, q.shape[0], q.shape[2], q.shape[1], k.shape[1], device="cpu")
    allowed = allowed.to(q.device)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    i, j = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=q.device)
    if rules.softcap:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if rules.slopes is not None:
        scores = scores - rules.slopes.to(scores)[:, None, None] * (i[:, None] - j).abs()
    scores = scores.masked_fill(~allowed, float("-inf"))
    if rules.sinks is not None:
        scores = torch.cat((scores, rules.sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
    p = scores.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0).softmax(-1)
    p = p.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)[..., : len(j)]
    if rules.dropout_p:
        heads = torch.arange(q.shape[2], device=q.device)
        keep = keyed_keep(rules.dropout_p, seed=rules.seed, samples_B=rules.samples, heads_N=heads, i=i, j=j)
        p = p * keep / (1 - rules.dropout_p)
    return (p @ values).transpose(1, 2)


def gradient_errors(found: dict, expected: dict) -> dict[str, float]:
    """||a-b|| / max(||b||, 1e-6 x the norm of all gradients), by parameter."""
    total = torch.stack([g.double().norm() for g in expected.values()]).norm()
    return {
        name: float((found[name].double() - g.double()).norm() / torch.maximum(g.double().norm(), 1e-6 * total))
        for name, g in expected.items()
    }


REFERENCES: dict[str, tuple] = {}
MOST_REFERENCES = 100


def plain_values(given: dict) -> list:
    """What a case is given, in full, as numbers."""
    return [(name, x.tolist() if isinstance(x, torch.Tensor) else x) for name, x in sorted(given.items())]


def parity_case(
    cp, dp=1, *, seq_len=24, rows=None, labels="even", accumulate=1, dtype=torch.float64, model=None, precut=False,
    given=None, per_node=None, **options,
):  # fmt: skip
    """Compare one step's losses, gradients, gradient norm and clipped gradients with one process.

    Returns a dict: worst gradient error and its parameter, relative errors of loss, norm and logits, and the
    collectives counted.
    """
    the_mesh = mesh(cp, dp, per_node)
    config = model_config(**(model or {}))
    rows = rows or 2 * dp
    device = the_mesh.device_type
    data = [(ids.to(device), y.to(device)) for ids, y in batches(seq_len, rows, config.vocab_size, labels, accumulate)]
    seed = 11 if config.dropout or config.attention_dropout else None
    given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in (given or {}).items()}
    if config.kind == "encoder_decoder":
        generator = torch.Generator().manual_seed(7)
        given["source_ids"] = torch.randint(config.vocab_size, (rows, 2 * seq_len // 3 + 1), generator=generator).to(device)
        if config.positions == "rope":
            given["source_positions"] = 2 * torch.arange(2 * seq_len // 3 + 1, device=device)
    borders = given.get("cu_seqlens")
    plain = {name: x for name, x in given.items() if name != "cu_seqlens"}
    plain |= {} if borders is None else {"edges": borders.tolist()}
    # cases that differ in the layout alone are held to the same numbers, computed once in each rank's process
    case = repr((config, seq_len, dtype, rows, labels, accumulate, seed, str(device), plain_values(plain)))
    if case not in REFERENCES:
        REFERENCES[case] = one_process(config, seq_len, dtype, data, seed, device, **plain)
        if len(REFERENCES) > MOST_REFERENCES:
            del REFERENCES[next(iter(REFERENCES))]
    losses, expected, expected_logits = REFERENCES[case]
    parallel = lss.parallelize(Transformer(config, seq_len, seed=3).to(device, dtype), the_mesh, precut=precut, **options)
    layout = layout_of(parallel)
    if layout.offloader is not None:
        layout.offloader.least_bytes = 1  # the tensors here are small
    count = sum(int((shifted != -100).sum()) for _, shifted in data)
    mine = slice(layout.dp.rank * rows // dp, (layout.dp.rank + 1) * rows // dp)
    by_row = ("attention_mask", "source_ids", "source_mask")
    given = {name: x[mine] if name in by_row else x for name, x in given.items()}
    found_losses = []
    with count_collectives() as counter:
        for number, (ids, shifted) in enumerate(data):
            batch = given | {"shift_labels": shifted[mine], "num_items_in_batch": count, "dropout_seed": seed}
            ids = ids[mine]
            if precut:
                segment = layout.segment(seq_len, borders)
                ids = lss.shard(ids, the_mesh, seg=segment, pad_value=0)
                batch |= {"shift_labels": lss.shard(batch["shift_labels"], the_mesh, seg=segment),
                          "positions": segment.document_positions.to(device), "seq_len": seq_len}  # fmt: skip
                if "source_ids" in batch:
                    whole = batch["source_ids"]
                    source = layout.source_segment(whole.shape[1])
                    batch["source_ids"] = lss.shard(whole, the_mesh, seg=source, pad_value=0)
                    batch["source_len"] = whole.shape[1]
                    if "source_positions" in batch:
                        batch["source_positions"] = lss.shard(batch["source_positions"], the_mesh, dim=0, seg=source)
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
    logits = lss.unshard(output.logits.detach(), the_mesh, seg=layout.segment(seq_len, borders))
    return {
        "gradient": errors[worst],
        "parameter": worst,
        "loss": max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(found_losses, losses, strict=True)),
        "logits": float((logits - expected_logits[mine]).norm() / expected_logits[mine].norm()),
        **_norm_errors(parallel, layout, expected),
        "rows": counter.rows(),
        "away": None if layout.offloader is None else layout.offloader.tally,
        "checksum": [float(g.double().sum()) for g in found.values()],
    }


def hold_parity(results: list[dict], dtype: torch.dtype) -> None:
    """Assert that every rank's `parity_case` lies within the dtype's bound."""
    bound = BOUNDS[dtype]
    for rank, result in enumerate(results):
        assert result["gradient"] <= bound, f"rank {rank}: {result['parameter']}"
        for what in ("loss", "logits", "norm", "clipped"):
            assert result[what] <= bound, f"rank {rank}: {what}"
    # replicated gradients are the same numbers on every rank, to the bit
    assert all(result["checksum"] == results[0]["checksum"] for result in results)


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
