"""The two collectives of sharded parameters, in the form that torch's `fully_shard` asks for, counted like all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lss.comm.collectives import _all_gather, _reduce_scatter
from lss.comm.counter import record, waiting_inside


class _Comm:
    """Buffers of one call each."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a collective."""
        return torch.empty(*size, dtype=dtype, device=device)


class GatherParameters(_Comm):
    """All-gather of the parameters of one group; counted as ("all_gather", "parameters")."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Issue it; `output_tensor` is the payload."""
        record("all_gather", "parameters", output_tensor)
        with waiting_inside():
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class ScatterGradients(_Comm):
    """Reduce-scatter of the gradients of one group; counted as ("reduce_scatter", "gradients")."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Issue it; `input_tensor` is the payload."""
        record("reduce_scatter", "gradients", input_tensor)
        with waiting_inside():
            return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
