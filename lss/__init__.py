"""Train transformers on sequences too long for one device, exactly.

The Long Short-Sequence (LSS) Transformer cuts each sequence over ranks: attention fetches all keys and values with one
fused all-gather a layer and returns their gradients with one fused reduce-scatter. See docs/algorithm.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lss.config.errors import Refused

if TYPE_CHECKING:
    from lss.context_parallel import attention, cross_entropy, linear_cross_entropy, make_segment, shard, unshard
    from lss.mesh import init_mesh, world_size
    from lss.parallel import clip_grad_norm_, parallelize, sum_gradients

__version__ = "0.1.0"

__all__ = [
    "Refused",
    "attention",
    "clip_grad_norm_",
    "cross_entropy",
    "init_mesh",
    "linear_cross_entropy",
    "make_segment",
    "parallelize",
    "shard",
    "sum_gradients",
    "unshard",
    "world_size",
]


def __getattr__(name: str) -> Any:
    """Import a public name's room when it is first asked for: a command that refuses need not wait for torch."""
    rooms = {
        "lss.context_parallel": ("attention", "cross_entropy", "linear_cross_entropy", "make_segment", "shard", "unshard"),
        "lss.mesh": ("init_mesh", "world_size"),
        "lss.parallel": ("clip_grad_norm_", "parallelize", "sum_gradients"),
    }
    for room, names in rooms.items():
        if name in names:
            return getattr(import_module(room), name)
    raise AttributeError(f"module 'lss' has no attribute {name!r}")
