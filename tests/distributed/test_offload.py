"""Activations kept away from the device: the same gradients in every layout, and memory that does not grow with layers."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import lss
from lss.model import Transformer
from lss.parallel import layout_of
from tests.distributed.model_cases import BOUNDS, model_config, parity_case
from tests.distributed.pool import mesh, pool
from tests.distributed.test_step import Made

MODELS = {
    "plain": {},
    "dropout-accumulate": {"model": {"dropout": 0.25, "attention_dropout": 0.25}, "accumulate": 3},
    "keep-learned": {"regather": False, "model": {"positions": "learned", "n_layers": 3}},
    "seq2seq": {"model": {"kind": "encoder_decoder", "n_layers": 3}},
}


def cases():
    places = product([1, 2, 3, 4], ["host", "disk"], ["full", "attention"])
    for (cp, how, checkpointing), (name, options) in product(places, MODELS.items()):
        if how == "disk" and (cp in (2, 4)) == (checkpointing == "full"):
            continue  # every value with every other, not all of all
        heads = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48} if cp == 3 else {}
        changes = options | {"model": options.get("model", {}) | heads, "labels": "uneven", "seq_len": 23, "tiles": 5}
        yield pytest.param(cp, how, changes | {"checkpointing": checkpointing}, id=f"cp{cp}-{how}-{checkpointing}-{name}")


@pytest.mark.parametrize("cp, how, options", list(cases()))
def test_gradients(cp, how, options, tmp_path):
    how = {"offload": how, "offload_gib": 0.001 if how == "disk" else "auto", "offload_path": str(tmp_path)}
    for result in pool(cp).run(parity_case, cp, **how, **options):
        assert result["gradient"] <= BOUNDS[torch.float64], result["parameter"]
        for what in ("loss", "logits", "norm", "clipped"):
            assert result[what] <= BOUNDS[torch.float64], what
        assert result["away"].away > 0
        assert result["away"].here == 0


@pytest.mark.parametrize("strategy", ["lss_2d", "ring", "ulysses", "tp"])
def test_gradients_of_other_strategies(strategy):
    for result in pool(2).run(parity_case, 2, strategy=strategy, checkpointing="attention", offload="host"):
        assert result["gradient"] <= BOUNDS[torch.float64], result["parameter"]
        assert result["away"].away > 0


def _kept(layers, offload, checkpointing):
    """Bytes made on the device in forward that live on until backward; those counted as away."""
    config = model_config(n_layers=layers, d_mlp=67, vocab_size=71, d_model=16, n_heads=2)
    model = lss.parallelize(Transformer(config, 64), mesh(1), checkpointing=checkpointing, offload=offload, tiles=5)
    layout, ids = layout_of(model), torch.zeros(1, 64, dtype=torch.int64)
    others = {p.untyped_storage()._cdata for p in model.parameters()}
    if layout.offloader is not None:
        layout.offloader.least_bytes = 1
        model(ids, ids).loss.backward()  # host buffers are made at first use, and are no memory of the device
        (tier,) = layout.offloader.tiers
        others |= {buffer.untyped_storage()._cdata for buffer in tier.buffers()}
    with Made() as made:
        loss = model(ids, ids).loss
    kept = made.alive(others)
    loss.backward()
    return kept, layout.offloader.tally.away if offload else 0


@pytest.mark.parametrize("checkpointing, a_block", [("full", 64 * 16 * 4), ("attention", 2 * 64 * 16 * 4 + 64 * 2 * 4)])
def test_what_stays_on_the_device_does_not_grow_with_layers(checkpointing, a_block):
    ((plain_2, _),), ((plain_6, _),) = (pool(1).run(_kept, n, None, checkpointing) for n in (2, 6))
    ((kept_2, away_2),), ((kept_6, away_6),) = (pool(1).run(_kept, n, "host", checkpointing) for n in (2, 6))
    assert plain_6 - plain_2 >= 4 * a_block
    assert kept_6 - kept_2 <= 4 * 256  # small things of a layer
    assert away_6 - away_2 == 4 * a_block
