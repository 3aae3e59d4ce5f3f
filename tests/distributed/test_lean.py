"""What a long sequence's layer holds at once: projections by tiles, dQ where Q lay, a narrow residual stream."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lss
from lss import offload
from lss.config.errors import Refused
from lss.context_parallel import count_head_chunks, pick_regather
from lss.context_parallel import lss as algorithm
from lss.model import Transformer
from lss.model.layers import Attention
from lss.parallel import activation, layout_of
from tests.distributed.model_cases import BOUNDS, gradient_errors, model_config, parity_case
from tests.distributed.pool import mesh, pool

laying_out = importlib.import_module("lss.parallel.parallelize")  # the package has a function of this name
S = 64  # no width of the model


class Products(TorchDispatchMode):
    """The sizes of all matrix products' dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.sizes |= {*args[0].shape, *args[1].shape}
        return func(*args, **(kwargs or {}))


def _products(checkpointing, tiles):
    config = model_config(n_layers=2, d_mlp=67, vocab_size=71, d_model=16, n_heads=2)
    model = lss.parallelize(Transformer(config, S), mesh(1), checkpointing=checkpointing, tiles=tiles)
    ids = torch.zeros(1, S, dtype=torch.int64)
    with Products() as products:
        model(ids, ids).loss.backward()
    return products.sizes


def test_no_product_is_of_all_tokens():
    ((whole,),) = (pool(1).run(_products, "none", S),)
    assert S in whole
    for checkpointing in ("full", "attention"):
        ((tiled,),) = (pool(1).run(_products, checkpointing, 5),)
        assert S not in tiled
        assert 5 in tiled


def _spent(cp, options):
    """Whether each attention's dQ was written over its Q, and the step's errors."""
    seen, begin = [], algorithm._QueryGradient.__init__

    def noting(self, *args):
        begin(self, *args)
        seen.append(self._spent)

    algorithm._QueryGradient.__init__ = noting
    try:
        return parity_case(cp, labels="uneven", seq_len=23, **options), set(seen)
    finally:
        algorithm._QueryGradient.__init__ = begin


@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("tiles", ["auto", 5])
@pytest.mark.parametrize("model", [{}, {"positions": "alibi"}], ids=["rope", "alibi"])
def test_dq_lies_where_the_recomputed_queries_lay(cp, tiles, model):
    heads = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48}
    how = {"tiles": tiles, "head_chunks": 3, "model": heads | model}
    for checkpointing, spent in (("attention", True), ("none", False)):
        for result, seen in pool(cp).run(_spent, cp, how | {"checkpointing": checkpointing}):
            assert seen == {spent}
            assert result["gradient"] <= BOUNDS[torch.float64], result["parameter"]
    for _, seen in pool(cp).run(_spent, cp, how | {"checkpointing": "attention", "head_chunks": 1}):
        assert seen == {False}  # all of Q is read until all of dQ is there


def _narrow(cp, residual, dtype):
    """The gradients of all parameters, and the dtype of what logits are computed from."""
    config = model_config(n_layers=3, residual=residual)
    model = lss.parallelize(Transformer(config, 64).to(dtype), mesh(cp), checkpointing="attention", tiles=16)
    ids = torch.randint(61, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        out = model(ids, ids)
        out.loss.backward()
    lss.sum_gradients(model.parameters(), mesh(cp))
    return out.hidden.dtype, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("cp", [1, 2])
def test_a_narrow_residual_stream(cp):
    """In autocast's dtype, as near to float64 as rounding each sum lets it be; nothing changes where there is none."""
    ((plain, exact), *_) = pool(cp).run(_narrow, cp, "weights", torch.float64)
    ((same, again), *_) = pool(cp).run(_narrow, cp, "compute", torch.float64)
    assert plain == same == torch.float64
    assert all(torch.equal(exact[name], again[name]) for name in exact)
    ((wide, weights), *_) = pool(cp).run(_narrow, cp, "weights", torch.float32)
    ((narrow, compute), *_) = pool(cp).run(_narrow, cp, "compute", torch.float32)
    assert (wide, narrow) == (torch.float32, torch.bfloat16)
    usual, found = gradient_errors(weights, exact), gradient_errors(compute, exact)
    mean = sum(usual.values()) / len(usual)
    assert all(found[name] <= 3 * max(usual[name], mean) for name in found)


def test_head_chunks_bound_what_a_kernel_sums():
    """dQ in float32, and dK and dV where key heads are shared: 2 GiB; 1,048,576 tokens of 32 heads of 64 are 12 GiB."""
    k = torch.empty(1, 1 << 20, 8, 64, dtype=torch.bfloat16, device="meta")
    assert count_head_chunks("auto", "lss", k, 1) == 1
    assert count_head_chunks("auto", "lss", k, 1, n_heads=32) == 6
    assert count_head_chunks("auto", "lss", k, 1, n_heads=8) == 1
    assert count_head_chunks("auto", "lss", k[:, : 1 << 17], 1, n_heads=32) == 1
    assert count_head_chunks("auto", "lss", k.float(), 1, n_heads=32) == 1  # no fused kernel
    assert count_head_chunks("auto", "ulysses", k, 1, n_heads=32) == 1


def test_keys_that_are_few_are_kept_on_a_gpu():
    k = torch.empty(1, 1 << 14, 8, 128, dtype=torch.bfloat16, device="meta")
    assert not pick_regather("auto", k, 2, on_gpu=True)  # 128 MiB of both ranks
    assert pick_regather("auto", k, 2)  # not on a GPU
    assert pick_regather("auto", k, 3, on_gpu=True)
    assert pick_regather(True, k, 2, on_gpu=True)
    assert not pick_regather(False, k, 16)
    for word in ("false", 0, None):
        with pytest.raises(Refused, match="regather"):
            pick_regather(word, k, 2)


def _calls(cp, room, changes):
    """A step's errors, forward calls of attention in it, and blocks that compute their attention again."""
    made = activation.make_pieces
    seen = {}

    def making(*args, offloader=None, **kwargs):
        seen["offloader"] = offloader
        offloader.least_bytes = 1
        return made(*args, offloader=offloader, **kwargs)

    calls, forward = [], Attention.forward
    Attention.forward = lambda self, *args, **kwargs: calls.append(self.layer) or forward(self, *args, **kwargs)
    laying_out.make_pieces = making
    try:
        options = {"offload": "host", "offload_gib": room / 2**30, "checkpointing": "attention", "labels": "uneven"}
        result = parity_case(cp, seq_len=24, **options, **changes)
    finally:
        laying_out.make_pieces, Attention.forward = made, forward
    return result, sorted(calls), seen["offloader"].again


@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_attention_is_computed_again_where_its_output_has_no_room(cp, kept):
    """Three blocks: the inputs of all have room, and the outputs and lse of so many."""
    heads = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48, "n_layers": 3}
    tokens = 2 * 24 // cp
    x, out = tokens * 48 * 8, tokens * (48 + 6) * 8
    room = 3 * x + kept * out + out // 2
    changes = {"model": heads, "rows": 2}
    for _ in range(2):  # the first time with the reference, which ranks keep
        plain = len(pool(cp).run(_calls, cp, 1 << 30, changes)[0][1]) // 3
    for result, calls, again in pool(cp).run(_calls, cp, room, changes):
        assert again == 3 - kept
        assert result["gradient"] <= BOUNDS[torch.float64], result["parameter"]
        assert result["away"].here == 0
        assert [calls.count(layer) for layer in range(3)] == [plain] * kept + [plain + 1] * (3 - kept)


def _room(cp):
    """The room of a rank that has a GiB more than the one before it."""
    rank = torch.distributed.get_rank()
    free, offload.free_memory = offload.free_memory, lambda: (rank + 1) << 31
    try:
        model = lss.parallelize(Transformer(model_config(), 64), mesh(cp), checkpointing="attention", offload="host")
    finally:
        offload.free_memory = free
    return layout_of(model).offloader.room


def test_ranks_agree_on_the_room():
    """The least of them; else one would gather for an attention that another does not compute."""
    rooms = pool(3).run(_room, 3)
    assert len(set(rooms)) == 1
    assert rooms[0] <= 1 << 30


def _stands_for(layer_bytes):
    """What a layout does for a longer sequence's sake: its thresholds, and whether products are of all tokens."""
    config = model_config(n_layers=1, d_mlp=67, vocab_size=71, d_model=16, n_heads=2)
    how = {"checkpointing": "attention", "offload": "host", "tiles": 5}
    model = lss.parallelize(Transformer(config, S), mesh(1), **how)
    layout_of(model).stand_for(S, layer_bytes)
    ids = torch.zeros(1, S, dtype=torch.int64)
    with Products() as products:
        model(ids, ids).loss.backward()
    keeper = layout_of(model).offloader
    return keeper.early_bytes > 0, keeper.late_bytes > 0, products.sizes


def test_a_trace_stands_for_a_longer_sequence():
    """Layers of 1, 3 and 5 GiB come back early, late and when they are asked for; projections are as they will be, whole."""
    for gib, early, late in ((1, True, True), (3, False, True), (5, False, False)):
        ((*found, sizes),) = pool(1).run(_stands_for, gib << 30)
        assert found == [early, late]
        assert S in sizes
