"""Attention over a whole sequence on one device, differentiable, with the same kernels as the cut one."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from lss.kernels.table import Kernel, pick_kernel


def single_attention(
    q_BTNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor, *, causal: bool = True, kernel: str = "auto"
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(H) + mask) V of shape (B, T, N, H); causal masks are aligned bottom-right."""
    return _SingleAttention.apply(q_BTNH, k_BSKH, v_BSKH, causal, q_BTNH.shape[-1] ** -0.5, pick_kernel(kernel, q_BTNH))


class _SingleAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal: bool, scale: float, kernel: Kernel):
        out, lse = kernel.forward(q, k, v, causal=causal, scale=scale)
        ctx.causal, ctx.scale, ctx.kernel = causal, scale, kernel
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        grads = ctx.kernel.backward(dout, q, k, v, out, lse, causal=ctx.causal, scale=ctx.scale)
        return *(grad.to(q.dtype) for grad in grads), None, None, None
