"""What `torch.compile` keeps out of memory: results of element-wise operations that only such operations read.

A piece of a block, compiled, is a few kernels: each reads what products and other pieces left, and writes what a product, or
another piece, will read. What stands between is never written. A trace of the same code that is not compiled makes all of
it; by these rules it is told apart.
"""

from __future__ import annotations

from typing import Any

import torch

# beside those that torch tags as element-wise or as a sum, and views: what is fused with its neighbours
_ALIKE = {"aten._to_copy", "aten._unsafe_view", "aten.cat", "aten.constant_pad_nd", "aten.select_backward",
          "aten.slice_backward"}  # fmt: skip
_MAKE = {"aten._to_copy", "aten.cat"}
# code that is not compiled asks for memory so; what is there at that moment has been written
_OUTSIDE = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"}


def _name(operation: Any) -> str:
    return str(getattr(operation, "overloadpacket", operation))


def makes_fused(operation: object) -> bool:
    """Whether its result may be one that is never written."""
    if not isinstance(operation, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in operation.tags or _name(operation) in _MAKE


def reads_fused(operation: Any) -> bool:
    """Whether it takes its operands as they are computed; any other reads them from memory."""
    if operation.is_view or torch.Tag.pointwise in operation.tags or torch.Tag.reduction in operation.tags:
        return True
    return _name(operation) in _ALIKE


def is_outside(operation: Any) -> bool:
    """Whether it stands between compiled pieces: attention, a collective, or memory that is asked for."""
    return operation.namespace not in ("aten", "prim", "prims") or _name(operation) in _OUTSIDE
