"""What the ranks do in `test_hf.py` beside plain parity."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional as F

import lss
from lss.comm import count_collectives
from tests.distributed.pool import mesh
from tests.integrations.hf_cases import batch, build, gradients, parity, reference, shifts_of, worst


def data_parallel(name, changes=None):
    """Two sequence groups of two ranks, a row each, with other counts of labels."""
    inputs = batch("padded", 37, True)
    model = lss.parallelize(build(name, **(changes or {})), mesh(2, 2))
    row = mesh(2, 2)["dp"].get_local_rank()
    loss = model(**{k: v[row : row + 1] for k, v in inputs.items()}).loss
    loss.backward()
    plain, expected = reference(build(name, **(changes or {})), inputs, True)
    norm = float(lss.clip_grad_norm_(model, 0.0))
    exact = sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5
    return abs(float(loss.detach()) - plain) / plain, abs(norm - exact) / exact, *worst(gradients(model), expected)


def accumulation(cp):
    """Two micro-batches with other counts of labels add up to the step's mean."""
    first, second = batch("plain", 37, True), batch("padded", 29, True)
    shifted = [F.pad(x["labels"][:, 1:], (0, 1), value=-100) for x in (first, second)]
    count = sum(int((x != -100).sum()) for x in shifted)
    model = lss.parallelize(build("llama"), mesh(cp))
    with model.no_sync():
        one = model(**first, num_items_in_batch=count).loss
        # both forwards before the first backward: the second must not change what the first one's layers go by
        two = model(**second, num_items_in_batch=torch.tensor(count)).loss
        one.backward()
    two.backward()
    plain = build("llama")
    losses = [reference(plain, inputs, True, count=count)[0] for inputs in (first, second)]
    return abs(float((one + two).detach()) - sum(losses)) / sum(losses), *worst(gradients(model), gradients(plain))


def checkpointed(cp):
    """transformers' own checkpointing, with another batch's forward between a forward and its backward."""
    first, second = batch("plain", 37, True), batch("packed", 53, True)
    model = lss.parallelize(build("mistral"), mesh(cp), checkpointing="full")
    model.train()
    with model.no_sync(), count_collectives() as counter:
        one, two = model(**first, num_items_in_batch=10).loss, model(**second, num_items_in_batch=10).loss
        one.backward()
    two.backward()
    plain = build("mistral")
    for inputs in (first, second):
        reference(plain, inputs, True, count=10)
    gathers = sum(calls for kind, purpose, calls, _ in counter.rows() if "k" in purpose.lower())
    return gathers, *worst(gradients(model), gradients(plain))


def router(name, cp, kind, dp=1):
    """The load-balancing loss from all ranks' counts; transformers computes it in float32."""
    given = {"output_router_logits": True}
    return parity(name, cp, kind, dp=dp, given=given, changes={"router_aux_loss_coef": 0.5})


def router_by_config(cp):
    """The loss that the config asks for, and that it is not a mean of the ranks' own."""
    inputs = batch("plain", 37, True)
    changes = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
    model = lss.parallelize(build("mixtral", **changes), mesh(cp))
    output = model(**inputs)
    model.config.output_router_logits = False
    plain = build("mixtral", **changes)
    exact = plain(**inputs, use_cache=False).aux_loss
    return float(output.aux_loss.detach()), float(exact.detach())


def precut(cp):
    """Segments with their positions, cut by the caller."""
    inputs, S = batch("padded", 37, True), 37
    seg = lss.make_segment(S, mesh(cp))
    labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    positions = torch.arange(S).expand(2, -1)
    model = lss.parallelize(build("llama"), mesh(cp), precut=True)
    loss = model(
        input_ids=lss.shard(inputs["input_ids"], mesh(cp), seg=seg, pad_value=0),
        position_ids=lss.shard(positions, mesh(cp), seg=seg, pad_value=0),
        shift_labels=lss.shard(labels, mesh(cp), seg=seg), attention_mask=inputs["attention_mask"], seq_len=S,
    ).loss  # fmt: skip
    loss.backward()
    plain, expected = reference(build("llama"), inputs, True)
    return abs(float(loss.detach()) - plain) / plain, *worst(gradients(model), expected)


def documents(name, cp, order="head_tail"):
    """Documents given by cu_seqlens against one process that takes them one by one."""
    S, edges = 53, [0, 11, 12, 40, 53]
    model = build(name)
    shifts = shifts_of(model)
    inputs = batch("packed", S, shifts)
    inputs.pop("position_ids")
    labels = inputs["labels"]
    labels[:, 12] = 7  # a document's first token, which the one before it must not be asked for
    model = lss.parallelize(model, mesh(cp), order=order)
    loss = model(**inputs, cu_seqlens=torch.tensor(edges, dtype=torch.int32)).loss
    loss.backward()
    pieces = [{k: v[:, a:b] for k, v in inputs.items()} for a, b in pairwise(edges)]
    targets = [F.pad(p["labels"][:, 1:], (0, 1), value=-100) if shifts else p["labels"] for p in pieces]
    count = sum(int((t != -100).sum()) for t in targets)
    plain = build(name)
    total = sum(reference(plain, piece, shifts, count=count)[0] for piece in pieces)
    return abs(float(loss.detach()) - total) / total, *worst(gradients(model), gradients(plain))


def outputs(cp):
    """Shapes of what comes back, with and without labels, as a tuple; and that nothing else changed."""
    from transformers.masking_utils import sdpa_mask

    inputs = batch("plain", 37, True)
    ids = inputs["input_ids"]
    model = build("gemma3", implementation="sdpa")
    other = type(model)(model.config)  # shares the config object
    names = [name for name, _ in model.named_parameters()]
    model = lss.parallelize(model, mesh(cp))
    assert [name for name, _ in model.named_parameters()] == names
    assert other.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "lss"
    assert other.double()(input_ids=ids).logits.shape == (2, 37, 96)
    without = model(input_ids=ids)
    assert without.loss is None
    assert without.past_key_values is None
    whole = lss.unshard(without.logits, mesh(cp), length=37)
    again = build("gemma3", implementation="sdpa")(input_ids=ids).logits
    assert float((whole - again).abs().max()) < 1e-5
    loss, logits = model(ids, labels=inputs["labels"], return_dict=False)[:2]
    assert loss.dim() == 0
    assert logits.shape[1] == without.logits.shape[1]
    output = model(ids, labels=inputs["labels"])
    assert float(output[0]) == float(loss)
    nothing = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    assert float(nothing) == 0.0
    # the mask builder of one process, which makes S x S, is the one not asked
    assert sdpa_mask(1, 3, 3, allow_is_causal_skip=False).shape == (1, 1, 3, 3)
    return True


def leaks(cp):
    """Bits of the logits that change before a changed token, or in another document."""
    inputs = batch("packed", 37, True)
    model = lss.parallelize(build("mistral"), mesh(cp))
    seg = lss.make_segment(37, mesh(cp))
    with torch.no_grad():
        before = model(**inputs).logits
        inputs["input_ids"][:, 15] = (inputs["input_ids"][:, 15] + 1) % 96
        changed = (model(**inputs).logits != before).any(-1)[0]
    places = seg.positions
    allowed = (places >= 15) & (places < 21)  # documents are 0..9, 9..10, 10..21, 21..37
    return int(changed[~allowed & (places < 37)].sum()), int(changed[allowed].sum())
