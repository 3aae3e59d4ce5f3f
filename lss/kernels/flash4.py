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
    "int? right, float softcap, Tensor? used) -> ()"
)
_LIBRARY.define(
    "flash4_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) dq, Tensor(b!) dk, "
    "Tensor(c!) dv, float scale, bool causal, int? left, int? right, float softcap, bool deterministic, Tensor? used) -> ()"
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


def _forward_cuda(q, k, v, out, lse, scale, causal, left, right, softcap, used) -> None:
    _interface()._flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=causal, window_size_left=left, window_size_right=right,
        softcap=softcap or None, return_lse=True, out=out, lse=lse, seqused_k=used,
    )  # fmt: skip


def _backward_cuda(
    dout, q, k, v, out, lse, dq, dk, dv, scale, causal, left, right, softcap, deterministic, used
) -> None:  # fmt: skip
    _interface()._flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, softcap=softcap, window_size_left=left,
        window_size_right=right, deterministic=deterministic, dq=dq, dk=dk, dv=dv, seqused_k=used,
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
    torch.ops.lss.flash4_forward(q, k, v, *into, scale, causal and window is None, left, right, _softcap(scores), None)
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
        torch.are_deterministic_algorithms_enabled(), None,
    )  # fmt: skip
    return dq, dk, dv


@cache
def _used(lengths: tuple[int, int], device: torch.device) -> torch.Tensor:
    # made once: copying two numbers to a GPU takes as long as launching a kernel
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def forward_pair(out, lse, q, k, v, lengths: tuple[int, int], scale: float) -> None:
    """`Pair.forward`: a batch of two over the same keys, whose lengths the kernel reads from the device."""
    keys = (x.expand(2, -1, -1, -1) for x in (k, v))
    torch.ops.lss.flash4_forward(q, *keys, out, lse, scale, True, None, None, 0.0, _used(lengths, q.device))


def backward_pair(dq, dk, dv, dout, q, k, v, out, lse, lengths: tuple[int, int], scale: float) -> None:
    """`Pair.backward`; deterministic where `backward` is."""
    keys = (x.expand(2, -1, -1, -1) for x in (k, v))
    torch.ops.lss.flash4_backward(
        dout, q, *keys, out, lse, dq, dk, dv, scale, True, None, None, 0.0,
        torch.are_deterministic_algorithms_enabled(), _used(lengths, q.device),
    )  # fmt: skip
