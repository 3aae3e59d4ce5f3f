"""Generation over a cut prompt and a cut cache, against one process that reads the whole text again for every token."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import pytest
import torch

from lss.comm import count_collectives, cp_communicator
from lss.context_parallel import AttentionOptions
from lss.infer import Sampling, generate
from lss.infer.decode import attend_part
from lss.infer.generate import Decoder
from lss.infer.passes import passes_of
from lss.kernels import Rules
from lss.kernels.merge import merge, merge_all
from lss.model import ModelOps, Transformer
from tests.distributed.model_cases import model_config, softmax_attention
from tests.distributed.pool import mesh, pool

LAYERS, NEW = 2, 9
GREEDY = Sampling(temperature=0)
MODELS = {
    "gqa": {},
    "windows": {"windows": (4, 0), "n_heads": 6, "n_kv_heads": 3, "d_model": 48},
    "short-windows": {"windows": (3,), "sinks": True},
    "alibi": {"positions": "alibi", "softcap": 3.0},
    "hybrid": {"layers": "sa", "scan_heads": 4, "scan_state": 6, "scan_groups": 2},
    "spade": {"layers": "ba", "windows": (3,), "scan_heads": 4, "scan_state": 6, "conv_width": 3},
    "scans": {"layers": "s", "scan_heads": 4, "scan_state": 6, "conv_width": 7},
    "learned": {"positions": "learned", "tie_embeddings": False, "norm": "layernorm", "mlp": "gelu"},
}


def prompt(length, rows=1):
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(length))


def plain(name):
    model = Transformer(model_config(n_layers=LAYERS, **MODELS[name]), 40, seed=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:  # sinks and norms that are told from their first values
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double())
            else:
                parameter.mul_(6.0)  # far from uniform, so that a wrong key shows
    return model.eval()


@cache
def expected(name, length, rows=1):
    """Greedy tokens and logits; everything is computed anew for each."""
    model, ids, logits = plain(name), prompt(length, rows), []
    for _ in range(NEW):
        with torch.no_grad():
            output = model(ids, positions=torch.arange(ids.shape[1]), ops=ModelOps(attention=softmax_attention))
        logits.append(output.logits[:, -1])
        ids = torch.cat((ids, logits[-1].argmax(-1)[:, None]), 1)
    return ids[:, length:], torch.stack(logits)


def generated(cp, name, length, order, rows=1, dp=1):
    """(tokens, logits of every token, rows of the counted collectives) of this rank."""
    logits = []
    with count_collectives() as counter:
        found = generate(plain(name), prompt(length, rows), mesh(cp, dp), max_new_tokens=NEW, sampling=GREEDY, order=order,
                         seen=lambda _, z: logits.append(z))  # fmt: skip
    return found, torch.stack(logits), counter.rows()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cp, length, order", [
    (1, 13, "head_tail"), (2, 13, "head_tail"), (2, 1, "contiguous"), (3, 13, "contiguous"), (3, 2, "head_tail"),
    (4, 13, "head_tail"), (4, 17, "contiguous"), (4, 3, "contiguous"),
])  # fmt: skip
def test_tokens_and_logits_are_those_of_one_process(cp, length, order, name):
    tokens, logits = expected(name, length)
    for found, z, _ in pool(cp).run(generated, cp, name, length, order):
        assert torch.equal(found, tokens)
        assert ((z - logits).norm() / logits.norm()) <= 1e-10


def test_rows_of_a_batch_and_of_data_parallel_ranks():
    tokens, logits = expected("gqa", 7, 3)
    for found, z, _ in pool(4).run(generated, 2, "gqa", 7, "head_tail", 3, 2):
        assert torch.equal(found, tokens)
        assert ((z - logits).norm() / logits.norm()) <= 1e-10


@pytest.mark.parametrize("cp", [2, 4])
def test_collectives_of_a_scan_are_of_the_prompt_alone(cp):
    """Its state and last tokens are summed up once; then nothing but the token travels."""
    B, N, H, P, S = 2, 4, 16, 6, 13
    C, chunks = N * H + 2 * P, 2 * cp
    for _, _, rows in pool(cp).run(generated, cp, "scans", S, "head_tail", B):
        found = {(kind, purpose): (calls, size) for kind, purpose, calls, size in rows}
        assert set(found) == {("all_gather", "state"), ("all_reduce", "state"), ("all_to_all", "halo"),
                              ("all_reduce", "logits"), ("broadcast", "token")}  # fmt: skip
        assert found["all_gather", "state"] == (2 * LAYERS, LAYERS * B * chunks * N * (P * H + 2) * 8)
        assert found["all_reduce", "state"] == (2 * LAYERS, LAYERS * B * (N * P * H + 6 * C) * 8)


@pytest.mark.parametrize("cp", [2, 4])
def test_collectives_of_every_token(cp):
    """One gather a layer and the token itself; of the prompt those of attention, and its logits."""
    B, N, K, H, V, S = 2, 4, 2, 8, 61, 13
    padded = -(-S // cp) * cp
    for _, _, rows in pool(cp).run(generated, cp, "gqa", S, "contiguous", B):
        assert {(kind, purpose): (calls, size) for kind, purpose, calls, size in rows} == {
            ("all_gather", "kv"): (LAYERS, LAYERS * 2 * B * padded * K * H * 8),
            ("all_reduce", "logits"): (1, B * V * 8),
            ("broadcast", "token"): (NEW, NEW * B * 8),
            ("all_gather", "decode"): (LAYERS * (NEW - 1), LAYERS * (NEW - 1) * cp * B * N * (H + 1) * 8),
        }


def cached(cp, length, most, order):
    """What this rank holds, before and after: bytes, tokens of every rank, its places."""
    the_mesh = mesh(cp)
    comm = cp_communicator(the_mesh)
    decoder = Decoder(passes_of(plain("gqa"), comm), the_mesh, comm, order, AttentionOptions(), most)
    with torch.no_grad():
        decoder.read(prompt(length))
        before = decoder.cache.bytes, list(decoder.cache.counts)
        for _ in range(most):
            decoder.step(torch.tensor([5]))
    return before, decoder.cache.bytes, list(decoder.cache.counts), decoder.cache.visible(0, None)[2].tolist()


@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
@pytest.mark.parametrize("cp, length, most", [(1, 16, 5), (2, 16, 5), (4, 16, 8), (4, 9, 11), (3, 1, 20)])
def test_the_cache_stays_cut_and_balanced(cp, length, most, order):
    a_token = LAYERS * 2 * 2 * 8 * 8
    results = pool(cp).run(cached, cp, length, most, order)
    held = sorted(place for *_, places in results for place in places)
    assert held == list(range(length + most))
    for (bytes_before, counts_before), bytes_after, counts, places in results:
        assert bytes_before == bytes_after, "room was made at once"
        assert sum(counts_before) == length
        assert sum(counts) == length + most
        assert max(counts) - min(counts) <= 1
        assert len(places) in counts
        assert bytes_after == a_token * len(places)
        assert places == sorted(places)


def test_parts_of_keys_are_merged_as_two_by_two():
    draw = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 2, 1, 4, 8, generator=draw, dtype=torch.float64)
    lses = torch.randn(3, 2, 4, 1, generator=draw, dtype=torch.float64)
    lses[1, 0], lses[:, 1, 2] = float("-inf"), float("-inf")
    outs[:, 1, :, 2] = 0.0
    out, lse = merge_all(outs, lses)
    pairs = outs[0], lses[0]
    for other in (1, 2):
        pairs = merge(*pairs, outs[other], lses[other])
    torch.testing.assert_close(out, pairs[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(lse, pairs[1], rtol=1e-13, atol=0)


def test_plain_attention_of_a_part_equals_the_kernels():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, T, heads, 8, generator=draw, dtype=torch.float64) for T, heads in ((1, 6), (5, 3), (5, 3)))
    places = torch.tensor([0, 1, 4, 8, 9])
    fast = attend_part(q, k, v, places, 9, Rules())
    slow = attend_part(q, k, v, places, 9, Rules(slopes=torch.zeros(6)))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def other_ranks_rounding():
    """A rank whose logits differ in the last digits goes on with the first rank's tokens."""
    the_mesh, model = mesh(2), plain("gqa")
    if the_mesh.get_rank():
        with torch.no_grad():
            model.embedding.weight.mul_(1.5)
    return generate(model, prompt(5), the_mesh, max_new_tokens=6, sampling=Sampling(seed=4))


def test_all_ranks_go_on_with_the_same_tokens():
    first, second = pool(2).run(other_ranks_rounding)
    assert torch.equal(first, second)


def ended(end):
    found = generate(plain("gqa"), prompt(13), mesh(2), max_new_tokens=NEW, sampling=GREEDY, end=end)
    return found.shape[1]


def test_it_ends_behind_the_token_that_ends_a_text():
    tokens = expected("gqa", 13)[0][0].tolist()
    end = tokens[4]
    assert pool(2).run(ended, end) == [tokens.index(end) + 1] * 2


def refused(ids, options, model="gqa"):
    generate(plain(model), torch.tensor(ids), mesh(1), **({"max_new_tokens": 2} | options))


@pytest.mark.parametrize("ids, options, words", [
    ([[1, 61]], {}, "id 61"),
    ([[]], {}, "prompt"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ([[1]], {"order": "balanced"}, "order=balanced"),
    ([[1] * 33], {"max_new_tokens": 9, "model": "learned"}, "use 8 or less"),
])  # fmt: skip
def test_refusals(ids, options, words):
    options = dict(options)
    model = options.pop("model", "gqa")
    ((ok, error),) = pool(1).outcomes(refused, ids, options, model)
    assert not ok
    if ids != [[]]:
        assert error[0] == "Refused", error
    assert words in error[1]


def of_transformers(cp, name, length, order):
    """(worst error of logits, whether the tokens are those of the model's own generate)."""
    from tests.integrations.hf_cases import build

    ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))
    theirs, ours = build(name, torch.float64).eval(), build(name, torch.float64)
    theirs.set_attn_implementation("eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    tokens, logits = ids, []
    for _ in range(NEW):
        with torch.no_grad():
            logits.append(theirs(tokens, use_cache=False).logits[:, -1])
        tokens = torch.cat((tokens, logits[-1].argmax(-1)[:, None]), 1)
    found = []
    made = generate(ours, ids, mesh(cp), max_new_tokens=NEW, sampling=GREEDY, order=order, seen=lambda _, z: found.append(z))
    expected = torch.stack(logits)
    return float((torch.stack(found) - expected).norm() / expected.norm()), torch.equal(made, tokens[:, length:])


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "deepseek_v3", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("cp, order", [(1, "head_tail"), (3, "head_tail")])
def test_models_of_transformers(cp, order, name):
    bound = 2e-6 if name in ("gemma2", "deepseek_v3", "gpt_oss") else 1e-10
    for error, same in pool(cp).run(of_transformers, cp, name, 11, order):
        assert error <= bound
        assert same
