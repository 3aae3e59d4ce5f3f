"""The library over NCCL on two GPUs: parity, counts, and half precision beside one GPU's own error."""

from __future__ import annotations

import pytest
import torch

import lss
from lss.bench.oracle import NAMES
from lss.bench.plan import own_bound
from lss.config.support import pairs, why_refused
from lss.kernels import flash4
from tests.distributed.cases import attention_case, counted_case, make_qkv
from tests.distributed.model_cases import parity_case
from tests.distributed.pool import mesh, pool
from tests.distributed.test_parity import FEATURES, SEQ2SEQ
from tests.distributed.test_support import CUDA, ON, both_on
from tests.distributed.test_symmetric import late_case

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("strategy", ["lss", "lss_2d", "ring", "ulysses"])
@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
@pytest.mark.parametrize("seq_len, regather", [(256, True), (253, True), (253, "auto")])
def test_attention_in_float64(strategy, order, seq_len, regather):
    options = {"S": seq_len, "N": 8, "K": 2, "H": 64, "strategy": strategy, "order": order, "regather": regather}
    for errors, *_ in pool(2, "nccl").run(attention_case, 2, **options):
        assert max(errors) <= 1e-13


KERNELS = ["sdpa_cudnn", "sdpa_flash", *(["flash4"] if flash4.installed() else [])]
WAYS = [("head_tail", 1), ("contiguous", 1), ("head_tail", 2)]
TRANSPORTS = [("symmetric", "auto"), ("symmetric", "float32"), ("collective", "auto"), ("collective", "inputs")]


def hold_to(own, errors, dtype):
    """No worse than one GPU, tensor by tensor."""
    bounds = [own_bound(name, error, dtype) for name, error in zip(NAMES, own, strict=True)]
    assert all(found <= bound for found, bound in zip(errors, bounds, strict=True)), (errors, own)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "strategy, order, chunks, transport, dkv",
    [("lss", *way, *transport) for way in WAYS for transport in TRANSPORTS]
    + [(rival, *way, "auto", "auto") for rival in ("ring", "ulysses") for way in WAYS[:2]],
)
def test_half_precision_is_no_worse_than_one_gpu(kernel, dtype, strategy, order, chunks, transport, dkv):
    options = {"S": 1024, "N": 8, "K": 2, "H": 128, "dtype": dtype, "kernel": kernel}
    ((own, *_),) = pool(1, "nccl").run(attention_case, 1, **options)
    options |= {"strategy": strategy, "order": order, "head_chunks": chunks, "transport": transport, "dkv_dtype": dkv}
    options["regather"] = order == "head_tail" or "auto"  # which keeps so few keys
    for errors, *_ in pool(2, "nccl").run(attention_case, 2, **options):
        hold_to(own, errors, dtype)


@pytest.mark.skipif(flash4.installed() is None, reason="flash-attn-4 is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("S, N, K, chunks", [(1024, 8, 2, 1), (2000, 8, 2, 2), (4096, 4, 4, 1), (520, 6, 3, 1)])
def test_two_prefixes_in_one_call_are_no_worse_than_one_gpu(dtype, S, N, K, chunks):
    """One row: both calls of the first rank are one."""
    options = {"S": S, "N": N, "K": K, "H": 128, "B": 1, "dtype": dtype, "kernel": "flash4"}
    ((own, *_),) = pool(1, "nccl").run(attention_case, 1, **options)
    for errors, *_ in pool(2, "nccl").run(attention_case, 2, head_chunks=chunks, transport="symmetric", **options):
        hold_to(own, errors, dtype)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
@pytest.mark.parametrize("seed", range(2))
def test_symmetric_memory_is_exact_when_ranks_and_streams_are_late(chunks, order, seed):
    how = {"order": order, "head_chunks": chunks, "regather": seed == 0}
    for worst in pool(2, "nccl").run(late_case, 2, seed, 6, **how):
        assert worst <= 1e-13


def same_bits_case(cp, kernel, S, order):
    """Whole output and gradients of one causal attention with deterministic algorithms, on the CPU."""
    the_mesh = mesh(cp)
    q, k, v, dout = (x.cuda() for x in make_qkv(1, S, 8, 2, 128, torch.bfloat16, seed=3))
    seg = lss.make_segment(S, the_mesh, order)
    leaves = [lss.shard(x, the_mesh, seg=seg).requires_grad_() for x in (q, k, v)]
    torch.use_deterministic_algorithms(True)
    try:
        out = lss.attention(*leaves, mesh=the_mesh, seg=seg, kernel=kernel)
        grads = torch.autograd.grad(out, leaves, lss.shard(dout, the_mesh, seg=seg))
    finally:
        torch.use_deterministic_algorithms(False)
    return [lss.unshard(x.detach(), the_mesh, seg=seg).float().cpu() for x in (out, *grads)]


@pytest.mark.skipif(flash4.installed() is None, reason="flash-attn-4 is not installed")
@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
def test_outputs_are_the_same_bits_on_one_and_two_gpus(order):
    """One pass over the keys for each query, in one order: not so where cuDNN merges past and diagonal, nor where torch's
    flash operator splits the keys of short calls over multiprocessors."""
    kernel = "flash4"
    (one,) = pool(1, "nccl").run(same_bits_case, 1, kernel, 4096, order)
    first, second = (pool(2, "nccl").run(same_bits_case, 2, kernel, 4096, order)[0] for _ in range(2))
    assert torch.equal(one[0], first[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"


def test_two_collectives_a_layer():
    options = {"S": 256, "N": 8, "K": 2, "H": 64, "B": 1, "head_chunks": 1, "regather": False, "dtype": torch.bfloat16}
    elements = 2 * 256 * 2 * 64
    for _, forward, backward, *_ in pool(2, "nccl").run(attention_case, 2, transport="collective", **options):
        assert forward == [("all_gather", "kv", 1, elements * 2)]
        assert backward == [("reduce_scatter", "dkv", 1, elements * 4)]


@pytest.mark.parametrize("tokens, again", [(2048, False), (2052, True)])
def test_keys_of_128_mib_are_kept_and_of_more_are_gathered_again(tokens, again):
    options = {"S": tokens, "N": 16, "K": 16, "H": 256, "head_chunks": 1, "transport": "collective"}
    for forward, backward, *_ in pool(2, "nccl").run(counted_case, 2, **options):
        assert ("all_gather", "kv", None) in forward
        assert (("all_gather", "kv", None) in backward) == again


@pytest.mark.parametrize("cp, dp", [(2, 1), (1, 2)])
@pytest.mark.parametrize("strategy", ["lss", "lss_2d", "ring", "ulysses", "tp"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_model_gradients_in_float64(cp, dp, strategy, positions):
    options = {"strategy": strategy, "model": {"positions": positions, "n_kv_heads": 4, "dropout": 0.1},
               "seq_len": 61, "labels": "uneven", "accumulate": 2, "checkpointing": "full"}  # fmt: skip
    for result in pool(2, "nccl").run(parity_case, cp, dp, **options):
        for what in ("gradient", "loss", "logits", "norm", "clipped"):
            assert result[what] <= 1e-12, what


@pytest.mark.parametrize("strategy", ["lss", "lss_2d", "ring", "ulysses"])
@pytest.mark.parametrize("transport", ["collective", "symmetric"])
def test_gradients_with_attention_kept_and_tiles_in_float64(strategy, transport):
    options = {"strategy": strategy, "model": {"n_kv_heads": 4, "dropout": 0.1}, "seq_len": 61, "labels": "uneven",
               "checkpointing": "attention", "tiles": 7, "transport": transport}  # fmt: skip
    for result in pool(2, "nccl").run(parity_case, 2, 1, **options):
        for what in ("gradient", "loss", "logits", "norm", "clipped"):
            assert result[what] <= 1e-12, what


@pytest.mark.parametrize("a, b", [pair for pair in pairs() if "tp" not in pair and "sdpa_cpu" not in pair])
def test_every_pair_of_features_is_exact_or_refused(a, b):
    """The support table on GPUs: float64 by plain torch, and the fused kernels in the precision that they have."""
    if "flash4" in (a, b) and flash4.installed() is None:
        pytest.skip("flash-attn-4 is not installed")
    options = {"S": 206, "N": 4, "K": 2, "H": 64, "B": 1} | both_on(a, b)
    fused = {a, b} & CUDA
    if fused:
        options["dtype"] = torch.bfloat16
    for ok, result in pool(2, "nccl").outcomes(attention_case, 2, **_lengthened(options)):
        if why_refused(a, b) is not None:
            assert not ok, "neither exact nor refused"
            assert result[0] == "Refused", result[2]
            assert ON[a][1] in result[1]
            assert ON[b][1] in result[1]
            continue
        assert ok, result[2]
        # half precision: what the operators' own rounding of P and dS leaves, as in test_cuda_kernels
        assert max(result[0]) <= (1e-2 if fused else 1e-12), result[0]


def _lengthened(options):
    """Documents, padding and keys for 206 tokens instead of 26."""
    longer = {"cu_seqlens": [0, 30, 31, 140, 206], "keep": [[(9, 190)]]}
    options = options | {name: longer[name] for name in longer if name in options}
    if "kv" in options:
        k_edges = [0, 1, 60, 80, 150] if options["kv"][3] else None
        options["kv"] = (150, *options["kv"][1:3], k_edges)
        if "keep" in options:
            options["keep"] = [[(9, 133)]]
    return options


@pytest.mark.parametrize("name", [*FEATURES, *SEQ2SEQ])
@pytest.mark.parametrize("cp, dp", [(2, 1), (1, 2)])
def test_every_feature_of_a_model_in_float64(name, cp, dp):
    options = (FEATURES | SEQ2SEQ)[name]
    rows = dp if "cu_seqlens" in options.get("given", {}) else 4
    shared = {"seq_len": 23, "labels": "uneven", "rows": rows} | options
    for result in pool(2, "nccl").run(parity_case, cp, dp, **shared):
        for what in ("gradient", "loss", "logits", "norm", "clipped"):
            assert result[what] <= 1e-12, what


@pytest.mark.parametrize("order", ["head_tail", "contiguous", "balanced"])
@pytest.mark.parametrize("window", [None, 1, 100, 1000])
def test_documents_and_windows_in_half_precision_are_no_worse_than_one_gpu(order, window):
    edges = [0, 1, 300, 301, 1700, 2048]
    options = {"S": 2048, "N": 8, "K": 2, "H": 128, "B": 1, "dtype": torch.bfloat16, "window": window, "cu_seqlens": edges}
    ((own, *_),) = pool(1, "nccl").run(attention_case, 1, order=order, **options)
    for errors, *_ in pool(2, "nccl").run(attention_case, 2, order=order, **options):
        hold_to(own, errors, torch.bfloat16)
