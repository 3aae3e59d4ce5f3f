"""The table of attention kernels, the choice among them, and the cases that no kernel need know.

Every kernel has `forward(q, k, v, causal=, scale=, window=) -> (out, lse)` and `backward(dout, q, k, v, out, lse,
causal=, scale=, window=) -> (dq, dk, dv)` on layout (B, T, heads, H), N query heads sharing K key heads (N a multiple
of K), causal masks and windows aligned bottom-right. `lse` is the log-sum-exp of each query's scores, (B, N, T), float32
(float64 for float64), -inf for a query that sees no key; backward takes the out and lse of *all* keys a query sees, of
which this call's may be a part. Some kernels also take `scores`, what becomes of the scores, and `places`, those of the
first query and the first key; and some write their results `into` tensors that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from lss.config.errors import refuse
from lss.config.support import KERNEL_CHOICES, lacking
from lss.kernels import flash4, flex, pair, reference, sdpa, tiled, traced, varlen
from lss.kernels.merge import no_keys_yet
from lss.kernels.pair import Pair
from lss.kernels.reference import Window
from lss.kernels.rules import Scores
from lss.kernels.varlen import Varlen

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Places = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Kernel(NamedTuple):
    """One attention kernel: its name, its two functions, whether they take `into`, its forms for many blocks and for two."""

    name: str
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    grad: Callable[..., Grads]
    in_place: bool = False
    varlen: Varlen | None = None
    pair: Pair | None = None

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
        into: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's forward, with the cases it need not know: no queries, no keys, queries before the first key.

        An empty block kills the process in torch's CPU operator, and kernels disagree on the lse of a query that sees
        nothing (-inf, +inf, 0); here alone it becomes out 0 and lse -inf. Returns `into`, written, where it is given.
        """
        T = q_BTNH.shape[1]
        blind = _blind_queries(q_BTNH, k_BSKH, causal and window is None)
        how = _how(causal, scale, window, scores, (places[0] + blind, places[1]))
        if blind == 0:
            return self._run_into(into, q_BTNH, k_BSKH, v_BSKH, how)
        if into is None:
            into = torch.empty_like(q_BTNH), no_keys_yet(q_BTNH)
        out, lse = into
        out[:, :blind].zero_()
        lse[:, :, :blind].fill_(float("-inf"))
        if blind < T:
            self._run_into((out[:, blind:], lse[:, :, blind:]), q_BTNH[:, blind:], k_BSKH, v_BSKH, how)
        return into

    def _run_into(self, into, q, k, v, how) -> tuple[torch.Tensor, torch.Tensor]:
        if into is None:
            return self.run(q, k, v, **how)
        if self.in_place and into[0].dtype == q.dtype:
            return self.run(q, k, v, **how, into=into)
        for place, result in zip(into, self.run(q, k, v, **how), strict=True):
            place.copy_(result)
        return into

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
        into: Places = (None, None, None),
    ) -> Grads:
        """The kernel's backward with the same guards; a query that sees nothing gives and receives no gradient.

        Each gradient is written to its place in `into` where there is one, and is that tensor then.
        """
        blind = _blind_queries(q_BTNH, k_BSKH, causal and window is None)
        how = _how(causal, scale, window, scores, (places[0] + blind, places[1]))
        # torch's flash operator reads lse as if it were contiguous, whatever its strides: a slice gives wrong gradients
        lse_BNT = lse_BNT[:, :, min(blind, lse_BNT.shape[2]) :].contiguous()
        if blind == 0:
            return self._grad_into(into, dout_BTNH, q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT, how)
        dq, dk, dv = (
            torch.zeros_like(x) if place is None else place.zero_()
            for x, place in zip((q_BTNH, k_BSKH, v_BSKH), into, strict=True)
        )
        if blind < q_BTNH.shape[1]:
            douts, queries, outs = (x[:, blind:] for x in (dout_BTNH, q_BTNH, out_BTNH))
            self._grad_into((dq[:, blind:], dk, dv), douts, queries, k_BSKH, v_BSKH, outs, lse_BNT, how)
        return dq, dk, dv

    def _grad_into(self, into: Places, dout, q, k, v, out, lse, how) -> Grads:
        direct: Places = (None, None, None)
        if self.in_place:
            dq, dk, dv = (place if place is not None and place.dtype == q.dtype else None for place in into)
            direct = dq, dk, dv
            grads = self.grad(dout, q, k, v, out, lse, **how, into=direct)
        else:
            grads = self.grad(dout, q, k, v, out, lse, **how)
        dq, dk, dv = (
            grad if place is None else place if place is written else place.copy_(grad)
            for grad, place, written in zip(grads, into, direct, strict=True)
        )
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


# The one table. "auto" takes the first that fits, in this order. Torch's flash operator computes many short blocks in one
# call for cuDNN too, which has no such form, and for flash-attn-4, whose own (`varlen.flash4_forward`) has not been held to
# float64 on a GPU yet (tests/gpu/test_varlen.py); their results are the same numbers.
_FLASH_VARLEN = Varlen(varlen.flash_forward, varlen.flash_backward)
KERNELS: dict[str, Kernel] = {
    "sdpa_cpu": Kernel("sdpa_cpu", sdpa.cpu_forward, sdpa.cpu_backward),
    "flash4": Kernel(
        "flash4", flash4.forward, flash4.backward, in_place=True, varlen=_FLASH_VARLEN,
        pair=Pair(flash4.forward_pair, flash4.backward_pair),
    ),
    "sdpa_cudnn": Kernel("sdpa_cudnn", sdpa.cudnn_forward, sdpa.cudnn_backward, varlen=_FLASH_VARLEN),
    "sdpa_flash": Kernel("sdpa_flash", sdpa.flash_forward, sdpa.flash_backward, varlen=_FLASH_VARLEN),
    "flex": Kernel("flex", flex.forward, flex.backward),
    "tiled": Kernel("tiled", tiled.forward, tiled.backward),
    "reference": Kernel("reference", reference.forward, reference.backward, varlen=varlen.plain(reference),
                        pair=pair.plain(reference)),
}  # fmt: skip


# Not a choice of any user: what a plan for GPUs asks for in place of "auto".
TRACED = Kernel("traced", traced.forward, traced.backward, in_place=True, pair=traced.PAIR)


_CUDA = ("flash4", "sdpa_cudnn", "sdpa_flash")


def _why_not(name: str, q: torch.Tensor, features: Collection[str]) -> str | None:
    """Why this kernel cannot take these queries, or None where it can."""
    H, half = q.shape[-1], q.dtype in (torch.float16, torch.bfloat16)
    if name == "sdpa_cpu" and q.device.type != "cpu":
        return "it runs on the CPU only"
    if name in _CUDA:
        largest = 128 if name == "sdpa_cudnn" else 256
        if q.device.type != "cuda":
            return "it runs on CUDA only"
        if not half:
            return f"it takes float16 and bfloat16, not {q.dtype}"
        if H % 8 or largest < H:
            return f"it takes head sizes that are multiples of 8 up to {largest}, not {H}"
        if name != "sdpa_flash" and torch.cuda.get_device_capability(q.device) < (9, 0):
            return "it is used from compute capability 9.0 on, where it is the faster one"
        if name == "sdpa_cudnn" and torch.are_deterministic_algorithms_enabled():
            return "its backward sums in an order of its own, and deterministic algorithms are asked for"
        if name == "flash4" and flash4.installed() is None:
            return "flash-attn-4 is not installed; pip install 'lss-transformer[flash]'"
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
    if name == TRACED.name and traced.is_traced(q_BTNH):
        if q_BTNH.dtype in (torch.float16, torch.bfloat16) and lacking("flash4", features) is None:
            return TRACED
        name = "auto"
    if name not in KERNEL_CHOICES:
        raise refuse("kernel", name, f"unknown kernel; use one of {', '.join(KERNEL_CHOICES)}")
    wanted = [n for n in KERNELS if name == "auto" or n == name or (name == "sdpa" and n.startswith("sdpa"))]
    if name == "auto" and q_BTNH.dtype == torch.float32:
        wanted.remove("flex")  # what float32 is asked for is exactness: plain torch gives it without a compiler
    reasons = {}
    for candidate in wanted:
        reasons[candidate] = _why_not(candidate, q_BTNH, features)
        if reasons[candidate] is None:
            return KERNELS[candidate]
    told = "; ".join(f"{n}: {reason}" for n, reason in reasons.items())
    raise refuse("kernel", name, f"does not fit ({told}); use 'auto' or 'tiled'")
