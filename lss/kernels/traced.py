"""What stands for flash-attn-4 in traces without data: it computes nothing, and makes the buffers that the kernel makes.

A plan for GPUs is traced on tensors of the CPU, whose own kernel copies keys for every query head and merges parts; drawn
out to a million tokens that would be most of the memory planned, and none of it is there on a GPU.

Source of the buffers: `flash_attn.cute.interface` of flash-attn-4 4.0.0b36, `_flash_attn_bwd`: dQ is summed in float32, and
so are dK and dV where several query heads share a key head; two float32 numbers for each query and head come beside them.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from lss.kernels.pair import Pair
from lss.kernels.reference import Window
from lss.kernels.rules import Scores

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def is_traced(q: torch.Tensor) -> bool:
    """Whether these queries have no data."""
    return isinstance(q, FakeTensor)


def forward(
    q, k, v, *, causal: bool, scale: float, window: Window | None = None, scores: Scores | None = None,
    places: tuple[int, int] = (0, 0), into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Shapes as in `flash4.forward`; nothing is written."""
    if into is not None:
        return into
    return torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)


def backward(
    dout, q, k, v, out, lse, *, causal: bool, scale: float, window: Window | None = None, scores: Scores | None = None,
    places: tuple[int, int] = (0, 0),
    into: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
) -> Grads:  # fmt: skip
    """Shapes as in `flash4.backward`; nothing is written."""
    dq, dk, dv = (torch.empty_like(x) if place is None else place for x, place in zip((q, k, v), into, strict=True))
    _sums(q, k)
    return dq, dk, dv


def _sums(q: torch.Tensor, k: torch.Tensor) -> None:
    """The kernel's own buffers, all at once; gone when it has ended."""
    wide = [torch.empty_like(q, dtype=torch.float32)]
    wide += [torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2)]
    if q.shape[2] != k.shape[2]:
        wide += [torch.empty_like(k, dtype=torch.float32) for _ in range(2)]
    del wide


def forward_pair(out, lse, q, k, v, lengths: tuple[int, int], scale: float) -> None:
    """As of `Pair.forward`."""


def backward_pair(dq, dk, dv, dout, q, k, v, out, lse, lengths: tuple[int, int], scale: float) -> None:
    """As of `Pair.backward`."""
    _sums(q, k.expand(2, -1, -1, -1))


PAIR = Pair(forward_pair, backward_pair)
