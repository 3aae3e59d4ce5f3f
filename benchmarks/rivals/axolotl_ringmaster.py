"""axolotl's ringmaster: Ulysses, and its three ways of a ring, called as transformers would call them.

Ulysses wraps any function of transformers' attention table, so the kernels are put there. The rings that pass keys on
call flash_attn's two low-level functions where transformers has loaded them; here stand-ins (of torch's flash, or
flash-attn-4) are what it has loaded. The all-gather ring takes any block kernel from a table of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
import _rival_kernels as kernels

NAME = "axolotl-ringmaster"


def version() -> str | None:
    """ringmaster's."""
    return kernels.installed("axolotl-ringmaster")


def why_not() -> str | None:
    """One sentence, or None."""
    if version() is None:
        return "The package axolotl-ringmaster is not installed."
    if kernels.installed("transformers") is None:
        return "ringmaster's attention is reached through the package transformers, which is not installed."
    return kernels.cannot_import("ringmaster") or kernels.cannot_import("transformers")


def attention(group, rank: int, world: int) -> list[tuple[str, str, Callable]]:
    """Ulysses; a ring in zigzag order; a balanced ring in contiguous order; and its default, which gathers."""
    if group is None:
        return []
    found = [(f"ulysses/{name}", "contiguous", _ulysses(group, name, f)) for name, f in kernels.local_kernels().items()]
    for name in kernels.ring_kernels() if torch.cuda.is_available() else ():  # on a CPU these two have no kernel
        found.append((f"ring-zigzag/{name}", "head_tail", _ring(group, "head_tail", "alltoall", kernel=name)))
        found.append((f"ring-distflash/{name}", "contiguous", _ring(group, "distflash", "alltoall", kernel=name)))
    for name, f in kernels.prefix_kernels().items():
        found.append((f"ring-allgather/{name}", "contiguous", _ring(group, "none", "allgather", block=(name, f))))
    if not torch.cuda.is_available():
        found.append(("ring-allgather/math", "contiguous", _ring(group, "none", "allgather", block=("math", None))))
    return found


def _runtime(load_balance: str, **groups):
    from ringmaster import RingmasterConfig
    from ringmaster.config import LoadBalance
    from ringmaster.runtime import CPRuntime

    size = groups["cp_group"].size()
    return CPRuntime(config=RingmasterConfig(size=size, load_balance=LoadBalance(load_balance)), **groups)


def _called(forward: Callable, runtime, before: Callable[[], None] | None = None) -> Callable:
    """forward as transformers calls it: heads first in, heads third out; the runtime is process-wide."""
    from ringmaster.runtime import set_runtime

    module = torch.nn.Module()

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        set_runtime(runtime)
        if before is not None:
            before()
        out, _ = forward(module, *(x.transpose(1, 2) for x in (q, k, v)), None, is_causal=True)
        return out

    return f


def _ulysses(group, name: str, kernel: kernels.Kernel) -> Callable:
    from ringmaster.strategies.ulysses import make_ulysses_attention
    from transformers import AttentionInterface

    def inner(_module, q, k, v, _mask, **_kwargs):
        return kernel(*(x.transpose(1, 2) for x in (q, k, v))), None

    AttentionInterface.register(f"rivals_{name}", inner)
    return _called(make_ulysses_attention(f"rivals_{name}"), _runtime("none", ulysses_group=group, cp_group=group))


def _ring(group, load_balance: str, rotation: str, kernel: str | None = None, block: tuple | None = None) -> Callable:
    from ringmaster.config import RotateMethod
    from ringmaster.ring.kernels import PROVIDERS
    from ringmaster.strategies.ring import make_ring_attention

    provider = "math"
    if block is not None and block[1] is not None:
        provider = f"rivals_{block[0]}"
        PROVIDERS[provider] = lambda q, k, v, **_options: (block[1](q, k, v), None)
    before = None if kernel is None else lambda: _load_stand_in(kernel)
    forward = make_ring_attention(provider, "flash_attention_2", RotateMethod(rotation))
    return _called(forward, _runtime(load_balance, ring_group=group, cp_group=group), before)


def _load_stand_in(kernel: str) -> None:
    """Leave transformers as if it had loaded flash_attn 2; ringmaster takes the functions from there."""
    from transformers import modeling_flash_attention_utils as theirs

    kernels.use_ring_kernel(kernel)
    if kernels.installed("flash-attn") is None:
        theirs._flash_fn = kernels.flash_attn_func
        theirs._loaded_implementation = "flash_attention_2"
