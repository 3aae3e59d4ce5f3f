"""What becomes of the scores, in the two kernels that know: by tiles, by places, and in rows that see nothing."""

from __future__ import annotations

import pytest
import torch

from lss.config.errors import Refused
from lss.kernels import KERNELS, Rules, Scores, keep_rows, single_attention, tiled
from lss.kernels.dropout import keyed_keep
from lss.segment import make_segment
from tests.distributed.cases import blocks_of_eight, checkerboard
from tests.kernels.test_kernels import inputs

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
ALL = Scores(softcap=3.0, slopes=SLOPES, mask_mod=checkerboard, dropout_p=0.3, seed=9, samples=torch.tensor([4, 7]))


@pytest.mark.parametrize("Tq, Tk", [(300, 300), (100, 700), (513, 520)])
@pytest.mark.parametrize("how", [{"causal": True}, {"causal": False}, {"causal": False, "window": (290, 0)},
                                 {"causal": False, "window": (40, 70)}])  # fmt: skip
def test_tiles_are_the_whole_matrix(Tq, Tk, how):
    q, k, v, dout = inputs(Tq, Tk)
    how = how | {"scale": 0.3, "scores": ALL, "places": (Tk - Tq + 11, 11)}
    results = []
    for name in ("tiled", "reference"):
        out, lse = KERNELS[name].forward(q, k, v, **how)
        results.append((out, lse, *KERNELS[name].backward(dout, q, k, v, out, lse, **how)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_tiles_that_a_mask_empties_are_not_computed():
    q, k, _, _ = inputs(1024, 1024, B=1)
    everything = list(tiled.tiles(q, k, False, None, None, (0, 0)))
    assert len(everything) == 16
    assert len(list(tiled.tiles(q, k, True, None, None, (0, 0)))) == 10
    banded = Scores(mask_mod=lambda b, h, i, j: (i // 256 == j // 256) & (i < 768))
    assert [(t.rows.start, t.seen.start) for t in tiled.tiles(q, k, False, None, banded, (0, 0))] == [
        (0, 0), (256, 256), (512, 512)]  # fmt: skip
    assert len(list(tiled.tiles(q, k, False, (99, 0), None, (0, 0)))) == 4 + 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["tiled", "reference"])
def test_rows_that_see_nothing_are_zero_forward_and_backward(kernel, dtype):
    q, k, v, dout = inputs(32, 32, dtype=dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = single_attention(*leaves, Rules(causal=False, mask_mod=blocks_of_eight), kernel=kernel)
    grads = torch.autograd.grad(out, leaves, dout)
    blind = torch.arange(32) // 8 % 2 == 1
    assert not out[:, blind].any()
    assert out[:, ~blind].abs().sum() > 0
    assert all(bool(g.isfinite().all()) for g in grads)
    assert all(not g[:, blind].any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_padding_alone_is_zero_forward_and_backward(dtype):
    q, k, v, dout = inputs(12, 12, dtype=dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.tensor([[0] * 12, [0] * 3 + [1] * 9])
    out = single_attention(*leaves, Rules(keep=keep_rows(mask), sinks=torch.zeros(4, dtype=torch.float64)))
    grads = torch.autograd.grad(out, leaves, dout)
    for x in (out, *grads):
        assert not x[0].any()
        assert not x[1, :3].any()
        assert bool(x.isfinite().all())


def test_softcapped_scores_stay_within_the_cap():
    """Scores of thousands, which would make the softmax a maximum, stay a softmax of values within c."""
    q, k, v, _ = inputs(6, 6)
    out = single_attention(1000 * q, k, v, Rules(causal=False, softcap=1e-9))
    assert torch.allclose(out, v.mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(out), rtol=0, atol=1e-8)


def test_gradients_of_every_rule_pass_gradcheck():
    q, k, v, _ = (x[:, :, :, :4].detach().requires_grad_() for x in inputs(6, 6, N=2, K=1, B=1))
    sinks = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    segment = make_segment(6, cp=1, rank=0, cu_seqlens=[0, 2, 6])
    fixed = {"softcap": 2.0, "slopes": SLOPES[:2], "dropout_p": 0.4, "seed": 3, "samples": torch.tensor([5])}

    def attend(q, k, v, sinks):
        return single_attention(q, k, v, Rules(window=3, sinks=sinks, **fixed), segment=segment)

    assert torch.autograd.gradcheck(attend, (q, k, v, sinks))


def test_dropout_keeps_its_share_and_no_two_elements_share_a_draw():
    i = torch.arange(64)
    kept = keyed_keep(0.3, seed=1, samples_B=torch.arange(4), heads_N=torch.arange(4), i=i, j=i)
    assert kept.shape == (4, 4, 64, 64)
    assert abs(float(kept.double().mean()) - 0.7) < 0.006  # 65,536 draws: three standard deviations are 0.0054
    flat = kept.reshape(-1, 64).double() - 0.7
    across = (flat @ flat.T / 64 / 0.21).fill_diagonal_(0)
    assert float(across.abs().max()) < 0.8  # rows of 64 draws: no row repeats another or its opposite
    other = keyed_keep(0.3, seed=2, samples_B=torch.arange(4), heads_N=torch.arange(4), i=i, j=i)
    assert abs(float((kept == other).double().mean()) - (0.49 + 0.09)) < 0.01


def test_dropout_does_not_change_the_mean():
    """Many draws of the same attention average to it."""
    q, k, v, _ = inputs(16, 16, B=1)
    exact = single_attention(q, k, v)
    one = torch.zeros(1, dtype=torch.int64)
    drawn = [single_attention(q, k, v, Rules(dropout_p=0.5, seed=s, samples=one)) for s in range(600)]
    mean, spread = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 600**0.5
    assert float(((mean - exact).abs() / spread.clamp(min=1e-12)).mean()) < 1.2  # 0.8 for the error of a mean


def test_a_mask_mod_that_returns_no_booleans_is_refused():
    q, k, v, _ = inputs(4, 4)
    with pytest.raises(Refused, match="mask_mod=distance"):
        single_attention(q, k, v, Rules(mask_mod=distance))


@pytest.mark.parametrize("mod", [lambda b, h, i, j: True, lambda b, h, i, j: i >= j if i > 3 else i == j])
def test_a_mask_mod_that_is_no_tensor_function_is_refused(mod):
    q, k, v, _ = inputs(4, 4)
    with pytest.raises(Refused, match="mask_mod="):
        single_attention(q, k, v, Rules(mask_mod=mod))


def distance(b, h, i, j):
    """What a mask_mod is not to be: a score."""
    return i - j
