"""Attention by torch's FlexAttention, compiled: general masks and scores by a fused kernel on CUDA.

Source: "Flex Attention" (Dong et al. 2024). Takes every rule of `lss.kernels.rules` but dropout, which acts on P and not
on the scores. Its backward is reached by autograd only, of a call's own (o', l'); from the out and lse of all keys that
the queries see, of which this call's are a part, follow the gradients that o' and l' have:

    out = sum over calls of w o',  w = exp(l' - lse);  dO' = w dO;  dl' = w (rowsum(dO * o') - rowsum(dO * out))

so backward computes the call's forward again: 4.5 units in all where a kernel with an explicit backward takes 3.5. With
all keys in one call w is 1 and dl' is 0.

Compiled once for each kind of call: dtype, heads, head size, rules, code of the mask_mod. Places, bounds of the band,
soft cap, slopes and first rows and heads are read from tensors, and lengths become symbolic once a second length comes,
so that packed documents and other segments compile nothing more. The first calls of each kind take some seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lss.kernels.flex_mask import block_mask, scalar
from lss.kernels.merge import lse_dtype
from lss.kernels.reference import Window
from lss.kernels.rules import Scores

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Kinds of calls in one process; beyond them torch would stop compiling (its own limit is 8), and we refuse to go on.
MOST_KINDS = 128
# The decoding kernel, which torch would take for less than 128 queries, knows fewer numbers of heads.
_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


def forward(
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    window: Window | None = None,
    scores: Scores | None = None,
    places: tuple[int, int] = (0, 0),
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.forward`, without dropout; lse float32 also where q is float64. On the CPU slow, for tests."""
    return _attention(q_BTNH, causal, scale, window, scores, places, k_BSKH)(q_BTNH, k_BSKH, v_BSKH)


def backward(
    dout_BTNH: torch.Tensor,
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    out_BTNH: torch.Tensor,
    lse_BNT: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    window: Window | None = None,
    scores: Scores | None = None,
    places: tuple[int, int] = (0, 0),
) -> Grads:
    """(dq, dk, dv) from the out and lse of all keys, in q's dtype; on CUDA only."""
    attend = _attention(q_BTNH, causal, scale, window, scores, places, k_BSKH)
    return gradients(attend, dout_BTNH, q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT)


def gradients(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    dout_BTNH: torch.Tensor,
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    out_BTNH: torch.Tensor,
    lse_BNT: torch.Tensor,
) -> Grads:
    """This call's (dq, dk, dv) from the out and lse of all keys that its queries see.

    Args:
        attend: differentiable attention of these queries to this call's keys, (q, k, v) -> (o', l').
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q_BTNH, k_BSKH, v_BSKH)]
        own_out, own_lse = attend(*leaves)
    dtype = lse_dtype(q_BTNH)
    seen = own_lse.detach().to(dtype)
    # a query that sees none of these keys gives 0, also where it sees nothing at all: -inf - -inf would be NaN
    w_BNT = (seen - lse_BNT.to(dtype)).exp().masked_fill(seen == float("-inf"), 0.0)
    w_BTN = w_BNT.transpose(1, 2)
    dout = dout_BTNH.to(dtype)
    own_dlse = w_BTN * (dout * (own_out.detach().to(dtype) - out_BTNH.to(dtype))).sum(-1)
    own_dout = (w_BTN.unsqueeze(-1) * dout).to(own_out.dtype)
    grads = torch.autograd.grad(
        (own_out, own_lse), leaves, (own_dout, own_dlse.transpose(1, 2).to(own_lse.dtype).contiguous())
    )
    return grads[0], grads[1], grads[2]


def score_mod(scores: Scores | None, q_BTNH: torch.Tensor, places: tuple[int, int]) -> Callable | None:
    """What FlexAttention is to make of a scaled score: soft-capping, then slopes; None for nothing."""
    if scores is None or not (scores.softcap or scores.slopes is not None):
        return None
    dtype, device = lse_dtype(q_BTNH), q_BTNH.device

    def capped(score, row, head, i, j):
        return cap * torch.tanh(score / cap)

    cap = scalar("softcap", scores.softcap, device, dtype)
    if scores.slopes is None:
        return capped
    slopes, apart = scores.slopes.detach().to(device, dtype), scalar("apart", places[0] - places[1], device, torch.int32)

    def sloped(score, row, head, i, j):
        return score - slopes[head] * (i - j + apart).abs()

    def capped_and_sloped(score, row, head, i, j):
        return sloped(capped(score, row, head, i, j), row, head, i, j)

    return capped_and_sloped if scores.softcap else sloped


def _attention(
    q_BTNH: torch.Tensor,
    causal: bool,
    scale: float,
    window: Window | None,
    scores: Scores | None,
    places: tuple[int, int],
    k_BSKH: torch.Tensor,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(q, k, v) -> (out, lse) of these keys by these rules, in our layout."""
    assert scores is None or scores.dropout_p == 0.0
    blocks: BlockMask | None = block_mask(q_BTNH, k_BSKH, causal, window, scores, places)
    mod = score_mod(scores, q_BTNH, places)

    def attend(q, k, v):
        call = _compiled() if q.is_cuda else flex_attention
        with torch._dynamo.config.patch(recompile_limit=MOST_KINDS):  # ours alone, and only here
            out, aux = call(
                *(x.transpose(1, 2) for x in (q, k, v)), score_mod=mod, block_mask=blocks, scale=scale,
                enable_gqa=q.shape[2] != k.shape[2], return_aux=AuxRequest(lse=True),
                kernel_options=_OPTIONS,  # type: ignore[arg-type]
            )  # type: ignore[call-overload]  # fmt: skip
        return out.transpose(1, 2), aux.lse

    return attend


@cache
def _compiled() -> Callable:
    # fullgraph: what does not compile is an error, and not a silent matrix of all scores
    return torch.compile(flex_attention, fullgraph=True)
