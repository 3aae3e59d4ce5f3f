"""Every adapter of a rival loads and explains itself without the rival; those that run on a CPU equal softmax."""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import pool

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "rivals"
ADAPTERS = sorted(path.stem for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
PACKAGES = {"deepspeed", "megatron", "ringmaster", "transformers", "yunchang"}
ORDERS = {"contiguous", "head_tail", "striped"}
SHAPE = {
    "vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_mlp": 48, "seq_len": 40,
    "tie_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip


@cache
def adapter(name: str):
    """The module at this path, as the bench loads it."""
    spec = importlib.util.spec_from_file_location(f"lss_rival_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_loads_without_its_rival_and_says_why_it_cannot_run(name):
    before = set(sys.modules)
    module = adapter(name)
    assert not PACKAGES & {loaded.partition(".")[0] for loaded in set(sys.modules) - before}
    assert isinstance(module.NAME, str)
    assert callable(getattr(module, "attention", None)) or callable(getattr(module, "train", None))
    version, reason = module.version(), module.why_not()
    assert version is None or isinstance(version, str)
    if version is None:
        assert "not installed" in reason
    if reason is not None:
        assert reason.endswith(".")
        assert len(reason.split()) > 4
        assert "\n" not in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
@pytest.mark.parametrize("name", ["torch_context_parallel", "hf_context_parallel", "megatron_sequence_parallel"])
def test_rivals_that_need_a_gpu_say_so(name):
    module = adapter(name)
    assert module.why_not() is not None
    if module.version() is not None:
        assert "CUDA" in module.why_not()


def test_alst_pieces_train_as_plain_checkpointing_does():
    """Tiles, offload and masters on the host change no loss; after three updates neither."""
    tiled, plain = adapter("deepspeed_alst"), adapter("hf_checkpointing")
    if (reason := tiled.why_not() or plain.why_not()) is not None:
        pytest.skip(reason)
    shape = {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_mlp": 64, "seq_len": 100,
             "tie_embeddings": True, "rope_theta": 1e4}  # fmt: skip
    tiled.LOGITS_BYTES = 97 * 4 * 30
    (_, a), (_, b) = (module.train(shape, None, 0, 1, "cpu")[0] for module in (tiled, plain))
    for _ in range(4):
        assert a() == pytest.approx(b(), rel=1e-4)
    assert tiled.train(shape, None, 0, 2, "cpu") == []


def test_the_folder_has_the_rivals_that_the_readme_lists():
    text = (FOLDER / "README.md").read_text()
    assert len(ADAPTERS) == 8
    for name in ADAPTERS:
        assert f"`{name}.py`" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's entries")
@pytest.mark.parametrize("name", [name for name in ADAPTERS if hasattr(adapter(name), "attention")])
def test_attention_equals_softmax_on_two_ranks(name):
    if (reason := adapter(name).why_not()) is not None:
        pytest.skip(reason)
    for results in pool(2).run(parity, name):
        assert results
        for variant, errors in results.items():
            assert max(errors) < 6e-3, (variant, errors)  # bfloat16, the dtype that the rings are written for


def parity(name: str) -> dict[str, list[float]]:
    """One rank's relative errors of out, dq, dk, dv for each entry of an adapter, against float64 on the whole."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 64, heads, 16, generator=generator).bfloat16() for heads in (8, 4, 4, 8))
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    expected = causal(*whole)
    expected = [expected, *torch.autograd.grad(expected, whole, dout.double())]
    found = {}
    for variant, order, f in adapter(name).attention(dist.group.WORLD, rank, world):
        assert order in ORDERS
        mine = places(order, 64, world, rank)
        local = [x[:, mine].clone().requires_grad_() for x in (q, k, v)]
        out = f(*local)
        assert out.shape == local[0].shape
        results = [out, *torch.autograd.grad(out, local, dout[:, mine])]
        found[variant] = [relative(ours, whole[:, mine]) for ours, whole in zip(results, expected, strict=True)]
    return found


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention written out, (B, S, N, H)."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(q.shape[3])
    future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bnqk,bknh->bqnh", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def places(order: str, S: int, world: int, rank: int) -> torch.Tensor:
    """The positions of a rank's tokens."""
    if order == "striped":
        return torch.arange(rank, S, world)
    if order == "contiguous":
        return torch.arange(S).chunk(world)[rank]
    chunks = torch.arange(S).chunk(2 * world)
    return torch.cat((chunks[rank], chunks[2 * world - 1 - rank]))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def test_a_step_of_transformers_runs_on_one_process():
    module = adapter("hf_context_parallel")
    if module.version() is None:
        pytest.skip(module.why_not())
    losses = {}
    for variant, step in module.train(SHAPE, None, 0, 1, "cpu"):
        losses[variant] = [step() for _ in range(2)]
        step.close()
    assert len(losses) == 2
    for values in losses.values():
        assert values == pytest.approx([math.log(64)] * 2, abs=0.3)
