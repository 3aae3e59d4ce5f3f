"""FlexAttention, compiled, against the reference kernel in float64: every rule, rectangles, parts, and beside `tiled`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lss.kernels import KERNELS, Scores, flash4, pick_kernel
from lss.kernels.merge import merge
from tests.kernels.test_flex import by_everything, of_documents
from tests.kernels.test_kernels import inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# float32, and half precision as in test_cuda_kernels: P and dS rounded once more than in the reference; with dO' = w dO
# rounded where a call has only a part of the keys
BOUNDS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SLOPES = torch.tensor([2.0 ** -(h % 8 + 1) for h in range(8)])
RULES = {
    "none": None,
    "mask_mod": Scores(mask_mod=by_everything, first_row=3, first_head=8),
    "documents": Scores(mask_mod=of_documents(torch.arange(4096) // 111)),
    "softcap": Scores(softcap=2.0),
    "alibi": Scores(slopes=SLOPES),
    "all": Scores(softcap=2.0, slopes=SLOPES, mask_mod=by_everything, first_head=4),
}
HOW = [{"causal": True}, {"causal": False}, {"causal": False, "window": (70, 0)}, {"causal": False, "window": (150, 40)}]


def on_cuda(scores):
    """The same rules with their tensors, a mask_mod's included, where the queries are."""
    if scores is None:
        return None
    numbers = of_documents((torch.arange(4096) // 111).cuda())
    mod = numbers if scores.mask_mod is RULES["documents"].mask_mod else scores.mask_mod
    return replace(scores, slopes=None if scores.slopes is None else scores.slopes.cuda(), mask_mod=mod)


def both(q, k, v, dout, scores, how, edges=None):
    """(out, lse, dq, dk, dv) of flex, by parts of the keys where edges are given, and of the reference in float64."""
    doubles = [x.double() for x in (q, k, v, dout)]
    how = how | {"scale": q.shape[-1] ** -0.5}
    places = (k.shape[1] - q.shape[1] + 7, 7)
    whole = how | {"scores": on_cuda(scores), "places": places}
    out, lse = KERNELS["reference"].forward(*doubles[:3], **whole)
    true = (out, lse, *KERNELS["reference"].backward(doubles[3], *doubles[:3], out, lse, **whole))
    flex, grads = KERNELS["flex"], []
    if edges is None:
        out, lse = flex.forward(q, k, v, **whole)
        return (out, lse, *flex.backward(dout, q, k, v, out, lse, **whole)), true
    parts = [(slice(a, b), whole | {"places": (places[0], 7 + a)}) for a, b in pairwise(edges)]
    out, lse = torch.zeros_like(q), torch.full_like(lse, float("-inf"), dtype=torch.float32)
    for at, rules in parts:
        out, lse = merge(out, lse, *flex.forward(q, k[:, at], v[:, at], **rules))
    for at, rules in parts:
        grads.append(flex.backward(dout, q, k[:, at], v[:, at], out.to(q.dtype), lse, **rules))
    dq = sum(g[0].float() for g in grads)
    return (out, lse, dq, *(torch.cat([g[n] for g in grads], dim=1) for n in (1, 2))), true


def hold(found, true, bound):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, true, strict=True):
        seen = b != float("-inf")
        assert torch.equal(seen, a != float("-inf")), name
        error = float((a.double() - b)[seen].norm() / b[seen].norm().clamp(min=1e-30))
        assert error <= bound, (name, error)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("Tq, Tk", [(256, 256), (200, 333), (511, 1024)])
@pytest.mark.parametrize("H, N, K, dtype", [(64, 8, 2, torch.bfloat16), (128, 8, 8, torch.bfloat16),
                                            (64, 8, 1, torch.float16), (64, 8, 2, torch.float32)])  # fmt: skip
def test_every_rule_is_as_near_as_its_dtype_allows(rules, how, Tq, Tk, H, N, K, dtype):
    q, k, v, dout = (x.cuda() for x in inputs(Tq, Tk, N=N, K=K, H=H, dtype=dtype))
    hold(*both(q, k, v, dout, RULES[rules], how), BOUNDS[dtype])


@pytest.mark.parametrize("H, dtype", [(16, torch.bfloat16), (80, torch.bfloat16), (256, torch.bfloat16),
                                      (128, torch.float32), (256, torch.float32)])  # fmt: skip
def test_other_head_sizes(H, dtype):
    q, k, v, dout = (x.cuda() for x in inputs(200, 333, N=8, K=2, H=H, dtype=dtype))
    hold(*both(q, k, v, dout, RULES["all"], {"causal": True}), BOUNDS[dtype])


@pytest.mark.parametrize("N, K", [(6, 2), (5, 1), (3, 3)])
def test_numbers_of_heads_that_are_no_powers_of_two(N, K):
    q, k, v, dout = (x.cuda() for x in inputs(200, 333, N=N, K=K, H=64, dtype=torch.bfloat16))
    hold(*both(q, k, v, dout, RULES["mask_mod"], {"causal": True}), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("Tq, Tk", [(1, 1), (1, 64), (1, 300), (5, 9), (127, 129)])
def test_few_queries(Tq, Tk):
    q, k, v, dout = (x.cuda() for x in inputs(Tq, Tk, N=8, K=2, H=64, dtype=torch.float32))
    found, true = both(q, k, v, dout, RULES["softcap"], {"causal": True})
    for a, b in zip(found, true, strict=True):
        assert (a.double() - b).norm() <= 5e-6 * max(float(b.norm()), float(dout.double().norm()))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_the_keys_merge_and_take_the_global_lse(rules, dtype):
    q, k, v, dout = (x.cuda() for x in inputs(256, 512, N=8, K=2, H=64, dtype=dtype))
    hold(*both(q, k, v, dout, RULES[rules], {"causal": False}, (0, 200, 511, 512)), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_see_nothing_give_and_receive_nothing(dtype):
    q, k, v, dout = (x.cuda() for x in inputs(300, 300, N=8, K=2, H=64, dtype=dtype))
    scores = Scores(mask_mod=lambda b, h, i, j: ((i - 7) // 8 % 2 == 0) & ((i - 7) < 150))
    found, true = both(q, k, v, dout, scores, {"causal": True})
    hold(found, true, BOUNDS[dtype])
    rows = torch.arange(300, device="cuda")
    blind = (rows // 8 % 2 == 1) | (rows >= 150)
    for x in (found[0], found[2]):
        assert not x[:, blind].any()
    assert all(bool(x.isfinite().all()) for x in found[2:])
    fewer = both(q, k[:, :200], v[:, :200], dout, RULES["softcap"], {"causal": True})  # the first 100 see nothing
    hold(*fewer, BOUNDS[dtype])


def test_strided_queries_and_keys_as_segments_hand_them_over():
    wide = [x.cuda() for x in inputs(700, 700, N=16, K=4, H=64, dtype=torch.bfloat16)]
    q, dout = (x[:, 100:411, 4:12] for x in (wide[0], wide[3]))
    k, v = (x[:, 50:650, 1:3] for x in wide[1:3])
    hold(*both(q, k, v, dout, RULES["all"], {"causal": True}), BOUNDS[torch.bfloat16])


def test_lengths_and_places_compile_nothing_more():
    """Packed documents and other segments have other lengths and places; what was compiled serves them all."""
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]

    def call(Tq, Tk, place):
        q, k, v, dout = (x.cuda() for x in inputs(Tq, Tk, N=4, K=2, H=64, B=1, dtype=torch.bfloat16))
        how = {"causal": True, "scale": 0.125, "scores": RULES["softcap"], "places": (place, 0)}
        out, lse = KERNELS["flex"].forward(q, k, v, **how)
        KERNELS["flex"].backward(dout, q, k, v, out, lse, **how)

    for Tq, Tk in [(256, 256), (300, 700), (130, 513), (700, 700), (64, 100), (60, 60), (500, 129), (129, 500)]:
        call(Tq, Tk, Tk - Tq)
    before = counted["unique_graphs"]
    for Tq, Tk in [(257, 400), (350, 350), (133, 999), (70, 101), (31, 77), (1000, 1001), (90, 90), (640, 1280)]:
        call(Tq, Tk, Tk - Tq + 5)
    print(f"{before} graphs for 8 shapes, {counted['unique_graphs'] - before} more for 8 others")
    assert counted["unique_graphs"] == before
    assert before <= 24


SOFTCAPPED = "flash4" if flash4.installed() else "flex"


@pytest.mark.parametrize(
    "features, dtype, expected",
    [({"mask_mod"}, torch.bfloat16, "flex"), ({"softcap"}, torch.float16, SOFTCAPPED),
     ({"alibi_slopes"}, torch.float32, "flex"), ({"softcap"}, torch.float64, "tiled"),
     ({"dropout_p"}, torch.bfloat16, "tiled")],
)  # fmt: skip
def test_auto_takes_flex_for_what_the_fused_kernels_lack(features, dtype, expected):
    assert pick_kernel("auto", torch.empty(1, 1, 1, 64, dtype=dtype, device="cuda"), features).name == expected


@pytest.mark.parametrize("rules", RULES)
def test_it_is_faster_than_tiles(rules):
    """Forward and backward of 8,192 tokens, 8/2 heads of 128, causal: printed, with `-s`."""
    q, k, v, dout = (x.cuda() for x in inputs(8192, 8192, B=1, N=8, K=2, H=128, dtype=torch.bfloat16))
    scores = RULES[rules]
    if rules == "documents":
        scores = Scores(mask_mod=of_documents((torch.arange(8192) // 1111).cuda()))
    scores = on_cuda(scores) if rules != "documents" else scores
    times = {}
    for name in ("flex", "tiled"):
        kernel, how = KERNELS[name], {"causal": True, "scale": 0.1, "scores": scores, "places": (0, 0)}

        def run(kernel=kernel, how=how):
            out, lse = kernel.forward(q, k, v, **how)
            kernel.backward(dout, q, k, v, out, lse, **how)

        run()
        run()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            run()
        stop.record()
        stop.synchronize()
        times[name] = start.elapsed_time(stop) / 5
    print(f"{rules}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()))
    assert times["flex"] < times["tiled"]
