"""The parallelized model as its users call it, beside the parity grid: labels, collectives, memory, misuse."""

from __future__ import annotations

import pytest
import torch

import lss
from lss.comm import count_collectives
from lss.model import Transformer
from lss.parallel import full_state_dict, layout_of
from tests.distributed.cases import checkerboard
from tests.distributed.model_cases import gradient_errors, model_config, one_process
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


def _whole_batches(cp, what):
    """A feature given by the caller of a whole-batch model, against the plain model and an oracle of softmax."""
    config = model_config(kind="encoder_decoder") if what == "source" else model_config()
    S, rows = 13, 1 if what == "documents" else 2
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(61, (rows, S), generator=generator)
    given, edges, keep = {}, None, None
    if what == "documents":
        edges = [0, 1, 6, 13]
        given["cu_seqlens"] = torch.tensor(edges, dtype=torch.int32)
    elif what == "padding":
        keep = torch.arange(S)[None] < torch.tensor([[13], [8]])
        given["attention_mask"] = keep
    elif what == "source":
        given["source_ids"] = torch.randint(61, (rows, 7), generator=generator)
        given["source_mask"] = torch.arange(7)[None] < torch.tensor([[7], [4]])
    elif what == "prefix":
        given["prefix"] = 5
    else:
        given["mask_mod"] = checkerboard
    labels = ids if keep is None else ids.masked_fill(~keep, -100)
    # labels shifted by hand, inside documents
    shifted = torch.cat((labels[:, 1:], torch.full((rows, 1), -100)), 1)
    for end in (edges or [])[1:-1]:
        shifted[:, end - 1] = -100
    losses, gradients = [], []
    for number in range(3):
        model = Transformer(config, S, seed=3).double()
        if number == 0:
            model = lss.parallelize(model, mesh(cp))
        if number < 2:
            loss = model(ids, labels, **given).loss
        elif what == "mask_mod":
            break  # the rules of the oracle know none; tests/distributed/test_masks.py holds attention itself to one
        else:
            plain = {name: x for name, x in given.items() if name != "cu_seqlens"} | ({"edges": edges} if edges else {})
            losses += one_process(config, S, torch.float64, [(ids, shifted)], **plain)[0]
            break
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    spread = max(abs(x - losses[0]) for x in losses)
    return spread, max(gradient_errors(*gradients).values())


@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("what", ["documents", "padding", "source", "prefix", "mask_mod"])
def test_features_given_with_a_whole_batch(cp, what):
    for loss, gradient in pool(cp).run(_whole_batches, cp, what):
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
    if what in ("strategy", "order", "offload", "checkpointing"):
        values = {"strategy": "rings", "order": "zigzag", "offload": "cpu", "checkpointing": "some"}
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
    if what == "learned documents":
        learned = lss.parallelize(Transformer(model_config(positions="learned"), 8), mesh(2))
        learned(ids, ids, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
    if what == "two rows of documents":
        model(ids.repeat(2, 1), cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
    if what == "mask shape":
        model(ids, attention_mask=torch.ones(1, 5))
    both = lss.parallelize(Transformer(model_config(kind="encoder_decoder"), 8), mesh(2)) if "source" in what else None
    if what == "source mask shape":
        both(ids, source_ids=ids[:, :5], source_mask=torch.ones(1, 4))
    if what == "documents with a source":
        both(ids, source_ids=ids, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
    if what == "mask of no source":
        model(ids, source_mask=torch.ones(1, 8))
    if what == "negative prefix":
        model(ids, prefix=-3)
    if what == "plain mask shape":
        Transformer(config, 8)(ids, attention_mask=torch.ones(1, 5))
    if what == "no source":
        lss.parallelize(Transformer(model_config(kind="encoder_decoder"), 8), mesh(2))(ids)
    if what == "source of a decoder":
        model(ids, source_ids=ids)
    if what == "long learned":
        packed = lss.parallelize(Transformer(model_config(positions="learned"), 6), mesh(2), packed=True)
        packed(ids)
    if what == "cross under ring":
        lss.parallelize(Transformer(model_config(kind="encoder_decoder"), 8), mesh(2), strategy="ring")
    if what == "second backward":
        model(ids, ids).loss.backward()
        model(ids, ids).loss.backward()


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("strategy", "Refused", "strategy=rings"),
        ("order", "Refused", "order=zigzag"),
        ("offload", "Refused", "offload=cpu"),
        ("checkpointing", "Refused", "checkpointing=some"),
        ("foreign", "Refused", "model=Linear"),
        ("tp heads", "Refused", "model.n_heads=3"),
        ("twice", "Refused", "already"),
        ("other length", "Refused", "6 tokens"),
        ("precut labels", "Refused", "shift_labels"),
        ("precut positions", "Refused", "positions"),
        ("label shape", "Refused", "labels=(1, 5)"),
        ("learned documents", "Refused", "packed=True"),
        ("two rows of documents", "Refused", "2 rows"),
        ("mask shape", "Refused", "attention_mask=(1, 5)"),
        ("source mask shape", "Refused", "source_mask=(1, 4)"),
        ("documents with a source", "Refused", "cu_seqlens"),
        ("mask of no source", "Refused", "source_mask=(1, 8)"),
        ("negative prefix", "Refused", "prefix=-3"),
        ("plain mask shape", "Refused", "attention_mask=(1, 5)"),
        ("no source", "Refused", "source_ids=None"),
        ("source of a decoder", "Refused", "has no source"),
        ("long learned", "Refused", "6 rows"),
        ("cross under ring", "Refused", "strategy='ring' with model.kind"),
        ("second backward", "RuntimeError", "no_sync"),
    ],
)
def test_misuse_is_said_in_words(what, kind, words):
    for ok, error in pool(2).outcomes(_misuse, what):
        assert not ok
        assert error[0] == kind, error[2]
        assert words in error[1]
