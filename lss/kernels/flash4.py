"""flash-attn-4 (PyPI `flash-attn-4`, optional): the fastest kernel on Hopper and Blackwell GPUs, forward and backward.

Its Python entry points with explicit backward are called directly; results are written in place, where the caller
wants them. Registered as operators with fake implementations, so that traces and compilers can pass over them.

Source: FlashAttention-4 (Dao and others), https://github.com/Dao-AILab/flash-attention, BSD-3.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from lss.kernels.reference import Window
from lss.kernels.rules import Scores

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_LIBRARY = torch.library.Library("lss", "FRAGMENT")
_LIBRARY.define(
    "flash4_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, float scale, bool causal, int? left, "
    "int? right, float softcap) -> ()"
)
_LIBRARY.define(
    "flash4_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) dq, Tensor(b!) dk, "
    "Tensor(c!) dv, float scale, bool causal, int? left, int? right, float softcap, bool deterministic) -> ()"
)


@cache
def installed() -> str | None:
    """The version of flash-attn-4, or None where it is not installed."""
    try:
        if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None or find_spec("cutlass") is None:
            return None
        return version("flash-attn-4")
    except (PackageNotFoundError, ImportError, ValueError):
        return None


@cache
def _interface():
    # imported at first use: it takes seconds, and compiles kernels as they are asked for
    from flash_attn.cute import interface

    return interface


def _forward_cuda(q, k, v, out, lse, scale, causal, left, right, softcap) -> None:
    _interface()._flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=causal, window_size_left=left, window_size_right=right,
        softcap=softcap or None, return_lse=True, out=out, lse=lse,
    )  # fmt: skip


def _backward_cuda(
    dout, q, k, v, out, lse, dq, dk, dv, scale, causal, left, right, softcap, deterministic
) -> None:  # fmt: skip
    _interface()._flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, softcap=softcap, window_size_left=left,
        window_size_right=right, deterministic=deterministic, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip


_LIBRARY.impl("flash4_forward", _forward_cuda, "CUDA")
_LIBRARY.impl("flash4_backward", _backward_cuda, "CUDA")
torch.library.register_fake("lss::flash4_forward", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake("lss::flash4_backward", lambda *args: None, lib=_LIBRARY)


def _softcap(scores: Scores | None) -> float:
    return 0.0 if scores is None else scores.softcap


def forward(
    q,
    k,
    v,
    *,
    causal: bool,
    scale: float,
    window: Window | None = None,
    scores: Scores | None = None,
    places: tuple[int, int] = (0, 0),
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward; shapes as in `reference.forward`. `into` = (out, lse) is where results are written. Of `scores` it knows
    soft-capping."""
    if into is None:
        into = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    left, right = window or (None, None)
    torch.ops.lss.flash4_forward(q, k, v, *into, scale, causal and window is None, left, right, _softcap(scores))
    return into


def backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    causal: bool,
    scale: float,
    window: Window | None = None,
    scores: Scores | None = None,
    places: tuple[int, int] = (0, 0),
    into: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
) -> Grads:
    """Backward from the global out and lse; each gradient is written to its place in `into` where there is one.

    Sums over queries run in an order of their own in every run, unless torch's deterministic algorithms are on: that
    costs some speed and gives the same bits each time.
    """
    dq, dk, dv = (torch.empty_like(x) if place is None else place for x, place in zip((q, k, v), into, strict=True))
    left, right = window or (None, None)
    torch.ops.lss.flash4_backward(
        dout, q, k, v, out, lse, dq, dk, dv, scale, causal and window is None, left, right, _softcap(scores),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv
