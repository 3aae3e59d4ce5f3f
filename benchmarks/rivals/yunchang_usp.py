"""yunchang (USP): Ulysses, rings in three token orders, and both together from four ranks on.

Its kernels are those of the packages flash_attn 2 or 3, which are not installed here; its torch kernels have no
backward. So Ulysses gets its `attn_fn` set, and the rings' two flash_attn functions are answered by stand-ins (of
torch's flash, or flash-attn-4). The code that communicates and merges is the library's own.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
import _rival_kernels as kernels

NAME = "yunchang"
RINGS = {"ring-zigzag": ("zigzag", "head_tail"), "ring-stripe": ("strip", "striped"), "ring-basic": ("basic", "contiguous")}


def version() -> str | None:
    """yunchang's."""
    return kernels.installed("yunchang")


def why_not() -> str | None:
    """One sentence, or None."""
    if version() is None:
        return "The package yunchang is not installed."
    return kernels.cannot_import("yunchang")


def attention(group, rank: int, world: int) -> list[tuple[str, str, Callable]]:
    """Ulysses and rings over all ranks; USP (pairs of ranks exchange heads, pairs form rings) where four divide them."""
    if group is None:
        return []
    found = [(f"ulysses/{name}", "contiguous", _ulysses(group, f)) for name, f in kernels.local_kernels().items()]
    ring = _layers(1, world, rank, world)
    for name in kernels.ring_kernels():
        found += [(f"{ring_name}/{name}", order, _ring(ring[kind], name)) for ring_name, (kind, order) in RINGS.items()]
    if world % 4 == 0:
        usp = _layers(2, world // 2, rank, world)
        found += [(f"usp-basic/{name}", "contiguous", _ring(usp["basic"], name)) for name in kernels.ring_kernels()]
    return found


def _ulysses(group, kernel: kernels.Kernel) -> Callable:
    from yunchang import UlyssesAttention
    from yunchang.kernels import AttnType

    layer = UlyssesAttention(group, attn_type=AttnType.TORCH_FLASH)
    layer.attn_fn = lambda q, k, v, **_options: kernel(q, k, v)

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return layer(q, k, v, causal=True)

    return f


def _layers(ulysses: int, ring: int, rank: int, world: int) -> dict:
    """The attention layers of one split of the ranks; they keep the groups that are current when they are made."""
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    _stand_in()
    set_seq_parallel_pg(ulysses, ring, rank, world)
    return {kind: LongContextAttention(ring_impl_type=kind, attn_type=AttnType.FA) for kind, _ in RINGS.values()}


def _ring(layer, kernel: str) -> Callable:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kernels.use_ring_kernel(kernel)
        return layer(q, k, v, causal=True)

    return f


def _stand_in() -> None:
    from yunchang.kernels import attention as theirs

    if theirs.HAS_FLASH_ATTN and not getattr(theirs.flash_attn, "stands_in", False):
        return
    theirs.HAS_FLASH_ATTN = True
    theirs.flash_attn = types.SimpleNamespace(__version__="2.8.0", stands_in=True)
    theirs._flash_attn_forward = kernels._flash_attn_forward
    theirs._flash_attn_backward = kernels._flash_attn_backward
