"""What the adapters share: one-device kernels a rival can be given, and the two flash-attn functions rings call.

A rival is measured with the fastest kernel it can be told to use, so that a table compares algorithms and not kernels.
Where a library insists on the low-level functions of the `flash_attn` package (version 2, which needs a compiler to
install), `_flash_attn_forward` and `_flash_attn_backward` below stand in for them with the same signature.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

aten = torch.ops.aten
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cannot_import(module: str) -> str | None:
    """Why a module cannot be imported, in one line; None where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        return f"{module} cannot be imported here: {type(error).__name__}: {reason}."
    return None


@cache
def flash_attn4() -> Any | None:
    """flash-attn-4's interface module, where it can be imported and there is a GPU for it."""
    if not torch.cuda.is_available():
        return None
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except Exception:
        return None


# -- whole sequence on one device, causal, (B, S, N, H) with K key heads -----------------------------------------------


def local_kernels() -> dict[str, Kernel]:
    """Causal attention of a whole sequence for Ulysses: every fast kernel there is here, by name."""
    if not torch.cuda.is_available():
        return {"sdpa": _sdpa}
    found: dict[str, Kernel] = {"cudnn": cudnn}
    if flash_attn4() is not None:
        found["flash-attn-4"] = flash4
    return found


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """cuDNN through torch's SDPA, key heads shared natively."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """flash-attn-4; causal masking is bottom-right, so queries may be the last ones of the keys."""
    out = flash_attn4().flash_attn_func(q, k, v, causal=True)  # pyright: ignore
    return out[0] if isinstance(out, tuple) else out


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


# -- what rings call: (out, lse) of a block, and its gradients from the global out and lse -----------------------------

_ring_kernel = "flash"


def ring_kernels() -> list[str]:
    """Kernels that `_flash_attn_forward` can be told to use here."""
    if not torch.cuda.is_available():
        return ["cpu"]
    return ["flash"] + (["flash-attn-4"] if flash_attn4() is not None else [])


def use_ring_kernel(name: str) -> None:
    """Choose the kernel of the two functions below, until the next call. Set before a forward; its backward follows."""
    global _ring_kernel
    _ring_kernel = name


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    return_softmax=False,
):  # fmt: skip
    """The flash_attn package's (out, lse, None, rng state) of one block, causal bottom-right; lse (B, N, S) float32."""
    _refuse(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    if _ring_kernel == "flash-attn-4":
        out, lse, *_ = flash_attn4()._flash_attn_fwd(  # pyright: ignore
            *_contiguous(q, k, v), softmax_scale=softmax_scale, causal=causal, return_lse=True
        )
    elif _ring_kernel == "flash":
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale
        )
    else:
        assert not causal or q.shape[1] == k.shape[1], "the CPU operator aligns a rectangle top-left"
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in _repeated(q, k, v)), 0.0, causal, scale=softmax_scale
        )
        out = out.transpose(1, 2)
    return out, lse, None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left=-1,
    window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None,
):  # fmt: skip
    """Write one block's gradients, from the global out and lse, into dq, dk and dv."""
    _refuse(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    softmax_lse = softmax_lse.contiguous()
    if _ring_kernel == "flash-attn-4":
        direct = dq.is_contiguous() and dk.is_contiguous() and dv.is_contiguous()
        into = {"dq": dq, "dk": dk, "dv": dv} if direct else {}
        grads = flash_attn4()._flash_attn_bwd(  # pyright: ignore
            *_contiguous(q, k, v, out, dout), softmax_lse, softmax_scale=softmax_scale, causal=causal, **into
        )[:3]
    elif _ring_kernel == "flash":
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the dropout state, not read at rate 0
        grads = aten._flash_attention_backward(
            *_contiguous(dout, q, k, v, out), softmax_lse, None, None, q.shape[1], k.shape[1], 0.0, causal, unused,
            unused[:0], scale=softmax_scale,
        )  # fmt: skip
    else:
        wide = _repeated(q, k, v)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (dout, *wide, out)), softmax_lse, 0.0, causal, scale=softmax_scale
        )
        grads = [_summed(grad.transpose(1, 2), like.shape[2]) for grad, like in zip(grads, (q, k, v), strict=True)]
    for place, grad in zip((dq, dk, dv), grads, strict=True):
        if place.data_ptr() != grad.data_ptr():
            place.copy_(grad)


def flash_attn_func(*_args, **_kwargs):
    """Marks this module as the home of the two functions above for libraries that look there."""
    raise NotImplementedError("only the low-level functions of flash_attn stand in here")


def prefix_kernels() -> dict[str, Kernel]:
    """Causal attention of the last queries of a prefix of keys (bottom-right), differentiable."""
    if not torch.cuda.is_available():
        return {}
    found: dict[str, Kernel] = {"flash": flash_prefix}
    if flash_attn4() is not None:
        found["flash-attn-4"] = flash4
    return found


def flash_prefix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's flash operator, which aligns bottom-right and knows its own gradient."""
    return aten._flash_attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False)[0]


def _refuse(dropout_p, left, right, softcap, alibi_slopes) -> None:
    if dropout_p or left != -1 or right != -1 or softcap or alibi_slopes is not None:
        raise NotImplementedError("the stand-in knows plain causal attention: no dropout, window, softcap or ALiBi")


def _contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.contiguous() for x in tensors]


def _repeated(q, k, v):
    times = q.shape[2] // k.shape[2]
    return q, k.repeat_interleave(times, dim=2), v.repeat_interleave(times, dim=2)


def _summed(grad: torch.Tensor, heads: int) -> torch.Tensor:
    return grad if grad.shape[2] == heads else grad.unflatten(2, (heads, -1)).sum(3)
