"""What a step keeps and computes again: gradients, collectives and the largest tensors of every choice."""

from __future__ import annotations

import gc
import shutil
from itertools import product

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import lss
from lss.model import Transformer
from tests.distributed.model_cases import BOUNDS, gradient_errors, model_config, parity_case
from tests.distributed.pool import mesh, pool
from tests.distributed.test_parity import BORDERS, LEARNED
from tests.test_tiled import Largest

# what a block may have that its pieces treat specially; tiles of 5 tokens divide no segment of 23
MODELS = {
    "plain": {},
    "dropout": {"model": {"dropout": 0.25, "attention_dropout": 0.25}},
    "documents": {"given": BORDERS, "rows": 1, "model": {"windows": (4, 0), "sinks": True}},
    "learned": {"model": LEARNED, "precut": True, "accumulate": 2},
    "seq2seq": {"model": {"kind": "encoder_decoder", "attention_dropout": 0.2}},
}


def cases():
    """Every strategy on every number of ranks with what fits it."""
    for cp, strategy, (name, options) in product([1, 2, 3, 4], ["lss", "ring", "ulysses", "tp"], MODELS.items()):
        if name == "seq2seq" and strategy != "lss":
            continue
        heads = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48} if cp == 3 else {"n_kv_heads": 4}
        how = options | {"strategy": strategy, "model": heads | options.get("model", {}), "labels": "uneven", "seq_len": 23}
        yield pytest.param(cp, how | {"tiles": 5 if name != "plain" else "auto"}, id=f"{strategy}-cp{cp}-{name}")


@pytest.mark.parametrize("cp, options", list(cases()))
def test_gradients_where_only_linear_parts_are_recomputed(cp, options):
    for result in pool(cp).run(parity_case, cp, checkpointing="attention", **options):
        assert result["gradient"] <= BOUNDS[torch.float64], result["parameter"]
        for what in ("loss", "logits", "norm", "clipped"):
            assert result[what] <= BOUNDS[torch.float64], what


@pytest.mark.parametrize("cp", [1, 2])
def test_keys_that_are_kept_are_computed_again_once(cp):
    """On one rank those kept are its own: the same tensors, saved twice."""
    for result in pool(cp).run(parity_case, cp, checkpointing="attention", regather=False):
        assert result["gradient"] <= BOUNDS[torch.float64], result["parameter"]


# collectives of one layer: (all-gathers of K and V, reduce-scatters of dK and dV)
@pytest.mark.parametrize(
    "checkpointing, regather, gathers",
    [("none", True, 2), ("none", False, 1), ("full", True, 3), ("full", False, 2), ("attention", True, 2),
     ("attention", False, 1)],
)  # fmt: skip
def test_recomputing_linear_parts_costs_no_collective(checkpointing, regather, gathers):
    layers = 3
    options = {"checkpointing": checkpointing, "regather": regather, "model": {"n_layers": layers}, "head_chunks": 1}
    for result in pool(2).run(parity_case, 2, **options):
        counts = {(kind, purpose): calls for kind, purpose, calls, _ in result["rows"] if purpose in ("kv", "dkv")}
        assert counts == {("all_gather", "kv"): gathers * layers, ("reduce_scatter", "dkv"): layers}


class Made(TorchDispatchMode):
    """The storages that operations have made, and how much of them still lives."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, others):
        gc.collect()
        alive = {key: size for key, (storage, size) in self.storages.items() if not storage.expired()}
        return sum(size for key, size in alive.items() if key not in others)


def _sizes(checkpointing, tiles):
    """Most elements of a tensor V wide and of one d_mlp wide, bytes kept for backward, calls of an attention."""
    config = model_config(n_layers=2, d_mlp=67, vocab_size=71, d_model=16, n_heads=2)
    model = lss.parallelize(Transformer(config, 64), mesh(1), checkpointing=checkpointing, tiles=tiles)
    ids = torch.zeros(1, 64, dtype=torch.int64)
    attention = model.blocks[0].attention
    calls, forward = [], attention.forward
    attention.forward = lambda *args, **kwargs: calls.append(0) or forward(*args, **kwargs)
    with Largest(71) as vocabulary, Largest(67) as mlp:
        with Made() as made:
            loss = model(ids, ids).loss
        kept = made.alive({p.untyped_storage()._cdata for p in model.parameters()})
        loss.backward()
    return vocabulary.elements, mlp.elements, kept, len(calls)


def test_what_exists_and_what_is_kept():
    """With tiles of 5 tokens nothing is longer than its weights; blocks keep x, out and lse, and nothing of q, k, v."""
    x, lse = 64 * 16 * 4, 64 * 2 * 4
    # what the last norm and the loss keep: three of T D and the head's gradient; rotary tables, labels, small things
    others = 3 * x + 71 * 16 * 4 + 3 * x // 2
    assert pool(1).run(_sizes, "none", 64)[0][:2] == (64 * 71, 64 * 67)
    for checkpointing, a_block, attentions in (("full", x, 2), ("attention", 2 * x + lse, 1)):
        ((vocabulary, mlp, kept, calls),) = pool(1).run(_sizes, checkpointing, 5)
        assert vocabulary == 16 * 71
        assert mlp == 16 * 67
        assert kept <= 2 * a_block + others  # q, k and v of two blocks would be 6 x more
        assert calls == attentions


def _bfloat16():
    """Errors by parameter against float64 of the plain and of the recomputed pass, and whether gradients are float32."""
    ids = torch.randint(61, (1, 64), generator=torch.Generator().manual_seed(0))
    gradients = {}
    for how in ("float64", "none", "attention"):
        exact = how == "float64"
        model = Transformer(model_config(), 64).to(torch.float64 if exact else torch.float32)
        options = {"checkpointing": "attention", "tiles": 4} if how == "attention" else {}
        model = lss.parallelize(model, mesh(1), **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            loss = model(ids, ids).loss
            loss.backward()  # inside of autocast, where casts made without gradients must not be found again
        gradients[how] = {name: p.grad for name, p in model.named_parameters()}
    whole, tiled = (gradient_errors(gradients[how], gradients["float64"]) for how in ("none", "attention"))
    return whole, tiled, all(g.dtype == torch.float32 for g in gradients["attention"].values())


def test_bfloat16_is_no_worse_when_recomputed_by_tiles():
    """Tiles add up weight gradients in float32, so their error is that of the untiled pass."""
    ((whole, tiled, float32),) = pool(1).run(_bfloat16)
    assert float32
    assert all(tiled[name] <= 1.25 * max(whole[name], sum(whole.values()) / len(whole)) for name in whole)


def _compiled():
    """A step's errors with compiled pieces, how often a graph broke, and how many graphs there are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = {"n_layers": 3}
    result = parity_case(1, compile=True, checkpointing="attention", tiles=8, model=model, labels="uneven")
    counters = torch._dynamo.utils.counters
    return result, sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_pieces_compute_the_same():
    """Pieces are compiled whole, once for all layers, under recomputation and tiles."""
    ((result, breaks, graphs),) = pool(1).run(_compiled)
    assert breaks == 0
    assert graphs == 7  # before, after and last norm without and with gradients, softmax
    assert max(result[what] for what in ("gradient", "loss", "logits")) <= BOUNDS[torch.float64]


def _laid_out(options, changes):
    lss.parallelize(Transformer(model_config(**changes), 8), mesh(1), **options)


@pytest.mark.parametrize("options, changes, words", [
    ({"compile": True}, {"dropout": 0.1}, "model.dropout=0.1"),
    ({"compile": True, "strategy": "tp"}, {}, "strategy='tp'"),
    ({"tiles": 0}, {}, "memory.tiles=0"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(options, changes, words):
    ((ok, error),) = pool(1).outcomes(_laid_out, options, changes)
    assert not ok
    assert error[0] == "Refused"
    assert words in error[1]
