"""What a run takes at least, by arithmetic, is what its model has."""

from __future__ import annotations

import itertools

import pytest
import torch

from lss.config import PRESETS, Refused, load_config
from lss.hosts import all_memory
from lss.model import Transformer
from lss.model.size import parameter_count
from lss.train.memory import refuse_too_large, sequence_bytes, state_bytes

SHAPES = [
    [f"model.kind={kind}", f"model.positions={positions}", f"model.norm={norm}", f"model.mlp={mlp}", f"model.sinks={sinks}",
     f"model.tie_embeddings={sinks}", "model.n_kv_heads=2", "model.vocab_size=300"]
    for kind, positions, norm, mlp, sinks in itertools.product(
        ("decoder", "encoder", "encoder_decoder"), ("rope", "learned", "alibi"), ("rmsnorm", "layernorm"),
        ("swiglu", "gelu"), ("true", "false"))
]  # fmt: skip


@pytest.mark.parametrize("overrides", [*SHAPES, *([f"model.preset={name}"] for name in PRESETS)], ids=" ".join)
def test_the_count_is_the_model_s(overrides):
    config = load_config(None, overrides)
    with torch.device("meta"):
        model = Transformer(config.model, 77)
    assert parameter_count(config.model, 77) == sum(p.numel() for p in model.parameters())


def test_bytes_by_dtype_optimizer_and_ranks():
    tiny = load_config(None).resolved(1)
    count = parameter_count(tiny.model, 512)
    assert state_bytes(tiny) == 16 * count
    assert state_bytes(load_config(None, ["optim.name=sgd", "train.dtype=float64"]).resolved(1)) == 16 * count
    assert sequence_bytes(tiny) == 8 * 512 * (24 + 128 * 4 * 4)
    assert sequence_bytes(load_config(None).resolved(4)) == sequence_bytes(tiny) // 4


def test_what_is_cut_over_ranks_is_not_counted_whole_on_each():
    """But for the weights, which each rank has whole at the start."""
    def of(ranks, *overrides):
        return state_bytes(load_config(None, ["train.batch_size=2", *overrides]).resolved(ranks))

    count = parameter_count(load_config(None).model, 512)
    assert of(2) == 16 * count
    assert of(2, "parallel.fsdp=true") == of(2, "parallel.fsdp=true", "parallel.dp=2") == 8 * count
    assert of(2, "parallel.strategy=tp") == 8 * count
    assert of(2, "parallel.strategy=tp", "optim.name=sgd") == 4 * count
    assert of(8, "parallel.fsdp=true") == 4 * count


def test_ranks_of_a_host_share_its_memory():
    """At the largest model that one rank holds, one is accepted and two are refused."""
    tiny = load_config(None).resolved(1)
    layers = (all_memory() // 16 - 128 * 256) // ((parameter_count(tiny.model, 1) - 128 * 257) // 4) * 3 // 4
    config = load_config(None, [f"model.n_layers={layers}", "train.batch_size=1", "data.seq_len=1"]).resolved(1)
    refuse_too_large(config, "cpu", 1)
    with pytest.raises(Refused, match=rf"model\.n_layers={layers}: .* of 2 ranks take .* this host has"):
        refuse_too_large(config, "cpu", 2)
