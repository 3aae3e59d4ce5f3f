"""FlexAttention on the CPU, where it has a forward only: rules, blocks and their cache; and the algebra of its backward."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lss.config.support import FEATURES
from lss.kernels import KERNEL_CHOICES, KERNELS, Scores, flex, reference
from lss.kernels.flex_mask import BLOCK, block_mask
from lss.kernels.merge import merge
from tests.kernels.test_kernels import inputs

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0])


def by_everything(b, h, i, j):
    """A mask_mod that looks at all its arguments."""
    return (i + 2 * j + 3 * h + 5 * b) % 7 < 4


RULES = {
    "none": None,
    "softcap": Scores(softcap=2.0),
    "slopes": Scores(slopes=SLOPES),
    "mask_mod": Scores(mask_mod=by_everything, first_row=3, first_head=8),
    "all": Scores(softcap=3.0, slopes=SLOPES, mask_mod=by_everything, first_row=1, first_head=4),
}
HOW = [{"causal": True}, {"causal": False}, {"causal": False, "window": (40, 0)}, {"causal": False, "window": (90, 30)}]


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()  # the eager form compiles its wrapper too, for each shape


def test_the_table_of_kernels_is_the_table_of_settings():
    assert tuple(KERNELS) == tuple(name for name, feature in FEATURES.items() if feature.group == "kernel")
    assert ("auto", "sdpa", *KERNELS) == KERNEL_CHOICES


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.bfloat16, 4e-3)])
def test_forward_is_the_reference_kernel(how, rules, dtype, bound):
    for Tq, Tk in ((130, 257), (256, 256)):
        q, k, v, _ = inputs(Tq, Tk, H=16, dtype=dtype)
        how = how | {"scale": 0.3, "scores": RULES[rules], "places": (Tk - Tq + 11, 11)}
        found, true = flex.forward(q, k, v, **how), reference.forward(q, k, v, **how)
        for a, b in zip(found, true, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            seen = b != float("-inf")
            assert torch.equal(seen, a != float("-inf"))
            assert (a.double() - b.double())[seen].norm() <= bound * b[seen].double().norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rows_that_see_nothing_are_zero():
    q, k, v, _ = inputs(200, 200, H=16)
    scores = Scores(mask_mod=lambda b, h, i, j: (i // 8 % 2 == 0) & (j != 5))
    out, lse = flex.forward(q, k, v, causal=True, scale=1.0, scores=scores)
    blind = torch.arange(200) // 8 % 2 == 1
    assert not out[:, blind].any()
    assert torch.isneginf(lse[:, :, blind]).all()
    assert lse[:, :, ~blind].isfinite().all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mask_mod", [None, by_everything, lambda b, h, i, j: (i // 100 == j // 100) & (i < 400)])
@pytest.mark.parametrize("cells", [1 << 25, 1])
def test_blocks_are_those_of_the_whole_matrix(how, mask_mod, cells, monkeypatch):
    """Every block is skipped, partly or wholly computed as its scores say, however many are evaluated at once."""
    monkeypatch.setattr("lss.kernels.flex_mask.CELLS", cells)
    q, k, v, _ = inputs(300, 700, H=16, K=1, N=2)
    scores = None if mask_mod is None else Scores(mask_mod=mask_mod, first_head=1)
    blocks = block_mask(q, k, how["causal"], how.get("window"), scores, (400, 0))
    if blocks is None:
        assert how == {"causal": False}
        assert mask_mod is None
        return
    zero = torch.zeros(2, 2, 300, 700, dtype=torch.bool)
    matrix = reference._matrix(*reference._grouped(q, k, v)[:2], how["causal"], 1.0, how.get("window"), scores, (400, 0))
    zero[:] = matrix.scores.flatten(1, 2) != float("-inf")
    padded = torch.nn.functional.pad(zero, (0, -700 % BLOCK, 0, -300 % BLOCK))
    counts = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).sum((-1, -3))
    rows, heads = blocks.kv_num_blocks.shape[:2]
    for b in range(2):
        for h in range(2):
            for row in range(3):
                at = (min(b, rows - 1), min(h, heads - 1), row)
                partial_, whole = (
                    set(indices[at][: number[at]].tolist())
                    for number, indices in ((blocks.kv_num_blocks, blocks.kv_indices),
                                            (blocks.full_kv_num_blocks, blocks.full_kv_indices))
                )  # fmt: skip
                line = counts[b, h, row]
                assert whole == set((line == BLOCK * BLOCK).nonzero().flatten().tolist())
                assert partial_ == set(((line > 0) & (line < BLOCK * BLOCK)).nonzero().flatten().tolist())


def of_documents(numbers):
    return lambda b, h, i, j: numbers[i] == numbers[j]


def test_blocks_are_kept_while_what_the_mask_reads_is_the_same():
    q, k, _, _ = inputs(300, 300, H=16)
    numbers = torch.arange(300) // 100

    def blocks(mask_mod, **more):
        return block_mask(q, k, True, None, Scores(mask_mod=mask_mod, **more), (0, 0))

    mod = of_documents(numbers)
    first = blocks(mod)
    assert blocks(mod, first_head=4, first_row=2) is first  # it looks at neither
    assert blocks(of_documents(numbers.clone())) is not first
    numbers[150:] = 7  # changed in place: another mask
    changed = blocks(mod)
    assert changed is not first
    assert blocks(mod) is changed
    shift = partial(lambda d, b, h, i, j: i - j < d, 100)
    assert blocks(shift, first_head=4) is blocks(shift)
    assert blocks(by_everything, first_head=4) is not blocks(by_everything)


class Holder:
    """What no key can tell the state of."""

    width = 50


def test_a_mask_of_unknown_state_is_evaluated_each_time():
    q, k, _, _ = inputs(300, 300, H=16)
    holder = Holder()
    scores = Scores(mask_mod=lambda b, h, i, j: i - j < holder.width)
    first = block_mask(q, k, True, None, scores, (0, 0))
    holder.width = 300
    second = block_mask(q, k, True, None, scores, (0, 0))
    assert int(first.kv_num_blocks.sum() + first.full_kv_num_blocks.sum()) == 5
    assert int(second.kv_num_blocks.sum() + second.full_kv_num_blocks.sum()) == 6


def plain_attention(q, k, v, *, causal, scale, scores, places):
    """(out, lse) that autograd differentiates through both: what FlexAttention is on CUDA."""
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    s = q.transpose(1, 2) @ keys.transpose(-1, -2) * scale
    i, j = (place + torch.arange(n) for place, n in zip(places, s.shape[-2:], strict=True))
    if scores is not None and scores.softcap:
        s = scores.softcap * (s / scores.softcap).tanh()
    if scores is not None and scores.slopes is not None:
        s = s - scores.slopes.to(s.dtype)[:, None, None] * (i[:, None] - j).abs()
    seen = torch.ones(s.shape, dtype=torch.bool)
    if scores is not None and scores.mask_mod is not None:
        seen = scores.visible(s.shape[:2], i, j)
    if causal:
        seen = seen & (j - i[:, None] <= j[-1] - i[-1])
    s = s.masked_fill(~seen, -1e300)  # finite, so that a blind row's gradient is 0 and not NaN
    blind = ~seen.any(-1, keepdim=True)
    out = (s.softmax(-1).masked_fill(blind, 0.0) @ values).transpose(1, 2)
    return out, s.logsumexp(-1).masked_fill(blind.squeeze(-1), float("-inf"))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("edges", [(0, 70), (0, 33, 70), (0, 1, 69, 70)])
def test_gradients_from_the_global_out_and_lse(rules, causal, edges):
    """Keys in parts, each given the out and lse of all keys: together the reference's whole gradient."""
    q, k, v, dout = inputs(40, 70)
    how = {"scale": 0.5, "scores": RULES[rules]}
    whole = {**how, "causal": causal, "places": (30, 0)}
    out, lse = reference.forward(q, k, v, **whole)
    true = reference.backward(dout, q, k, v, out, lse, **whole)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    merged = None
    for a, b in pairwise(edges):
        # the part's queries: all, or causal those from its first key on; up to its last key they are a triangle
        runs = [(0, 40, False)] if not causal else [(max(0, a - 30), max(0, b - 30), True), (max(0, b - 30), 40, False)]
        for c, d, triangle in runs:
            if c == d:
                continue
            part = {**how, "causal": triangle, "places": (30 + c, a)}
            end = b if not triangle else 30 + d
            attend = partial(plain_attention, **part)
            rows, cols = slice(c, d), slice(a, end)
            grads = flex.gradients(attend, dout[:, rows], q[:, rows], k[:, cols], v[:, cols], out[:, rows], lse[:, :, rows])
            for total, at, grad in zip((dq, dk, dv), (rows, cols, cols), grads, strict=True):
                total[:, at] += grad
            own = attend(q[:, rows], k[:, cols], v[:, cols])
            merged = merged or (torch.zeros_like(q), torch.full_like(lse, float("-inf")))
            merged[0][:, rows], merged[1][:, :, rows] = merge(merged[0][:, rows], merged[1][:, :, rows], *own)
    torch.testing.assert_close(merged, (out, lse), rtol=0, atol=1e-12)
    for found, expected in zip((dq, dk, dv), true, strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_a_sink_takes_its_share_of_the_gradients_too():
    """lse and out with a sink belong to more than the call's keys, as with keys elsewhere."""
    q, k, v, dout = inputs(20, 20)
    out, lse = reference.forward(q, k, v, causal=True, scale=0.5)
    with_sink = torch.logaddexp(lse, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)[:, None])
    out = out * (lse - with_sink).exp().transpose(1, 2).unsqueeze(-1)
    true = reference.backward(dout, q, k, v, out, with_sink, causal=True, scale=0.5)
    attend = partial(plain_attention, causal=True, scale=0.5, scores=None, places=(0, 0))
    for found, expected in zip(flex.gradients(attend, dout, q, k, v, out, with_sink), true, strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_lengths_places_and_values_compile_nothing_more(monkeypatch):
    """What torch.compile guards: after a few shapes of each kind, others and equal numbers in other roles are served."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(flex, "flex_attention", torch.compile(flex.flex_attention, fullgraph=True, backend=counter))
    kinds = {
        "softcap": lambda n: Scores(softcap=2.0 + n),
        "all": lambda n: Scores(softcap=3.0, slopes=SLOPES / (1 + n), mask_mod=of_documents(torch.arange(2048) // (99 + n)),
                                first_head=n),
        "mask_mod": lambda n: Scores(mask_mod=by_everything, first_row=n),
        "none": lambda n: None,
    }  # fmt: skip
    shapes = [(256, 256), (300, 700), (130, 513), (64, 100), (60, 60)]
    shapes += [(257, 400), (350, 350), (70, 101), (31, 77), (600, 601)]
    for kind, scores_of in kinds.items():
        counts = []
        for n, (Tq, Tk) in enumerate(shapes):
            q, k, v, _ = inputs(Tq, Tk, H=16, dtype=torch.float32)
            how = {"causal": True, "scale": 0.3, "scores": scores_of(n % 3), "places": (Tk - Tq + n // 2, n // 2)}
            out, true = (kernel.forward(q, k, v, **how)[0] for kernel in (flex, reference))
            assert (out - true).norm() <= 2e-5 * true.norm()
            counts.append(counter.frame_count)
        assert counts[4] == counts[-1], (kind, counts)
