"""Attention stands outside of compiled graphs: torch.compile breaks a graph at its call, and nowhere inside of it.

Its side streams, plans and transfers are no matter for a compiler, and its kernels are operators already.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`, but that it costs nothing, and imports no compiler, where none is at work."""
    disabled: Any = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        # the compiler takes a second and a half to import: whoever compiles has done so
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call
