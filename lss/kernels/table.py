"""The table of attention kernels, the choice among them, and the cases that no kernel need know.

Every kernel has `forward(q, k, v, causal=, scale=, window=) -> (out, lse)` and `backward(dout, q, k, v, out, lse,
causal=, scale=, window=) -> (dq, dk, dv)` on layout (B, T, heads, H), N query heads sharing K key heads (N a multiple
of K), causal masks and windows aligned bottom-right. `lse` is the log-sum-exp of each query's scores, (B, N, T), float32
(float64 for float64), -inf for a query that sees no key; backward takes the out and lse of *all* keys a query sees, of
which this call's may be a part. Those that know every rule also take `scores`, what becomes of the scores, and `places`,
those of the first query and the first key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from lss.config.errors import refuse
from lss.config.support import KERNEL_CHOICES, lacking
from lss.kernels import flex, reference, sdpa, tiled
from lss.kernels.merge import no_keys_yet
from lss.kernels.reference import Window
from lss.kernels.rules import Scores


class Kernel(NamedTuple):
    """One attention kernel: its name and its two functions."""

    name: str
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    grad: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def forward(
        self,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        *,
        causal: bool,
        scale: float,
        window: Window | None = None,
        scores: Scores | None = None,
        places: tuple[int, int] = (0, 0),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's forward, with the cases it need not know: no queries, no keys, queries before the first key.

        An empty block kills the process in torch's CPU operator, and kernels disagree on the lse of a query that sees
        nothing (-inf, +inf, 0); here alone it becomes out 0 and lse -inf.
        """
        T = q_BTNH.shape[1]
        blind = _blind_queries(q_BTNH, k_BSKH, causal and window is None)
        how = _how(causal, scale, window, scores, (places[0] + blind, places[1]))
        if blind == 0:
            return self.run(q_BTNH, k_BSKH, v_BSKH, **how)
        out = torch.zeros_like(q_BTNH)
        lse = no_keys_yet(q_BTNH)
        if blind < T:
            out[:, blind:], lse[:, :, blind:] = self.run(q_BTNH[:, blind:], k_BSKH, v_BSKH, **how)
        return out, lse

    def backward(
        self,
        dout_BTNH,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        out_BTNH,
        lse_BNT,
        *,
        causal: bool,
        scale: float,
        window: Window | None = None,
        scores: Scores | None = None,
        places: tuple[int, int] = (0, 0),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The kernel's backward with the same guards; a query that sees nothing gives and receives no gradient."""
        blind = _blind_queries(q_BTNH, k_BSKH, causal and window is None)
        how = _how(causal, scale, window, scores, (places[0] + blind, places[1]))
        # torch's flash operator reads lse as if it were contiguous, whatever its strides: a slice gives wrong gradients
        lse_BNT = lse_BNT[:, :, min(blind, lse_BNT.shape[2]) :].contiguous()
        if blind == 0:
            return self.grad(dout_BTNH, q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT, **how)
        dq, dk, dv = (torch.zeros_like(x) for x in (q_BTNH, k_BSKH, v_BSKH))
        if blind < q_BTNH.shape[1]:
            seeing = (x[:, blind:] for x in (dout_BTNH, q_BTNH))
            grads = self.grad(*seeing, k_BSKH, v_BSKH, out_BTNH[:, blind:], lse_BNT, **how)
            dq, (dk, dv) = torch.cat((dq[:, :blind].to(grads[0].dtype), grads[0]), dim=1), grads[1:]
        return dq, dk, dv


def _how(
    causal: bool, scale: float, window: Window | None, scores: Scores | None, places: tuple[int, int]
) -> dict[str, Any]:
    """A kernel's keywords; the fused ones do not know of scores and places."""
    how: dict[str, Any] = {"causal": causal, "scale": scale, "window": window}
    return how if scores is None else how | {"scores": scores, "places": places}


def _blind_queries(q: torch.Tensor, k: torch.Tensor, causal: bool) -> int:
    """How many of the first queries see no key; all of them where a block is empty."""
    if k.shape[1] == 0 or q.numel() == 0:
        return max(q.shape[1], 1)  # 1 also where there is no query, to keep empty blocks from the operators
    return max(q.shape[1] - k.shape[1], 0) if causal else 0


# The one table. "auto" takes the first that fits, in this order.
KERNELS: dict[str, Kernel] = {
    "sdpa_cpu": Kernel("sdpa_cpu", sdpa.cpu_forward, sdpa.cpu_backward),
    "sdpa_cudnn": Kernel("sdpa_cudnn", sdpa.cudnn_forward, sdpa.cudnn_backward),
    "sdpa_flash": Kernel("sdpa_flash", sdpa.flash_forward, sdpa.flash_backward),
    "flex": Kernel("flex", flex.forward, flex.backward),
    "tiled": Kernel("tiled", tiled.forward, tiled.backward),
    "reference": Kernel("reference", reference.forward, reference.backward),
}


def _why_not(name: str, q: torch.Tensor, features: Collection[str]) -> str | None:
    """Why this kernel cannot take these queries, or None where it can."""
    H, half = q.shape[-1], q.dtype in (torch.float16, torch.bfloat16)
    if name == "sdpa_cpu" and q.device.type != "cpu":
        return "it runs on the CPU only"
    if name in ("sdpa_cudnn", "sdpa_flash"):
        largest = 128 if name == "sdpa_cudnn" else 256
        if q.device.type != "cuda":
            return "it runs on CUDA only"
        if not half:
            return f"it takes float16 and bfloat16, not {q.dtype}"
        if H % 8 or largest < H:
            return f"it takes head sizes that are multiples of 8 up to {largest}, not {H}"
        if name == "sdpa_cudnn" and torch.cuda.get_device_capability(q.device) < (9, 0):
            return "it is used from compute capability 9.0 on, where it is the faster one"
    if name == "flex":
        if q.device.type != "cuda":
            return "it runs on CUDA only"
        if q.dtype == torch.float64:
            return "it takes float32, float16 and bfloat16, not float64"
        if not 16 <= H <= 256:
            return f"it takes head sizes of 16 to 256, not {H}"
        if torch.cuda.get_device_capability(q.device) < (8, 0) or find_spec("triton") is None:
            return "it needs compute capability 8.0, and Triton"
    return lacking(name, features)


def pick_kernel(name: str, q_BTNH: torch.Tensor, features: Collection[str] = ()) -> Kernel:
    """Choose the kernel for these queries' device, dtype and head size, and for these features of `lss.config.support`.

    "auto" is the fastest that fits; "sdpa" the fastest of torch's fused operators; any other name is that kernel or a
    refusal that says why it does not fit.
    """
    if name not in KERNEL_CHOICES:
        raise refuse("kernel", name, f"unknown kernel; use one of {', '.join(KERNEL_CHOICES)}")
    wanted = [n for n in KERNELS if name == "auto" or n == name or (name == "sdpa" and n.startswith("sdpa"))]
    reasons = {n: _why_not(n, q_BTNH, features) for n in wanted}
    for candidate, reason in reasons.items():
        if reason is None:
            return KERNELS[candidate]
    told = "; ".join(f"{n}: {reason}" for n, reason in reasons.items())
    raise refuse("kernel", name, f"does not fit ({told}); use 'auto' or 'tiled'")
