"""The table of what computes recurrences, and the choice among it.

Every kernel has `forward(q, k, v, g, segment, passing) -> (y, states)` and `backward(dy, q, k, v, g, states, segment,
passing) -> (dq, dk, dv, dg)` on q, k (B, T, K, P), v (B, T, N, H) and g (B, T, N) or (B, T, N, P), for this rank's chunks of
a sequence and its documents; `states` is what it keeps for backward beside its inputs, a tensor or None. The states between
chunks are `Passing`'s, in float32 (float64 for float64), whatever the kernel computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lss.config.errors import refuse
from lss.config.support import SCAN_KERNEL_CHOICES
from lss.kernels import scan_fla, scan_plain


class ScanKernel(NamedTuple):
    """One way to compute a recurrence, forward and backward."""

    name: str
    forward: Callable[..., tuple[torch.Tensor, Any]]
    backward: Callable[..., tuple[torch.Tensor, ...]]


# The one table. "auto" takes the first that fits, in this order: the fastest first (`lss bench scan`).
SCAN_KERNELS: dict[str, ScanKernel] = {
    "fla": ScanKernel("fla", scan_fla.forward, scan_fla.backward),
    "blocks": ScanKernel("blocks", scan_plain.forward, scan_plain.backward),
}


def _why_not(name: str, q: torch.Tensor, v: torch.Tensor, by_channel: bool) -> str | None:
    """Why this kernel cannot take these tensors, or None where it can."""
    if name == "blocks":
        return None
    if q.device.type != "cuda":
        return "it runs on CUDA only"
    if by_channel:
        return "it is asked for one decay a head here, and log_decay has one for each row of the state"
    if q.dtype != torch.bfloat16:
        return f"it takes bfloat16, whose range states need that it keeps in the inputs' dtype, not {q.dtype}"
    for what, size in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if size % 16 or not 16 <= size <= 256:
            return f"it takes sizes of a head that are multiples of 16 up to 256, not {size} of {what}"
    if torch.are_deterministic_algorithms_enabled():
        return "how its kernels add is chosen by timing them, and deterministic algorithms are asked for"
    return scan_fla.why_not()


def pick_scan_kernel(name: str, q_BTKP: torch.Tensor, v_BTNH: torch.Tensor, *, by_channel: bool = False) -> ScanKernel:
    """Choose what computes a recurrence of these tensors' device, dtype and sizes, and of decays by head or by channel.

    "auto" is the first of the table that fits; any other name is that kernel or a refusal that says why it does not fit.
    """
    if name not in SCAN_KERNEL_CHOICES:
        raise refuse("scan_kernel", name, f"unknown kernel; use one of {', '.join(SCAN_KERNEL_CHOICES)}")
    reasons = {}
    for candidate in SCAN_KERNELS:
        if name in ("auto", candidate):
            reasons[candidate] = _why_not(candidate, q_BTKP, v_BTNH, by_channel)
            if reasons[candidate] is None:
                return SCAN_KERNELS[candidate]
    told = "; ".join(f"{n}: {reason}" for n, reason in reasons.items())
    raise refuse("scan_kernel", name, f"does not fit ({told}); use 'auto' or 'blocks'")
