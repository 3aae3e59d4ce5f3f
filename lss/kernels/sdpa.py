"""Attention by the fused operators that ship with torch: the CPU flash operator, and flash and cuDNN on CUDA.

The CPU and the cuDNN operators align a rectangular causal mask top-left, which is wrong for any segment but the first;
there a rectangle is split into the past (all seen) and the square diagonal, and merged by log-sum-exp. Torch's flash
operator on CUDA aligns bottom-right and needs one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lss.kernels.merge import merge
from lss.kernels.reference import Window, band

aten = torch.ops.aten
_cudnn_forward = aten._scaled_dot_product_cudnn_attention
_cudnn_backward = aten._scaled_dot_product_cudnn_attention_backward

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def cpu_forward(q, k, v, *, causal: bool, scale: float, window: Window | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward by the CPU flash operator; shapes and dtypes as in `reference.forward`."""
    dtype = q.dtype
    # without bf16 matrix instructions float32 is the faster arithmetic here, and it rounds once instead of per part
    q, k, v = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (q, k, v))
    if window is None:
        out, lse = _split_forward(_cpu_call, q, k, v, causal, scale)
    else:
        out, lse = _banded_forward(q, k, v, window, scale)
    return out.to(dtype), lse


def cpu_backward(dout, q, k, v, out, lse, *, causal: bool, scale: float, window: Window | None = None) -> Grads:
    """Backward by the CPU flash operator from the global out and lse; float32 for half precision inputs."""
    dout, q, k, v, out = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (dout, q, k, v, out))
    if window is not None:
        return _banded_backward(dout, q, k, v, out, lse, window, scale)
    return _split_backward(_cpu_grad, dout, q, k, v, out, lse, causal, scale)


def flash_forward(q, k, v, *, causal: bool, scale: float, window: Window | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward by torch's CUDA flash operator (float16, bfloat16; head size a multiple of 8, at most 256)."""
    left, right = window or (None, None)
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse


def flash_backward(dout, q, k, v, out, lse, *, causal: bool, scale: float, window: Window | None = None) -> Grads:
    """Backward by torch's CUDA flash operator from the global out and lse; gradients in q's dtype."""
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's random state, read only where there is dropout
    left, right = window or (None, None)
    return aten._flash_attention_backward(
        dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, unused, unused[:0], scale=scale,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip


def cudnn_forward(q, k, v, *, causal: bool, scale: float, window: Window | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward by cuDNN (float16, bfloat16; head size a multiple of 8, at most 128; no windows)."""
    assert window is None
    if q.shape[1] == k.shape[1] == 1:  # which cuDNN does not take
        return flash_forward(q, k, v, causal=causal, scale=scale)
    out, lse = _split_forward(_cudnn_call, q, k, v, causal, scale)
    return out.to(q.dtype), lse


def cudnn_backward(dout, q, k, v, out, lse, *, causal: bool, scale: float, window: Window | None = None) -> Grads:
    """Backward by cuDNN from the global out and lse; gradients in q's dtype, float32 where a rectangle was split."""
    assert window is None
    if q.shape[1] == k.shape[1] == 1:
        return flash_backward(dout, q, k, v, out, lse, causal=causal, scale=scale)
    return _split_backward(_cudnn_grad, dout, q, k, v, out, lse, causal, scale)


# -- one square or unmasked call of each operator, in its own layout ---------------------------------------------------


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _cpu_call(q, k, v, causal: bool, scale: float, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q, k, v), 0.0, causal, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2), lse


def _cpu_grad(dout, q, k, v, out, lse, causal: bool, scale: float, mask=None) -> Grads:
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(dout, q, k, v, out), lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


def _cudnn_call(q, k, v, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = _cudnn_forward(*_heads_first(q, k, v), None, True, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2), lse.reshape(lse.shape[:3])


def _cudnn_grad(dout, q, k, v, out, lse, causal: bool, scale: float) -> Grads:
    unused = torch.zeros(1, dtype=torch.int64, device=q.device)  # seed and offset of a dropout that is off
    lengths = (None, None, q.shape[1], k.shape[1])
    grads = _cudnn_backward(
        *_heads_first(dout, q, k, v, out), lse.unsqueeze(-1), unused, unused, None, *lengths, 0.0, causal, scale=scale
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


# -- bottom-right alignment out of top-left operators ------------------------------------------------------------------


def _needs_split(q: torch.Tensor, causal: bool, past: int) -> bool:
    # a single query at the bottom right sees every key: no mask at all
    return causal and past > 0 and q.shape[1] > 1


def _split_forward(call: Callable, q, k, v, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    past = k.shape[1] - q.shape[1]
    if not _needs_split(q, causal, past):
        return call(q, k, v, causal and past == 0, scale)
    seen = call(q, k[:, :past], v[:, :past], False, scale)
    diagonal = call(q, k[:, past:], v[:, past:], True, scale)
    return merge(*seen, *diagonal)


def _split_backward(grad: Callable, dout, q, k, v, out, lse, causal: bool, scale: float) -> Grads:
    past = k.shape[1] - q.shape[1]
    if not _needs_split(q, causal, past):
        return grad(dout, q, k, v, out, lse, causal and past == 0, scale)
    dq, dk, dv = grad(dout, q, k[:, :past], v[:, :past], out, lse, False, scale)
    dq2, dk2, dv2 = grad(dout, q, k[:, past:], v[:, past:], out, lse, True, scale)
    dq = dq.to(lse.dtype) + dq2  # the two halves of a half precision dq are added in float32
    return dq, torch.cat((dk, dk2), dim=1), torch.cat((dv, dv2), dim=1)


# -- windows on the CPU ------------------------------------------------------------------------------------------------

_TILE = 64  # queries that share a mask at the least: shorter tiles cost more in calls than they spare in scores


def _tiles(q: torch.Tensor, k: torch.Tensor, window: Window) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(queries, keys that any of them sees, additive mask) of tiles about as long as the window is wide."""
    (left, right), Tq, Tk = window, q.shape[1], k.shape[1]
    size = max(_TILE, min(left + right + 1, Tq))
    for start in range(0, Tq, size):
        stop, offset = min(start + size, Tq), Tk - Tq
        first, last = max(0, start + offset - left), min(Tk, stop + offset + right)
        # the tile's own bottom-right corner lies elsewhere than the block's
        shift = (last - first) - (stop - start) - (offset + start - first)
        visible = band(stop - start, last - first, left + shift, right - shift, q.device)
        yield slice(start, stop), slice(first, last), torch.zeros(1, dtype=q.dtype).where(visible, float("-inf"))


def _banded_forward(q, k, v, window: Window, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [_cpu_call(q[:, rows], k[:, seen], v[:, seen], False, scale, mask) for rows, seen, mask in _tiles(q, k, window)]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)


def _banded_backward(dout, q, k, v, out, lse, window: Window, scale: float) -> Grads:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, seen, mask in _tiles(q, k, window):
        part = (dout[:, rows], q[:, rows], k[:, seen], v[:, seen], out[:, rows], lse[:, :, rows].contiguous())
        dq[:, rows], dk_part, dv_part = _cpu_grad(*part, False, scale, mask)
        dk[:, seen] += dk_part
        dv[:, seen] += dv_part
    return dq, dk, dv
