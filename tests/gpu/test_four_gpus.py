"""Groups inside groups over NCCL, four GPUs standing for two nodes of two."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.cases import attention_case, counted_case, delayed_case
from tests.distributed.model_cases import parity_case
from tests.distributed.pool import pool

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices"),
]
HOW = [{"strategy": "lss"}, {"strategy": "lss_2d", "inner": 2}, {"strategy": "lss_2d", "inner": 4}]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
@pytest.mark.parametrize("seq_len", [256, 253])
def test_attention_in_float64(how, order, seq_len):
    options = {"S": seq_len, "N": 8, "K": 4, "H": 64, "order": order, "per_node": 2, "head_chunks": 2} | how
    for errors, *_ in pool(4, "nccl").run(attention_case, 4, **options):
        assert max(errors) <= 1e-13


@pytest.mark.parametrize("seed", range(3))
def test_the_second_stage_waits_for_the_first_on_the_device(seed):
    """Long enough that the stages of several chunks, attention and late ranks overlap."""
    options = {"S": 16384, "N": 8, "K": 8, "H": 128, "B": 1, "dtype": torch.bfloat16, "per_node": 2, "head_chunks": 8}
    one = pool(4, "nccl").run(delayed_case, 4, "lss", seed, **(options | {"per_node": 4}))
    two = pool(4, "nccl").run(delayed_case, 4, "lss", seed, **options)
    for (flat, *_), (staged, *_) in zip(one, two, strict=True):
        assert all(b <= 1.05 * a for a, b in zip(flat, staged, strict=True)), (flat, staged)


def test_each_byte_enters_a_node_once():
    whole = 2 * 256 * 2 * 64 * 8
    options = {"S": 256, "N": 8, "K": 2, "H": 64, "per_node": 2, "regather": False}
    for forward, backward, *_ in pool(4, "nccl").run(counted_case, 4, **options):
        assert forward == {("all_gather", "kv", "across"): (1, whole // 2), ("all_gather", "kv", "inside"): (1, whole)}
        assert backward.keys() == {("reduce_scatter", "dkv", "inside"), ("reduce_scatter", "dkv", "across")}


@pytest.mark.parametrize("how", HOW)
def test_model_gradients_in_float64(how):
    options = {"model": {"n_kv_heads": 4, "attention_dropout": 0.1}, "seq_len": 61, "labels": "uneven", "accumulate": 2,
               "checkpointing": "full", "per_node": 2} | how  # fmt: skip
    for result in pool(4, "nccl").run(parity_case, 4, **options):
        for what in ("gradient", "loss", "logits", "norm", "clipped"):
            assert result[what] <= 1e-12, what
