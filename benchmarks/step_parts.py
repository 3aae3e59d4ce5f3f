"""What stands beside attention in a training step: eager, by torch.compile and by Liger, forward and backward.

    python benchmarks/step_parts.py --out step_parts.jsonl

One GPU, one rank's tokens, bfloat16 matrix products with float32 weights, random inputs; medians over repetitions. Liger
(PyPI `liger-kernel`) is left out where it is not installed. `tiled loss` is the library's; plain logits of 65,536 tokens
would be 33 GB in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain

import torch
from torch.nn import functional as F

from lss.config.presets import PRESETS
from lss.config.sections import ModelConfig
from lss.model.layers import MLP, Block, after_attention, make_norm, queries_keys_values, rope, rotate
from lss.parallel.activation import make_pieces
from lss.tiled import HIDDEN_BYTES, linear_cross_entropy_sum, recomputed, softmax_tile, tile_size

REPEAT = 5
MODELS = ("llama-3.2-1b", "llama-3.1-8b")
Parts = Iterator[tuple[str, str, Callable[[], torch.Tensor | tuple[torch.Tensor, ...]], int]]


def ms_of(step: Callable[[], None]) -> tuple[float, float]:
    """Median time and spread of a step, in milliseconds, after two warm-ups."""
    times = []
    for number in range(REPEAT + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(start.elapsed_time(end))
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def half(*shape: int) -> torch.Tensor:
    """Random activations."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


@cache
def compiled(function: Callable) -> Callable:
    """The function under torch.compile."""
    return torch.compile(function, dynamic=False)


def single_parts(config: ModelConfig, tokens: int, liger: bool) -> Parts:
    """RMSNorm, rotary positions and MLP: (part, by what, forward pass, FLOPs of its matrix products in both passes)."""
    D, heads, H = config.d_model, config.n_heads, config.d_model // config.n_heads
    x, norm = torch.randn(1, tokens, D, device="cuda", requires_grad=True), make_norm(config).cuda()
    yield "rmsnorm", "eager", lambda: norm(x), 0
    yield "rmsnorm", "compile", lambda: compiled(norm.forward)(x), 0
    if liger:
        from liger_kernel.ops import rms_norm

        yield "rmsnorm", "liger", lambda: rms_norm.LigerRMSNormFunction.apply(x, norm.weight, 1e-5, 0.0, "llama", False), 0

    cos, sin = rope(torch.arange(tokens, device="cuda"), config, torch.float32)
    q, k = half(1, tokens, heads, H), half(1, tokens, config.n_kv_heads, H)

    def rotated(q, k):
        return rotate(q, cos, sin), rotate(k, cos, sin)

    yield "rope", "eager", lambda: rotated(q, k), 0
    yield "rope", "compile", lambda: compiled(rotated)(q, k), 0
    if liger:
        from liger_kernel.ops import rope as liger_rope

        both = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
        rotating = liger_rope.LigerRopeFunction.apply
        yield "rope", "liger", lambda: rotating(q.transpose(1, 2), k.transpose(1, 2), *both), 0

    mlp, h = MLP(config).cuda(), half(1, tokens // 4, D)
    flops = 6 * 3 * D * config.d_mlp * (tokens // 4)
    yield "mlp of a quarter", "eager", lambda: mlp(h), flops
    yield "mlp of a quarter", "compile", lambda: compiled(mlp.forward)(h), flops
    if liger:
        from liger_kernel.ops import swiglu

        silu = swiglu.LigerSiLUMulFunction.apply
        yield "mlp of a quarter", "liger", lambda: mlp.down_proj(silu(mlp.gate_proj(h), mlp.up_proj(h))), flops


def pieces_of_a_block(config: ModelConfig, tokens: int, liger: bool) -> Parts:
    """What stands before and after attention, as `checkpointing="attention"` runs it."""
    D, heads, H = config.d_model, config.n_heads, config.d_model // config.n_heads
    x, a = torch.randn(1, tokens, D, device="cuda", requires_grad=True), half(1, tokens, heads, H)
    block = Block(config, 0).cuda()
    rotation = rope(torch.arange(tokens, device="cuda"), config, torch.float32)
    modules = block.attention.o_proj, block.mlp_norm, block.mlp
    size = tile_size("auto", tokens, config.d_mlp * 2, HIDDEN_BYTES)
    weights = [p for module in modules for p in module.parameters()]
    flops = 8 * (D * D + 3 * D * config.d_mlp) * tokens  # forward, forward again, backward
    projections = 8 * D * (D + 2 * config.n_kv_heads * H) * tokens
    for by, compiling in (("eager", False), ("compile", True)):
        pieces = make_pieces("attention", tiles="auto", width=config.d_mlp, compiling=compiling)
        project = pieces.compiled(queries_keys_values)
        before = partial(project, block.attention_norm, block.attention, None, rotation, rotation)
        finish = pieces.compiled(after_attention)

        def after(x, a, tokens, finish=finish):
            return finish(x, a, modules, None, None, None)

        again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        yield "before attention, recomputed", by, partial(again, before, x), projections
        yield "after attention, recomputed by tiles", by, partial(recomputed, after, (x, a), weights, size), flops


def losses(config: ModelConfig, tokens: int, liger: bool) -> Parts:
    """Logits and cross-entropy."""
    D, V = config.d_model, config.vocab_size
    flat, labels = half(tokens, D), torch.randint(V, (tokens,), device="cuda")
    head = torch.nn.Parameter(torch.randn(V, D, device="cuda") * 0.02)
    flops = 6 * V * D * tokens
    for by, softmax in (("eager", softmax_tile), ("compile", compiled(softmax_tile))):
        yield "tiled loss", by, partial(linear_cross_entropy_sum, flat, head, labels, softmax=softmax), flops
    if liger:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

        def fused():
            return Fused.apply(flat, head.to(torch.bfloat16), labels, None, None, -100, 0.0, 0.0, "sum", None, False,
                               torch.float32)[0]  # fmt: skip

        yield "tiled loss", "liger", fused, flops


def measure(model: str, tokens: int, liger: bool, write: Callable[[dict], None]) -> None:
    """Every part of a model, a row each."""
    config = ModelConfig(**(PRESETS[model] | {"n_layers": 1}))
    groups = (single_parts, pieces_of_a_block, losses)
    for part, by, forward, flops in chain.from_iterable(group(config, tokens, liger) for group in groups):

        def step(forward=forward) -> None:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                out = forward()
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(outs, [torch.ones_like(y) for y in outs])

        row = {"bench": "step parts", "part": part, "by": by, "model": model, "tokens": tokens, "dtype": "bfloat16",
               "world_size": 1, "gpu": torch.cuda.get_device_name()}  # fmt: skip
        try:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            ms, spread = ms_of(step)
            row |= {"ms": round(ms, 3), "spread": round(spread, 3), "status": "ok",
                    "tflops": round(flops / ms / 1e9, 1) if flops else None,
                    "peak_bytes": torch.cuda.max_memory_allocated() - held}  # fmt: skip
        except torch.cuda.OutOfMemoryError:
            row |= {"ms": None, "status": "oom"}
        except Exception as error:  # another library's failure is a row, not the end of the table
            row |= {"ms": None, "status": f"failed: {type(error).__name__}: {str(error)[:200]}"}
        write(row)
        torch.cuda.empty_cache()


def check() -> None:
    """The loss's gradients on this GPU against all logits, before anything is timed."""
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, labels = torch.randn(1000, 256, device="cuda", requires_grad=True), torch.randint(1000, (512,), device="cuda")
    exact = F.cross_entropy(x.double() @ weight.double().T, labels, reduction="sum")
    expected = torch.autograd.grad(exact, (x, weight))
    for tiles in (100, 512):
        with torch.autocast("cuda", torch.bfloat16):
            found = torch.autograd.grad(linear_cross_entropy_sum(x, weight, labels, tiles=tiles), (x, weight))
        for a, b in zip(found, expected, strict=True):
            assert float((a.double() - b.double()).norm() / b.double().norm()) < 2e-2


def versions() -> dict[str, str | None]:
    """What was measured."""
    try:
        liger = version("liger-kernel")
    except PackageNotFoundError:
        liger = None
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0], "liger-kernel": liger}


def main() -> None:
    """Measure every part of every model and write one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="step_parts.jsonl")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--model", default=",".join(MODELS))
    parser.add_argument("--commit", default="", help="of the library, to stand in every row")
    options = parser.parse_args()
    check()
    found = versions()
    with open(options.out, "w") as file:

        def write(row: dict) -> None:
            row |= {"commit": options.commit, "versions": found,
                    "command": f"python benchmarks/step_parts.py --tokens {options.tokens}"}  # fmt: skip
            print("{model:13} {part:37} {by:8} {ms} ms {status}".format(**row), row.get("tflops"), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()

        for model in options.model.split(","):
            measure(model, options.tokens, found["liger-kernel"] is not None, write)


if __name__ == "__main__":
    main()
