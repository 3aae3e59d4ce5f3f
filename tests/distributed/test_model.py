"""The parallelized model as its users call it, beside the parity grid: labels, collectives, memory, misuse."""

from __future__ import annotations

import pytest
import torch

import lss
from lss.comm import count_collectives
from lss.model import Transformer
from lss.parallel import full_state_dict, layout_of
from tests.distributed.model_cases import gradient_errors, model_config
from tests.distributed.pool import mesh, pool


def _plain_call(cp, order):
    """model(input_ids, labels) with unshifted labels and nothing else, against the same call on the plain model."""
    ids = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :6] = -100
    plain = Transformer(model_config(), 13, seed=3).double()
    expected = plain(ids, labels).loss
    expected.backward()
    model = lss.parallelize(Transformer(model_config(), 13, seed=3).double(), mesh(cp), order=order)
    found = model(ids, labels).loss
    found.backward()
    grads = [{name: p.grad for name, p in m.named_parameters()} for m in (model, plain)]
    errors = gradient_errors(*grads)
    return float((found - expected).detach().abs()), max(errors.values())


@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
def test_labels_are_shifted_before_the_cut(cp, order):
    for loss, gradient in pool(cp).run(_plain_call, cp, order):
        assert loss <= 1e-13
        assert gradient <= 1e-12


def _collectives(strategy, **options):
    heads = {"n_heads": 4, "n_kv_heads": 4}
    model = lss.parallelize(Transformer(model_config(n_layers=3, **heads), 16), mesh(2), strategy=strategy, **options)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    with count_collectives() as counter:
        model(ids, ids).loss.backward()
    return counter.rows()


def test_collectives_of_a_whole_step():
    """Two a layer under LSS in the paper's setting; eight under tensor + sequence parallelism."""
    layers, size = 3, 2 * 16 * 4 * 8 * 4
    parameters = sum(p.numel() for p in Transformer(model_config(n_layers=3, n_kv_heads=4), 16).parameters())
    for rows in pool(2).run(_collectives, "lss", regather=False, order="contiguous", head_chunks=1):
        counts = {(kind, purpose): (calls, size) for kind, purpose, calls, size in rows}
        assert counts.pop(("all_gather", "kv")) == (layers, layers * size)
        assert counts.pop(("reduce_scatter", "dkv")) == (layers, layers * size)
        assert counts.pop(("all_reduce", "loss")) == (1, 16)
        calls, sent = counts.pop(("all_reduce", "gradients"))
        names = len(list(Transformer(model_config(n_layers=3), 16).parameters()))
        assert (calls, sent) == (1, 4 * (parameters + names))
        assert not counts
    for rows in pool(2).run(_collectives, "tp"):
        activations = [(kind, calls, size) for kind, purpose, calls, size in rows if purpose == "activations"]
        # B*S*D elements in float32 each: entered and left twice a layer, forward and backward
        assert activations == [("all_gather", 4 * layers, 4 * layers * 16 * 32 * 4),
                               ("reduce_scatter", 4 * layers, 4 * layers * 16 * 32 * 4)]  # fmt: skip


def _cut_table(cp, seq_len):
    config = model_config(positions="learned")
    whole = Transformer(config, seq_len, seed=3).position_table.weight.detach().clone()
    model = lss.parallelize(Transformer(config, seq_len, seed=3), mesh(cp))
    segment = layout_of(model).segment(seq_len)
    rows = model.position_table.weight.detach()
    mine = [i for i, p in enumerate(segment.positions.tolist()) if p < seq_len]
    held = torch.equal(rows[mine], whole[segment.positions[mine]])
    return len(rows), held, torch.equal(full_state_dict(model)["position_table.weight"], whole)


def test_each_rank_holds_its_rows_of_the_position_table():
    for rows, held, put_back in pool(3).run(_cut_table, 3, 25):
        assert rows == 10  # 25 rows in 6 chunks of 5
        assert held
        assert put_back


def _first_rank_decides(seed_by_rank):
    rank = mesh(2)["cp"].get_local_rank()
    model = lss.parallelize(Transformer(model_config(), 8, seed=rank if seed_by_rank else 0), mesh(2))
    return float(sum(p.double().sum() for p in model.parameters()).detach())


def test_ranks_start_from_the_first_ranks_weights():
    first, second = pool(2).run(_first_rank_decides, True)
    assert first == second


def _bf16_backward():
    model = lss.parallelize(Transformer(model_config(), 16).to(torch.bfloat16), mesh(2))
    ids = torch.arange(16)[None]
    model(ids, ids).loss.backward()
    return all(p.grad.dtype == torch.bfloat16 and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_half_precision_parameters_train():
    assert all(pool(2).run(_bf16_backward))


def _misuse(what):
    config = model_config(positions="learned") if what == "other length" else model_config()
    if what in ("strategy", "order", "fsdp", "offload", "checkpointing"):
        values = {"strategy": "rings", "order": "zigzag", "fsdp": True, "offload": "cpu", "checkpointing": "some"}
        lss.parallelize(Transformer(config, 8), mesh(2), **{what: values[what]})
    if what == "foreign":
        lss.parallelize(torch.nn.Linear(2, 2), mesh(2))
    if what == "tp heads":
        lss.parallelize(Transformer(model_config(n_heads=3, n_kv_heads=3, d_model=24), 8), mesh(2), strategy="tp")
    model = lss.parallelize(Transformer(config, 8), mesh(2), precut=what.startswith("precut"))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    if what == "twice":
        lss.parallelize(model, mesh(2))
    if what == "other length":
        model(ids[:, :6], ids[:, :6])
    if what == "precut labels":
        model(ids[:, :4], ids[:, :4])
    if what == "precut positions":
        model(ids[:, :4])
    if what == "label shape":
        model(ids, ids[:, :5])
    if what == "second backward":
        model(ids, ids).loss.backward()
        model(ids, ids).loss.backward()


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("strategy", "Refused", "strategy=rings"),
        ("order", "Refused", "order=zigzag"),
        ("fsdp", "Refused", "fsdp=True"),
        ("offload", "Refused", "offload=cpu"),
        ("checkpointing", "Refused", "checkpointing=some"),
        ("foreign", "Refused", "model=Linear"),
        ("tp heads", "Refused", "model.n_heads=3"),
        ("twice", "Refused", "already"),
        ("other length", "Refused", "6 tokens"),
        ("precut labels", "Refused", "shift_labels"),
        ("precut positions", "Refused", "positions"),
        ("label shape", "Refused", "labels=(1, 5)"),
        ("second backward", "RuntimeError", "no_sync"),
    ],
)
def test_misuse_is_said_in_words(what, kind, words):
    for ok, error in pool(2).outcomes(_misuse, what):
        assert not ok
        assert error[0] == kind, error[2]
        assert words in error[1]
