"""The library over NCCL on two GPUs: parity, counts, and half precision beside one GPU's own error."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.cases import attention_case
from tests.distributed.model_cases import parity_case
from tests.distributed.pool import pool

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("strategy", ["lss", "ring", "ulysses"])
@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
@pytest.mark.parametrize("seq_len", [256, 253])
def test_attention_in_float64(strategy, order, seq_len):
    options = {"S": seq_len, "N": 8, "K": 2, "H": 64, "strategy": strategy, "order": order}
    for errors, *_ in pool(2, "nccl").run(attention_case, 2, **options):
        assert max(errors) <= 1e-13


@pytest.mark.parametrize("kernel", ["sdpa_cudnn", "sdpa_flash"])
@pytest.mark.parametrize("strategy", ["lss", "ring", "ulysses"])
@pytest.mark.parametrize("order, chunks", [("head_tail", 1), ("contiguous", 1), ("head_tail", 2)])
def test_half_precision_is_no_worse_than_one_gpu(kernel, strategy, order, chunks):
    if strategy != "lss" and chunks > 1:
        pytest.skip("head chunks are LSS's")
    options = {"S": 1024, "N": 8, "K": 2, "H": 128, "dtype": torch.bfloat16, "kernel": kernel}
    ((own, *_),) = pool(1, "nccl").run(attention_case, 1, **options)
    for errors, *_ in pool(2, "nccl").run(attention_case, 2, strategy=strategy, order=order, head_chunks=chunks, **options):
        assert all(found <= 1.25 * one for found, one in zip(errors, own, strict=True)), (errors, own)


def test_two_collectives_a_layer():
    options = {"S": 256, "N": 8, "K": 2, "H": 64, "B": 1, "head_chunks": 1, "regather": False, "dtype": torch.bfloat16}
    elements = 2 * 256 * 2 * 64
    for _, forward, backward, *_ in pool(2, "nccl").run(attention_case, 2, **options):
        assert forward == [("all_gather", "kv", 1, elements * 2)]
        assert backward == [("reduce_scatter", "dkv", 1, elements * 4)]


@pytest.mark.parametrize("cp, dp", [(2, 1), (1, 2)])
@pytest.mark.parametrize("strategy", ["lss", "ring", "ulysses", "tp"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_model_gradients_in_float64(cp, dp, strategy, positions):
    options = {"strategy": strategy, "model": {"positions": positions, "n_kv_heads": 4, "dropout": 0.1},
               "seq_len": 61, "labels": "uneven", "accumulate": 2, "checkpointing": "full"}  # fmt: skip
    for result in pool(2, "nccl").run(parity_case, cp, dp, **options):
        for what in ("gradient", "loss", "logits", "norm", "clipped"):
            assert result[what] <= 1e-12, what
