"""Sharded parameters: gradients, updates, memory, collectives and passes out of order, all against one process."""

from __future__ import annotations

import shutil
from itertools import product

import pytest
import torch
from torch.distributed.tensor import DTensor

import lss
from lss.comm import count_collectives
from lss.config import OptimConfig
from lss.model import Transformer
from lss.parallel import clip_grad_norm_, full_state_dict, layout_of
from lss.parallel.fsdp import local_part
from lss.train.optim import build_optimizer
from tests.distributed.model_cases import (
    BOUNDS,
    batches,
    gradient_errors,
    hold_parity,
    model_config,
    one_process,
    parity_case,
)
from tests.distributed.pool import mesh, pool
from tests.distributed.test_parity import BORDERS, LEARNED, PADDING

MESHES = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2)]  # (cp, dp)
UNTIED = {"tie_embeddings": False}
# what a step may have that sharding must get right
STEPS = {
    "plain": {},
    "untied-never": {"model": UNTIED, "fsdp_reshard": False, "checkpointing": "attention", "tiles": 5},
    "learned-precut": {"model": LEARNED, "precut": True, "accumulate": 2},
    "dropout-full": {"model": {"dropout": 0.25, "attention_dropout": 0.25}, "checkpointing": "full", "fsdp_reshard": True},
    "documents": {"given": BORDERS, "model": {"windows": (4, 0), "sinks": True, "n_layers": 3}},
}
# only under lss
OTHERS = {
    "documents-learned": {"given": BORDERS, "model": LEARNED, "packed": True, "checkpointing": "full", "accumulate": 2},
    "padding-encoder": {"given": PADDING, "rows": 4, "model": {"kind": "encoder"} | UNTIED, "fsdp_reshard": True},
    "seq2seq": {"model": {"kind": "encoder_decoder"}, "accumulate": 2},
    "seq2seq-learned": {"model": LEARNED | {"kind": "encoder_decoder", "sinks": True}, "checkpointing": "attention"},
    "one-label": {"labels": "one", "model": {"positions": "alibi"}},
    "one-token": {"seq_len": 1, "labels": "even", "model": {"sinks": True}},
    "float32": {"dtype": torch.float32, "accumulate": 3},
    "offload-full": {"checkpointing": "full", "offload": "host", "token_chunks": 5, "accumulate": 2},
    "offload-attention": {"checkpointing": "attention", "offload": "host", "model": UNTIED | {"sinks": True, "n_layers": 3}},
}


def cases():
    """Every step on every mesh under lss, and two of them under each other strategy, which meet all over the meshes.

    Parameters are sharded over all ranks, whichever axis they are of, so each of the others meets one mesh of each kind:
    cp alone, dp alone, both. The meshes of a kind take turns, and so each meets a third of the others or more.
    """
    for number, ((cp, dp), (name, options)) in enumerate(product(MESHES, (STEPS | OTHERS).items())):
        mesh_number = number // len(STEPS | OTHERS)
        alike = [mesh for mesh in MESHES if (mesh[0] > 1, mesh[1] > 1) == (cp > 1, dp > 1)]
        if name in OTHERS and list(OTHERS).index(name) % len(alike) != alike.index((cp, dp)):
            continue
        for place, strategy in enumerate(("lss", "lss_2d", "ring", "ulysses")):
            chosen = name in [list(STEPS)[(2 * mesh_number + place + k) % len(STEPS)] for k in (0, 1)]
            if strategy != "lss" and not chosen:
                continue
            heads = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48} if cp == 3 else {"n_kv_heads": 4}
            how = {"seq_len": 23, "labels": "uneven", "strategy": strategy} | options
            how["model"] = heads | options.get("model", {})
            if how.get("given", {}).keys() & BORDERS.keys():
                how["rows"] = dp  # documents come one row at a time
            yield pytest.param(cp, dp, how, id=f"{name}-{strategy}-cp{cp}-dp{dp}")


@pytest.mark.parametrize("cp, dp, options", list(cases()))
def test_gradients_equal_one_process(cp, dp, options):
    results = pool(cp * dp).run(parity_case, cp, dp, fsdp=True, **options)
    hold_parity(results, options.get("dtype", torch.float64))


def _adamw(cp, dp, name, options):
    """Largest relative difference of a weight from one process after 20 clipped steps, and a sum of the gathered bits."""
    config = model_config(**options)
    S, rows, the_mesh = 12, 2 * dp, mesh(cp, dp)
    data = batches(S, rows, config.vocab_size, "uneven", 20)
    optim = OptimConfig(name=name, lr=1e-2, weight_decay=0.1)
    plain, whole = Transformer(config, S, seed=3).double(), Transformer(config, S, seed=3).double()
    model = lss.parallelize(whole, the_mesh, fsdp=True)
    updates, plain_updates = build_optimizer(model, optim), build_optimizer(plain, optim)
    first = layout_of(model).dp.rank * 2
    for ids, labels in data:
        for m, o, mine in ((plain, plain_updates, slice(None)), (model, updates, slice(first, first + 2))):
            o.zero_grad()
            m(ids[mine], shift_labels=labels[mine], num_items_in_batch=int((labels != -100).sum())).loss.backward()
        clip_grad_norm_(model, 0.5)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        updates.step()
        plain_updates.step()
    found = full_state_dict(model)
    errors = [float((found[n] - p).norm() / p.norm()) for n, p in plain.state_dict().items()]
    return max(errors), [int(x.view(torch.int64).sum()) for x in found.values()]


@pytest.mark.parametrize("name, options", [("adamw", {}), ("adamw", LEARNED), ("sgd", UNTIED)], ids=["tied", "cut", "sgd"])
@pytest.mark.parametrize("cp, dp", [(2, 1), (2, 2), (3, 1)])
def test_twenty_updates_equal_one_process(cp, dp, name, options):
    results = pool(cp * dp).run(_adamw, cp, dp, name, options)
    for error, bits in results:
        assert error <= 1e-10
        assert bits == results[0][1]


def _bfloat16(cp, dp):
    """Worst errors against float64 of one process and of sharded ranks, both under autocast, and the gradients' dtype."""
    S, config = 32, model_config()
    data = batches(S, 2 * dp, config.vocab_size, "uneven", 1)
    _, exact, _ = one_process(config, S, torch.float64, data)
    ids, labels = data[0]
    plain = Transformer(config, S, seed=3)
    model = lss.parallelize(Transformer(config, S, seed=3), mesh(cp, dp), fsdp=True)
    first, count = layout_of(model).dp.rank * 2, int((labels != -100).sum())
    for m, mine in ((plain, slice(None)), (model, slice(first, first + 2))):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = m(ids[mine], shift_labels=labels[mine], num_items_in_batch=count).loss
        loss.backward()
    own = gradient_errors({n: p.grad for n, p in plain.named_parameters()}, exact)
    layout = layout_of(model)
    found = gradient_errors({n: layout.whole(n, p.grad) for n, p in model.named_parameters()}, exact)
    mean = sum(own.values()) / len(own)
    return max(error / max(own[n], mean) for n, error in found.items()), {p.grad.dtype for p in model.parameters()}


@pytest.mark.parametrize("cp, dp", [(2, 1), (2, 2)])
def test_bfloat16_is_no_worse_than_one_process(cp, dp):
    for excess, dtypes in pool(cp * dp).run(_bfloat16, cp, dp):
        assert excess <= 1.25
        assert dtypes == {torch.float32}


def _half(cp):
    """Gradients of bfloat16 weights, against the float32 sum of the ranks' own."""
    ids = torch.arange(2 * 16).view(2, 16) % 61
    models = [lss.parallelize(Transformer(model_config(), 16).to(torch.bfloat16), mesh(cp), fsdp=f) for f in (True, False)]
    for model in models:
        model(ids, ids).loss.backward()
    layout = layout_of(models[0])
    grads = [{n: p.grad for n, p in model.named_parameters()} for model in models]
    grads[0] = {n: layout.whole(n, g) for n, g in grads[0].items()}
    return max(gradient_errors(*grads).values()), {g.dtype for g in grads[0].values()}


def test_half_precision_gradients_are_summed_in_float32():
    for error, dtypes in pool(4).run(_half, 4):
        assert error <= 1e-3  # both sum in float32 and round once; sums in bfloat16 are off by 3e-3 and more
        assert dtypes == {torch.bfloat16}


# -- memory and collectives ------------------------------------------------------------------------------------------------


def _size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def _memory(cp, dp, reshard, accumulate):
    """Bytes of this rank's parameters, gradients and optimizer state; of a whole model's; and of blocks whole at a time."""
    config = model_config(n_layers=4, d_model=64, d_mlp=160, vocab_size=256, tie_embeddings=False)
    model = lss.parallelize(Transformer(config, 8), mesh(cp, dp), fsdp=True, fsdp_reshard=reshard)
    whole = _size(Transformer(config, 8).parameters())
    block = _size(p for p in Transformer(config, 8).blocks[0].parameters())
    updates = build_optimizer(model, OptimConfig())
    seen = []

    def look(*_):
        seen.append(_size(p for p in model.blocks.parameters() if not isinstance(p, DTensor)) / block)

    for part in model.blocks:
        part.mlp.register_forward_hook(look)
        part.mlp.register_full_backward_hook(look)
    ids = torch.zeros(dp, 8, dtype=torch.int64)
    gradients = 0
    for number in range(accumulate):
        if number + 1 < accumulate:
            with model.no_sync():
                model(ids, ids).loss.backward()
        else:
            model(ids, ids).loss.backward()
        gradients = max(gradients, _size(local_part(p.grad) for p in model.parameters()))
    updates.step()
    held = [local_part(p) for p in model.parameters()]
    states = [local_part(x) for state in updates.state.values() for x in state.values()]
    return _size(held) + gradients + _size(states), 4 * whole, max(seen)


@pytest.mark.parametrize("cp, dp", [(2, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("reshard, blocks", [(True, 1), ("auto", 2), (False, 4)])
def test_each_rank_holds_its_share(cp, dp, reshard, blocks):
    """Of parameters, gradients (between micro-batches too) and AdamW's state; and few blocks are whole at a time."""
    for held, whole, at_a_time in pool(cp * dp).run(_memory, cp, dp, reshard, 2):
        assert held <= 1.05 * whole / (cp * dp)
        # backward gathers the block before the one it is at
        assert at_a_time <= (blocks + 1 if reshard is True else blocks)


def _collectives(reshard, accumulate, tied):
    model = Transformer(model_config(n_layers=3, vocab_size=62, tie_embeddings=tied), 16)
    model = lss.parallelize(model, mesh(2), fsdp=True, fsdp_reshard=reshard)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    with count_collectives() as counter:
        for _ in range(accumulate):
            with model.no_sync():
                model(ids, ids).loss.backward()
    return {(kind, purpose): (calls, size) for kind, purpose, calls, size in counter.rows()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("reshard, again", [(True, 3), ("auto", 2), (False, 0)])
def test_collectives_are_counted(reshard, again, tied):
    """All parameters are gathered, some blocks again (but no embedding), and all gradients scattered."""
    # every dimension is even: slices need no filling up
    model, groups = Transformer(model_config(n_layers=3, vocab_size=62, tie_embeddings=tied), 16), 4 if tied else 5
    whole, block = _size(model.parameters()), _size(model.blocks[0].parameters())
    for accumulate in (1, 2):
        for counts in pool(2).run(_collectives, reshard, accumulate, tied):
            size = accumulate * (whole + again * block)
            assert counts["all_gather", "parameters"] == (accumulate * (groups + again), size)
            assert counts["reduce_scatter", "gradients"] == (accumulate * groups, accumulate * whole)
            assert ("all_reduce", "gradients") not in counts


# -- parts -----------------------------------------------------------------------------------------------------------------


def _pieces(cp, dp, fsdp, model, strategy):
    the_mesh = mesh(cp, dp)
    config = model_config(**model)
    whole = Transformer(config, 25, seed=3)
    shapes = {n: tuple(p.shape) for n, p in whole.named_parameters()}
    expected = {n: p.detach().clone() for n, p in whole.named_parameters()}
    laid = lss.parallelize(whole, the_mesh, fsdp=fsdp, strategy=strategy)
    layout = layout_of(laid)
    out = {}
    for name, parameter in laid.named_parameters():
        assert layout.whole_shape(name) == shapes[name]
        # parts put back are parts again, and parts cut anew are the parts held
        again = layout.part(name, expected[name])
        assert torch.equal(local_part(again), local_part(parameter.detach()))
        assert torch.equal(layout.whole(name, again), expected[name])
        same = True
        for piece in layout.pieces(name):
            box = tuple(slice(a, a + n) for a, n in zip(piece.at, piece.size, strict=True))
            same = same and torch.equal(local_part(parameter.detach())[piece.slices()], expected[name][box])
        out[name] = (shapes[name], [(p.at, p.size) for p in layout.pieces(name)], layout.holders(name), same)
    return out


@pytest.mark.parametrize("cp, dp", [(2, 1), (3, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize(
    "fsdp, model, strategy",
    [(True, {"sinks": True}, "lss"), (True, LEARNED, "lss"), (False, LEARNED, "lss"), (False, {}, "tp")],
    ids=["sharded", "sharded-cut", "cut", "tp"],
)
def test_pieces_tile_the_whole(cp, dp, fsdp, model, strategy):
    """Uneven and empty slices included: 4 sinks of 4 heads on 3 ranks are 2, 2 and none."""
    heads = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48} if strategy == "tp" and cp == 3 else {"n_kv_heads": 4}
    by_rank = pool(cp * dp).run(_pieces, cp, dp, fsdp, model | heads, strategy)
    empty = 0
    for name, (shape, _, _, _) in by_rank[0].items():
        covered = torch.zeros(shape, dtype=torch.int64)
        for rank, found in enumerate(by_rank):
            _, boxes, holders, same = found[name]
            assert same, name
            assert rank in holders
            assert all(by_rank[other][name][1] == boxes for other in holders)
            empty += not boxes
            if rank == holders[0]:
                for at, size in boxes:
                    covered[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))] += 1
        assert bool((covered == 1).all()), name
    assert (empty > 0) == (cp == 3 and "sinks" in model)


# -- passes out of order ---------------------------------------------------------------------------------------------------


def _passes(what):
    """Errors of gradients or logits where passes come in another order than a training loop's."""
    S = 12
    config = model_config(tie_embeddings=False)
    plain = Transformer(config, S, seed=3).double()
    if what == "first rank's weights":
        mine = Transformer(config, S, seed=3 + mesh(2).get_rank()).double()
    else:
        mine = Transformer(config, S, seed=3).double()
    model = lss.parallelize(mine, mesh(2), fsdp=True)
    ids = torch.randint(61, (1, S), generator=torch.Generator().manual_seed(2))
    other = ids.flip(1)
    for m in (plain, model):
        updated = list(m.parameters())  # as an optimizer has them
        if what == "evaluation before backward":
            loss = m(ids, ids).loss
            with torch.no_grad():
                m(other, other)
            loss.backward()
        elif what == "two passes, then two backwards":
            losses = [m(x, x).loss for x in (ids, other)]
            losses[1].backward()
            losses[0].backward()
        elif what == "an update after a pass without backward":
            m(other, other)
            with torch.no_grad():
                for p in updated:
                    p.mul_(1.5)
            m(ids, ids).loss.backward()
        elif what == "a loss of one's own":
            m(ids).logits.square().mean().backward()
        else:
            m(ids, ids).loss.backward()
    if what == "a loss of one's own":  # each rank's mean is of its own tokens
        for p in model.parameters():
            local_part(p.grad).mul_(0.5)
    layout = layout_of(model)
    grads = {n: layout.whole(n, p.grad) for n, p in model.named_parameters()}
    return max(gradient_errors(grads, {n: p.grad for n, p in plain.named_parameters()}).values())


@pytest.mark.parametrize(
    "what",
    ["first rank's weights", "evaluation before backward", "two passes, then two backwards",
     "an update after a pass without backward", "a loss of one's own"],
)  # fmt: skip
def test_passes_in_any_order(what):
    assert max(pool(2).run(_passes, what)) <= 1e-12


def _logits(when):
    S, config = 12, model_config()
    ids = torch.randint(61, (1, S), generator=torch.Generator().manual_seed(2))
    expected = Transformer(config, S, seed=3).double()(ids, ids).logits.detach()
    model = lss.parallelize(Transformer(config, S, seed=3).double(), mesh(2), fsdp=True)
    with torch.set_grad_enabled(when != "evaluation"):
        output = model(ids, ids)
    if when != "evaluation":
        output.loss.backward()
    if when == "after the update":
        torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
        try:
            return output.logits
        except RuntimeError as error:
            return str(error)
    if when == "after the next pass":
        model(ids, ids)
    found = lss.unshard(output.logits.detach(), mesh(2))
    whole = all(isinstance(p, DTensor) for p in model.parameters()) or when == "after the next pass"
    return float((found - expected).norm() / expected.norm()), whole


@pytest.mark.parametrize("when", ["evaluation", "after backward", "after the next pass"])
def test_logits_after_the_head_was_given_back(when):
    for error, sharded in pool(2).run(_logits, when):
        assert error <= 1e-12
        assert sharded


def test_logits_after_the_update_are_refused():
    for answer in pool(2).run(_logits, "after the update"):
        assert "before the update" in answer


def _misuse(what):
    if what == "tp":
        lss.parallelize(Transformer(model_config(), 8), mesh(2), fsdp=True, strategy="tp")
    if what == "reshard":
        lss.parallelize(Transformer(model_config(), 8), mesh(2), fsdp=True, fsdp_reshard="always")
    model = Transformer(model_config(), 8)
    model.final_norm.to(torch.bfloat16)
    lss.parallelize(model, mesh(2), fsdp=True)


@pytest.mark.parametrize(
    "what, words",
    [("tp", "fsdp=True: strategy='tp'"), ("reshard", "fsdp_reshard=always"), ("dtypes", "bfloat16, float32")],
)
def test_misuse_is_said_in_words(what, words):
    for ok, error in pool(2).outcomes(_misuse, what):
        assert not ok
        assert error[0] == "Refused", error[2]
        assert words in error[1]


def _compiled():
    """A step's errors with compiled pieces, how often a graph broke, and how many graphs there are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = {"compile": True, "checkpointing": "attention", "tiles": 12, "model": {"n_layers": 3}, "labels": "uneven"}
    result = parity_case(2, fsdp=True, **how)
    counters = torch._dynamo.utils.counters
    return result, sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_pieces_compute_the_same():
    for result, breaks, graphs in pool(2).run(_compiled):
        assert result["gradient"] <= BOUNDS[torch.float64], result["parameter"]
        assert breaks == 0
        assert graphs == 5  # as without sharding: no layer has one of its own
