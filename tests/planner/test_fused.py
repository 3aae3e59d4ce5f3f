"""What a compiled piece would not write is no part of a plan's memory."""

from __future__ import annotations

import json

import pytest
import torch

from lss.config import load_config
from lss.planner import HARDWARE, Ledger, make_plan
from tests.test_house import ROOT

N = 1000
BYTES = 4 * N * N


def ledger_of(step, *, fuses=True, phase="forward"):
    """The ledger of a step of an (N, N) tensor that was there before."""
    ledger, x = Ledger(fuses=fuses, vocabulary=7), torch.ones(N, N)
    with ledger:
        ledger.own("weights", [x])
        ledger.enter(phase)
        step(x, ledger)
        ledger.closed = True
    return ledger.peak().bytes // BYTES - 1


def chained(x, ledger):
    return ((x * 2 + 1).exp() - x).sum()


def multiplied(x, ledger):
    y = x * 2 + 1
    return y @ y


def kept_for_the_next_piece(x, ledger):
    y = x * 2
    z = torch.empty(3)  # code that is not compiled
    return y, z


def left_over(x, ledger):
    y = x * 2
    ledger.enter("backward")
    return y.sum()


def owned(x, ledger):
    y = x * 2
    ledger.own("gradients", [y])
    return y.sum()


def copied_into(x, ledger):
    whole = torch.empty_like(x)
    whole.copy_(x * 2)
    return whole


@pytest.mark.parametrize("step, whole, fused", [
    (chained, 2, 0), (multiplied, 2, 2), (kept_for_the_next_piece, 1, 1), (left_over, 1, 1), (owned, 1, 1),
    (copied_into, 2, 2),
])  # fmt: skip
def test_only_what_something_else_reads_is_in_memory(step, whole, fused):
    """`multiplied`: the sum of the product's operand and of its result; what it was made of is gone or was never there."""
    assert ledger_of(step, fuses=False) == whole
    assert ledger_of(step) == fused


def test_the_update_is_not_compiled():
    assert ledger_of(chained, phase="update") == 2


@pytest.mark.parametrize("file, tokens, ranks, layers", [
    ("length-h100.jsonl", 524288, 1, 16), ("train-h200.jsonl", 262144, 1, 8), ("train-h100.jsonl", 262144, 1, 16),
])  # fmt: skip
def test_compiled_steps_take_what_is_planned(file, tokens, ranks, layers):
    """Measured on GPUs; without these rules plans were 5 to 18 % above."""
    rows = map(json.loads, (ROOT / "benchmarks/results" / file).read_text().splitlines())
    row = next(row for row in rows if (row["tokens"], row["world_size"], row["layers"]) == (tokens, ranks, layers))
    tricks = ["model.residual=compute", "memory.checkpointing=attention", "memory.offload=host"]
    first = "--steps 1" in row["command"]
    tricks += ["memory.offload_gib=70"] if first else ["memory.optimizer=host"]
    shape = [f"data.seq_len={tokens}", f"model.n_layers={layers}"]
    plan = make_plan(load_config(str(ROOT / "configs/llama-1b.toml"), [*tricks, *shape]).resolved(ranks), HARDWARE["h100"])
    planned = plan.peak.bytes - first * plan.peak.classes.get("optimizer", 0)
    assert planned == pytest.approx(row["peak_bytes"], rel=0.07)
