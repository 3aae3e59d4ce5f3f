"""LSS attention a chunk of the sequence at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lss.context_parallel import count_token_chunks
from lss.context_parallel.chunked import chunk_runs, token_spans
from lss.segment import make_segment
from tests.distributed.cases import attention_case, counted_case
from tests.distributed.model_cases import BOUNDS, parity_case
from tests.distributed.pool import mesh, pool

ORDERS = ["head_tail", "contiguous", "balanced"]


@pytest.mark.parametrize(
    "cp, order, chunks, causal", list(product([1, 2, 3, 4], ORDERS, [2, 3, 6], [True, False]))
)
def test_attention(cp, order, chunks, causal):
    options = {"order": order, "token_chunks": chunks, "head_chunks": 1 + chunks % 2, "regather": chunks < 6}
    for errors, *_ in pool(cp).run(attention_case, cp, S=41, N=4, K=2, causal=causal, **options):
        assert max(errors) <= 1e-13


@pytest.mark.parametrize("options", [
    {"window": 7}, {"cu_seqlens": [0, 9, 10, 41], "B": 1}, {"prefix": 11}, {"softcap": 2.0, "sinks": [0.5, -1.0, 2.0, 0.0]},
    {"dropout_p": 0.3, "seed": 3, "kernel": "tiled"}, {"per_node": 2}, {"per_node": 2, "regather": False},
])  # fmt: skip
def test_attention_with_other_features(options):
    for errors, *_ in pool(4).run(attention_case, 4, S=41, N=4, K=2, token_chunks=3, **options):
        assert max(errors) <= 1e-13


def test_half_precision_is_rounded_once():
    """Outputs and dQ are summed over chunks in float32: many chunks err no more than one."""
    errors = []
    for chunks in (1, 16):
        options = {"dtype": torch.bfloat16, "kernel": "sdpa", "transport": "collective", "token_chunks": chunks}
        errors.append(max(max(e) for e, *_ in pool(2).run(attention_case, 2, S=96, N=4, K=2, **options)))
    assert errors[1] <= 1.25 * errors[0]


@pytest.mark.parametrize("regather", [True, False])
def test_collectives_are_counted_exactly(regather):
    """One gather a chunk forward, one back with regather, one scatter; as many bytes as without chunks."""
    cp, S, K, H, chunks, heads = 4, 64, 2, 8, 3, 2
    options = {"token_chunks": chunks, "head_chunks": heads, "regather": regather, "transport": "collective"}
    whole = 2 * S * K * H * 8
    for forward, backward, *_ in pool(cp).run(counted_case, cp, S=S, N=4, K=K, H=H, **options):
        gathers = {("all_gather", "kv", None): (chunks * heads, whole)}
        assert forward == gathers
        assert backward == (gathers if regather else {}) | {("reduce_scatter", "dkv", None): (chunks * heads, whole)}


def _largest(cp, chunks):
    """Elements of the largest tensor that one forward and backward allocate."""
    from torch.utils._python_dispatch import TorchDispatchMode

    import lss

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
            return out

    T, K, H = 64, 2, 8
    q, k, v = (torch.randn(1, T, K, H, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        options = {"token_chunks": chunks, "head_chunks": 1, "transport": "collective"}
        lss.attention(q, k, v, mesh=mesh(cp), **options).sum().backward()
    return largest.elements / (T * K * H)


def test_memory_is_that_of_a_chunk():
    """Whole K and V of 4 ranks are 8 of a rank's keys; in 8 chunks they are one, and a rank's queries are the largest."""
    assert pool(4).run(_largest, 4, 1)[0] == 8
    assert pool(4).run(_largest, 4, 8)[0] <= 1


@pytest.mark.parametrize("checkpointing", ["none", "full", "attention"])
@pytest.mark.parametrize("cp", [2, 3])
def test_a_whole_model(cp, checkpointing):
    heads = {"n_heads": 6, "n_kv_heads": 3, "d_model": 48} if cp == 3 else {}
    options = {"token_chunks": 4, "checkpointing": checkpointing, "model": heads, "seq_len": 23, "labels": "uneven"}
    for result in pool(cp).run(parity_case, cp, offload=None if checkpointing == "none" else "host", **options):
        for what in ("gradient", "loss", "logits", "norm", "clipped"):
            assert result[what] <= BOUNDS[torch.float64], (what, result["parameter"])


@pytest.mark.parametrize("order, cp, S, chunks", list(product(ORDERS, [1, 3, 8], [5, 64, 101], [1, 2, 5])))
def test_chunks_hold_every_token_once(order, cp, S, chunks):
    keys = make_segment(S, cp=cp, rank=0, order=order)
    places, arrival = [], tuple(reversed(range(cp)))
    for span in token_spans(keys.local_len, min(chunks, keys.local_len)):
        assert span.stop > span.start
        for at, end, start, stop in chunk_runs(keys, arrival, span.start, span.stop):
            assert 0 <= at < end <= cp * (span.stop - span.start)
            assert end - at == stop - start
            places += range(start, stop)
    assert sorted(places) == list(range(S))


def test_auto_cuts_what_head_chunks_cannot():
    def auto(tokens, cp=8, strategy="lss", gathering=True):
        keys = torch.empty(1, tokens, 8, 128, dtype=torch.bfloat16, device="meta")
        return count_token_chunks("auto", strategy, keys, cp, gathering)

    assert auto(1 << 17) == 1  # 1M tokens: 0.5 GiB a head
    assert auto(1 << 20) == 4  # 8M tokens: 4 GiB a head
    assert auto(1 << 20, strategy="ring") == auto(1 << 20, gathering=False) == 1


@pytest.mark.parametrize(
    "options, words",
    [({"token_chunks": 0}, "token_chunks=0"), ({"token_chunks": 9}, "a segment has 8 tokens"),
     ({"token_chunks": 2, "strategy": "ulysses"}, "token_chunks=2"),
     ({"token_chunks": 2, "transport": "symmetric"}, "travel by collectives")],
)  # fmt: skip
def test_refusals(options, words):
    for ok, result in pool(2).outcomes(attention_case, 2, S=16, N=4, K=2, **options):
        assert not ok
        assert result[0] == "Refused"
        assert words in result[1]
