"""A trace without data tells what a step with data does."""

from __future__ import annotations

import time

import pytest
import torch

from lss.config import load_config
from lss.config.errors import Refused
from lss.model import Transformer
from lss.planner import Ledger, trace_step
from lss.planner.trace import run_step
from lss.train.models import build_model, find_model
from tests.distributed.pool import mesh, pool

SMALL = ["model.d_model=32", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=2", "model.d_mlp=48",
         "data.seq_len=512", "train.batch_size=2", "train.dtype=float32", "parallel.transport=collective"]  # fmt: skip
RUNS = {
    "plain": [],
    "contiguous": ["parallel.order=contiguous", "parallel.regather=false"],
    "full": ["memory.checkpointing=full", "memory.tiles=64"],
    "attention": ["memory.checkpointing=attention", "memory.tiles=64", "train.accumulate=2"],
    "ring": ["parallel.strategy=ring"],
    "ulysses": ["parallel.strategy=ulysses"],
    "two-level": ["parallel.strategy=lss_2d", "parallel.inner=2"],
    "tp": ["parallel.strategy=tp", "model.n_kv_heads=4"],
    "chunks": ["parallel.head_chunks=2", "parallel.token_chunks=3"],
    "window": ["model.windows=[16,0]"],
    "bfloat16": ["train.dtype=bfloat16", "memory.checkpointing=attention"],
    "seq2seq": ["model.preset=tiny-encoder-decoder"],
    "hybrid": ["model.layers=sba", "model.scan_state=8", "model.windows=[64]"],
    "hybrid-full": ["model.layers=s", "model.scan_state=8", "memory.checkpointing=full", "train.dtype=bfloat16"],
    "learned": ["model.positions=learned", "model.dropout=0.1"],
}


def _config(world, overrides):
    return load_config(None, [*SMALL, *overrides]).resolved(world)


def _real(world, overrides):
    config = _config(world, overrides)
    model = build_model(config, mesh(config.parallel.cp, config.parallel.dp))
    trace = run_step(config, model)
    return trace.peak, trace.collectives, (trace.steady, trace.products)


# each on two ranks, or on as many as it needs; some on others too
WORLDS = [(4 if name == "two-level" else 2, name) for name in RUNS]
WORLDS += [(1, "plain"), (1, "full"), (4, "plain"), (4, "full"), (4, "ulysses"), (4, "chunks")]


@pytest.mark.parametrize("world, name", WORLDS)
def test_predicted_is_what_happens(world, name):
    """Collectives' bytes and calls and products' FLOPs, exactly; the peak of memory, and its classes, within a tenth."""
    overrides = RUNS[name]
    for rank, (peak, collectives, counts) in enumerate(pool(world).run(_real, world, overrides)):
        if rank not in (0, world - 1):
            continue
        found = trace_step(_config(world, overrides), rank=rank)
        assert found.collectives == collectives
        assert (found.steady, found.products) == counts
        assert found.peak.bytes == pytest.approx(peak.bytes, rel=0.1)
        for label in peak.classes | found.peak.classes:
            sizes = [x.classes.get(label, 0) for x in (found.peak, peak)]
            assert sizes[0] == pytest.approx(sizes[1], abs=0.1 * peak.bytes), label


@pytest.mark.parametrize("name", ["plain", "learned"])
def test_products_are_three_of_every_matrix_and_token(name):
    """Forward, and the gradients of inputs and of weights; the head's too, which the loss computes with its forward."""
    config = _config(2, RUNS[name])
    tokens = config.train.batch_size * config.data.seq_len // 2
    assert trace_step(config).products == 3 * 2 * find_model(config).matrix_parameters * tokens


def test_offloaded_activations_are_the_hosts():
    big = ["data.seq_len=16384", "train.batch_size=1", "memory.checkpointing=attention"]
    kept, away = (trace_step(_config(2, [*big, f"memory.offload={where}"])).peak for where in ("none", "host"))
    x = 3 * 2 * 8192 * 32 * 4  # three layers' inputs and attention outputs
    assert away.host == x
    assert kept.host == 0
    assert kept.classes["activations"] - away.classes.get("activations", 0) >= x // 2


def test_a_large_run_on_thousands_of_ranks_is_traced():
    overrides = ["model.preset=llama-3.2-1b", "model.n_layers=2", "data.seq_len=4194304", "train.batch_size=64",
                 "parallel.cp=64", "parallel.dp=64", "train.dtype=bfloat16", "memory.checkpointing=attention"]  # fmt: skip
    trace = trace_step(load_config(None, overrides).resolved(4096), rank=2047, ranks_per_node=8)
    # one key head of 64 in bfloat16, 4M tokens, K and V: a GiB; all of a layer are eight of them, gathered twice
    gathered = sum(t.bytes for (_, purpose, _), t in trace.collectives.items() if purpose == "kv")
    assert gathered >= 2 * 2 * 2 * 4194304 * 8 * 64 * 2
    assert trace.peak.bytes < 80 << 30


def test_a_ledger_keeps_what_lives_and_forgets_what_is_gone():
    ledger = Ledger()
    with ledger:
        ledger.enter("forward")
        a = torch.zeros(1000)
        torch.zeros(5000)
        b = a.view(10, 100)
        c = torch.zeros(200)
        ledger.enter("backward")
        del a, b
        d = torch.zeros(100)
    assert ledger.timeline() == [("forward", 4000), ("forward", 24000), ("forward", 4000), ("forward", 4800),
                                 ("backward", 800), ("backward", 1200)]  # fmt: skip
    peak = ledger.peak()
    assert (peak.bytes, peak.phase) == (24000, "forward")
    assert peak.classes == {"temporary": 20000, "activations": 4000}
    del c, d


def test_packed_documents_are_refused():
    with pytest.raises(Refused, match="documents"):
        trace_step(_config(1, ["data.packing=true", "train.batch_size=1"]))


def test_no_group_is_left_behind():
    import torch.distributed as dist

    trace_step(_config(2, []))
    assert not dist.is_initialized()
    Transformer(_config(1, []).model, 8)


@pytest.mark.parametrize("overrides", [[], ["model.positions=learned", "model.vocab_size=1001"], ["optim.name=adamw8bit"]])
def test_weights_that_are_sharded_are_laid_out_in_no_time(overrides):
    """More ranks than rows; and by what a step takes on two ranks with data."""
    big = _config(2048, ["parallel.fsdp=true", "data.seq_len=4096", "train.batch_size=1024", "parallel.cp=2",
                          "parallel.dp=1024", *overrides])  # fmt: skip
    trace_step(_config(2, ["parallel.fsdp=true"]))
    began = time.process_time()
    trace_step(big)
    assert time.process_time() - began < 6  # 1.7 s; as fake tensors 11 s
    if "optim.name=adamw8bit" in overrides:
        return
    overrides = ["parallel.fsdp=true", *overrides]
    for rank, (peak, collectives, counts) in enumerate(pool(2).run(_real, 2, overrides)):
        found = trace_step(_config(2, overrides), rank=rank)
        assert (found.collectives, found.steady, found.products) == (collectives, *counts)
        assert found.peak.bytes == pytest.approx(peak.bytes, rel=0.1)
