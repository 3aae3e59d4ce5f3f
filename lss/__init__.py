"""Train transformers on sequences too long for one device, exactly.

The Long Short-Sequence (LSS) Transformer cuts each sequence over ranks: attention fetches all keys and values with one
fused all-gather a layer and returns their gradients with one fused reduce-scatter. See docs/algorithm.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lss.config.errors import Refused
    from lss.context_parallel import (
        attention,
        causal_conv,
        cross_entropy,
        linear_cross_entropy,
        make_segment,
        scan,
        shard,
        unshard,
    )
    from lss.mesh import init_mesh, world_size
    from lss.parallel import clip_grad_norm_, parallelize, sum_gradients

__version__ = "0.1.0"

__all__ = [
    "Refused",
    "attention",
    "causal_conv",
    "clip_grad_norm_",
    "cross_entropy",
    "init_mesh",
    "linear_cross_entropy",
    "make_segment",
    "parallelize",
    "scan",
    "shard",
    "sum_gradients",
    "unshard",
    "world_size",
]

# Where each name lives. Looked up when it is first asked for: torch takes seconds to import, in which the command line
# could neither refuse an argument nor answer a signal.
_HOMES = {
    "Refused": "lss.config.errors",
    "attention": "lss.context_parallel",
    "causal_conv": "lss.context_parallel",
    "clip_grad_norm_": "lss.parallel",
    "cross_entropy": "lss.context_parallel",
    "init_mesh": "lss.mesh",
    "linear_cross_entropy": "lss.context_parallel",
    "make_segment": "lss.context_parallel",
    "parallelize": "lss.parallel",
    "scan": "lss.context_parallel",
    "shard": "lss.context_parallel",
    "sum_gradients": "lss.parallel",
    "unshard": "lss.context_parallel",
    "world_size": "lss.mesh",
}
_ROOMS = ("config", "context_parallel", "kernels", "mesh", "parallel", "segment", "tiled")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"lss.{name}")
    raise AttributeError(f"module 'lss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
