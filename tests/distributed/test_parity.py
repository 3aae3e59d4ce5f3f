"""The parity grid: loss, every parameter's gradient, gradient norm and clipping equal one process.

float64 to 1e-12 and float32 to 2e-6 relative error per parameter, over meshes, orders, strategies, positions, heads,
head chunks, lengths that divide and that do not, even and uneven labels, and accumulation.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.distributed.model_cases import hold_parity, parity_case
from tests.distributed.pool import pool

MESHES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]
ORDERS = ["head_tail", "contiguous"]
LEARNED = {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "tie_embeddings": False}
POSITIONS = {"rope": {}, "learned": LEARNED}
LENGTHS = [24, 23]  # 24 divides by every number of chunks here, 23 by none
# each case takes the next pair, so that every other option meets all of them
LABELS = [("even", 1), ("uneven", 3), ("even", 3), ("uneven", 1)]
# (query heads, key heads, head chunks): MHA, GQA, MQA; one chunk, two, as many as there are key heads
HEADS = [(4, 4, 1), (4, 4, 4), (4, 2, 1), (4, 2, 2), (4, 1, 1), (6, 3, 2)]


def lss_cases():
    """Every mesh, order, position kind, length and head layout under strategy lss."""
    grid = product(MESHES, ORDERS, POSITIONS, LENGTHS, HEADS)
    for number, ((cp, dp), order, positions, seq_len, (n, k, chunks)) in enumerate(grid):
        labels, accumulate = LABELS[(number + number // len(HEADS)) % len(LABELS)]
        model = POSITIONS[positions] | {"n_heads": n, "n_kv_heads": k, "d_model": 8 * n}
        name = f"cp{cp}-dp{dp}-{order}-{positions}-S{seq_len}-{n}_{k}heads-{chunks}chunks-{labels}-acc{accumulate}"
        options = {"model": model, "order": order, "seq_len": seq_len, "head_chunks": chunks, "labels": labels,
                   "accumulate": accumulate, "regather": number % 3 != 0}  # fmt: skip
        yield pytest.param(cp, dp, options, id=name)


def rival_cases():
    """The same meshes, orders, positions and lengths under each rival."""
    grid = product(["ring", "ulysses", "tp"], MESHES, ORDERS, POSITIONS, LENGTHS)
    for number, (strategy, (cp, dp), order, positions, seq_len) in enumerate(grid):
        labels, accumulate = LABELS[(number + number // 4) % len(LABELS)]
        # tp needs heads and MLP width that its ranks divide; the others take any
        n, k = ((6, 3) if cp == 3 else (4, 4)) if strategy == "tp" else [(4, 2), (6, 3), (3, 1), (5, 5)][number % 4]
        model = POSITIONS[positions] | {"n_heads": n, "n_kv_heads": k, "d_model": 8 * n}
        options = {"strategy": strategy, "model": model, "order": order, "seq_len": seq_len, "labels": labels,
                   "accumulate": accumulate, "regather": number % 3 != 0}  # fmt: skip
        name = f"{strategy}-cp{cp}-dp{dp}-{order}-{positions}-S{seq_len}-{n}_{k}heads-{labels}-acc{accumulate}"
        yield pytest.param(cp, dp, options, id=name)


def other_cases():
    """What stands beside the grid: float32, precut batches, checkpointing, dropout, the reference kernel, odd lengths."""
    for (cp, dp), strategy in product(MESHES, ["lss", "ring", "ulysses", "tp"]):
        heads = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48} if cp == 3 else {"n_kv_heads": 4}
        shared = {"strategy": strategy, "model": heads, "labels": "uneven"}
        yield pytest.param(cp, dp, shared | {"dtype": torch.float32}, id=f"float32-{strategy}-cp{cp}-dp{dp}")
        learned = {"model": LEARNED | heads, "seq_len": 22, "precut": True}
        yield pytest.param(cp, dp, shared | learned, id=f"precut-{strategy}-cp{cp}-dp{dp}")
        recomputed = {"model": heads | {"dropout": 0.25}, "checkpointing": "full"}
        yield pytest.param(cp, dp, shared | recomputed, id=f"dropout-recompute-{strategy}-cp{cp}-dp{dp}")
    for (cp, dp), seq_len in product(MESHES, [1, 2, 5, 7]):
        # fewer tokens than chunks: some ranks hold nothing but padding
        options = {"seq_len": seq_len, "model": LEARNED, "kernel": "reference"}
        yield pytest.param(cp, dp, options, id=f"S{seq_len}-reference-cp{cp}-dp{dp}")
    for cp, dp in MESHES:
        yield pytest.param(cp, dp, {"labels": "one"}, id=f"one-label-cp{cp}-dp{dp}")


BORDERS = {"cu_seqlens": torch.tensor([0, 1, 2, 9, 23], dtype=torch.int32)}  # one row: documents come one sequence at a time
PADDING = {"attention_mask": torch.tensor([[1] * 23, [1] * 9 + [0] * 14, [0] * 5 + [1] * 18, [1, 0] * 11 + [1]])}
# model and batch of each feature of the support table that a whole model can have; S = 23 divides by no number of chunks
FEATURES = {
    "documents": {"given": BORDERS},
    "documents-learned": {"given": BORDERS, "model": LEARNED, "packed": True},
    "documents-window": {"given": BORDERS, "model": {"windows": (4, 0)}},
    "windows": {"model": {"windows": (5, 2, 0), "n_layers": 3}},
    "window-1": {"model": {"windows": (1, 0)}},
    "window-dropout": {"model": {"windows": (3,), "attention_dropout": 0.3}, "checkpointing": "full"},
    "encoder": {"model": {"kind": "encoder"}},
    "encoder-window-alibi": {"model": {"kind": "encoder", "windows": (6,), "positions": "alibi"}},
    "encoder-documents": {"given": BORDERS, "model": {"kind": "encoder"}},
    "prefix": {"given": {"prefix": 7}},
    "prefix-documents": {"given": BORDERS | {"prefix": 3}},
    "padding": {"given": PADDING},
    "padding-encoder": {"given": PADDING, "model": {"kind": "encoder"}},
    "alibi": {"model": {"positions": "alibi"}},
    "softcap-sinks": {"model": {"softcap": 1.5, "sinks": True}},
    "all-dropout": {"model": {"attention_dropout": 0.25, "dropout": 0.25}, "checkpointing": "full"},
}
SEQ2SEQ = {
    "seq2seq": {"model": {"kind": "encoder_decoder"}},
    "seq2seq-learned-dropout": {"model": LEARNED | {"kind": "encoder_decoder", "attention_dropout": 0.2, "sinks": True}},
}


def feature_cases():
    """Every feature on every mesh: under lss in each order, under its rivals, and in float32."""
    for (cp, dp), (name, options) in product(MESHES, (FEATURES | SEQ2SEQ).items()):
        # documents come one row at a time; padding has four rows
        rows = dp if options.get("given", {}).keys() & BORDERS.keys() else 4
        shared = {"seq_len": 23, "labels": "uneven", "rows": rows} | options
        heads = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48}
        shared["model"] = heads | options.get("model", {})
        for number, order in enumerate(["head_tail", "contiguous", "balanced"]):
            if rows == dp > 1 and order == "balanced":
                continue  # every dp rank has the same borders here
            how = {"order": order, "regather": number != 1, "head_chunks": [1, 3, "auto"][number], "precut": number == 2}
            yield pytest.param(cp, dp, shared | how, id=f"{name}-{order}-cp{cp}-dp{dp}")
        if name != "window-1":  # q and k of a single key have gradient 0, of which float32 leaves rounding alone
            yield pytest.param(cp, dp, shared | {"dtype": torch.float32}, id=f"{name}-float32-cp{cp}-dp{dp}")
        for strategy in ("ring", "ulysses", "tp") if name in FEATURES else ():
            model = shared["model"] if cp in (1, 3) else shared["model"] | {"n_heads": 4, "n_kv_heads": 4, "d_model": 32}
            how = {"strategy": strategy, "model": model}
            yield pytest.param(cp, dp, shared | how, id=f"{name}-{strategy}-cp{cp}-dp{dp}")


ALL_CASES = [*lss_cases(), *rival_cases(), *other_cases(), *feature_cases()]


@pytest.mark.parametrize("cp, dp, options", ALL_CASES)
def test_gradients_equal_one_process(cp, dp, options):
    results = pool(cp * dp).run(parity_case, cp, dp, **options)
    hold_parity(results, options.get("dtype", torch.float64))


def test_grid_has_at_least_1000_cases():
    assert len(ALL_CASES) >= 1000
