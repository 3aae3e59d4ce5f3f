"""Linear recurrences with matrix states: a block of tokens at a time, and the loop that they are held to.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,    y_t = q_t S_t,    S = 0 before a document's first token

with g_t a number a head: state-space duality (Dao and Gu 2024, "Transformers are SSMs"), which gated linear attention and
retention are cases of. With c_i the running sum of g in a block, a block whose first token is met by the state h gives

    y_i = sum_{j <= i} exp(c_i - c_j) (q_i . k_j) v_j + exp(c_i) q_i h
    h'  = exp(c_C) h + sum_j exp(c_C - c_j) k_j v_j^T

The first sums are matrix products of all blocks at once; the states go from block to block one after another. Where a
sequence is cut, a rank's chunks start from states that `Passing` brings. What computes it is in `lss.kernels.scan_table`.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from lss.config.errors import refuse
from lss.kernels.outside import outside_graphs
from lss.kernels.scan_blocks import Passing, of_states
from lss.kernels.scan_table import ScanKernel, pick_scan_kernel
from lss.segment import Segment, make_segment


def check_scan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor) -> None:
    """Refuse tensors that do not fit together."""
    of_decays = 4 if log_decay.dim() == 4 else 3
    for name, x, dims in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("log_decay", log_decay, of_decays)):
        if x.dim() != dims:
            fit = "batch, tokens, heads, size" if dims == 4 else "batch, tokens, heads; or one more, of q's size"
            raise refuse(name, tuple(x.shape), f"give {dims} dimensions ({fit})")
        if not x.is_floating_point() or (name != "log_decay" and x.dtype != q.dtype):
            raise refuse(name, x.dtype, f"q, k and v must have one floating point dtype; q has {q.dtype}")
    if k.shape != q.shape:
        raise refuse("k", tuple(k.shape), f"q and k must have one shape; q has {tuple(q.shape)}")
    if v.shape[:2] != q.shape[:2] or q.shape[2] == 0 or v.shape[2] % q.shape[2]:
        fit = f"batch and tokens must be those of q, {tuple(q.shape)}, and its heads a multiple of q's"
        raise refuse("v", tuple(v.shape), fit)
    if log_decay.shape[:3] != v.shape[:3] or log_decay.shape[3:] not in ((), q.shape[3:]):
        fit = f"give one number for each head of v, {tuple(v.shape[:3])}, or one for each row of its state"
        raise refuse("log_decay", tuple(log_decay.shape), f"{fit}, {(*v.shape[:3], q.shape[3])}")


@outside_graphs
def single_scan(
    q_BTKP: torch.Tensor,
    k_BTKP: torch.Tensor,
    v_BTNH: torch.Tensor,
    log_decay_BTN: torch.Tensor,
    *,
    segment: Segment | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """The recurrence over whole sequences on one device; (B, T, N, H).

    Args:
        q_BTKP, k_BTKP: (B, T, K, P); head n of N takes those of n // (N / K).
        v_BTNH: (B, T, N, H), N a multiple of K.
        log_decay_BTN: g, finite; or (B, T, N, P).
        segment: the sequence, whole, with its documents; one document by default.
        kernel: one of `lss.config.support.SCAN_KERNEL_CHOICES`.
    """
    check_scan(q_BTKP, k_BTKP, v_BTNH, log_decay_BTN)
    segment = segment or make_segment(q_BTKP.shape[1], cp=1, rank=0)
    return run_scan(q_BTKP, k_BTKP, v_BTNH, log_decay_BTN, segment, None, kernel)


def run_scan(q, k, v, log_decay, segment: Segment, passing: Passing | None, kernel: str = "auto") -> torch.Tensor:
    """The recurrence over a segment, 0 at padding; `passing` None: the segment is the whole sequence in one chunk.

    Memory until backward: the inputs, and the state that enters each chunk, in float32 (float64). While it computes: what
    the kernel's file says.
    """
    return _Scan.apply(q, k, v, log_decay, segment, passing, pick_scan_kernel(kernel, q, v, by_channel=log_decay.dim() == 4))


def scan_reference(q_BTKP, k_BTKP, v_BTNH, log_decay_BTN, edges: tuple[int, ...] = ()) -> torch.Tensor:
    """The definition, token after token, by autograd: what every other way is held to."""
    share = v_BTNH.shape[2] // q_BTKP.shape[2]
    q, k = (x.repeat_interleave(share, 2) for x in (q_BTKP, k_BTKP))
    state, out = v_BTNH.new_zeros(1, 1, 1, 1), []
    for t in range(q.shape[1]):
        new = k[:, t, :, :, None] * v_BTNH[:, t, :, None, :]
        kept = state * 0.0 if t in edges else state
        state = of_states(log_decay_BTN[:, t].exp(), new) * kept + new
        out.append((q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(out, 1)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, segment: Segment, passing: Passing | None, kernel: ScanKernel):
        with torch.autocast(q.device.type, enabled=False):
            y, *states = kernel.forward(q, k, v, g, segment, passing)
        ctx.segment, ctx.passing, ctx.kernel = segment, passing, kernel
        ctx.save_for_backward(q, k, v, g, *states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, g, *states = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            grads = ctx.kernel.backward(dy, q, k, v, g, *states, ctx.segment, ctx.passing)
        return *grads, None, None, None
