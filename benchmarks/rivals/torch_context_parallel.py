"""PyTorch's own context parallelism (torch.distributed.tensor.experimental), both rotations, both CUDA backends.

`context_parallel` is a context in which `scaled_dot_product_attention` is replaced, backward included. A bench calls
backward after the entry has returned, so what the context installs is used here directly: the DTensor handlers of the
attention operators, and DTensors cut along the sequence. It is the same code path (`_ContextParallel` does so for
modules); plain tensors, and so the other rivals, are not touched by it.

The rotation is a global setting that backward reads too: a forward must be followed by its own backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(Path(__file__).parent))
import _rival_kernels as kernels

NAME = "PyTorch context_parallel"
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
MODULE = "torch.distributed.tensor.experimental._attention"


def version() -> str | None:
    """torch's."""
    return torch.__version__


def why_not() -> str | None:
    """One sentence, or None."""
    if not torch.cuda.is_available():
        return "PyTorch's context_parallel runs causal attention on CUDA devices only; there is none here."
    return kernels.cannot_import(MODULE)


def attention(group, rank: int, world: int) -> list[tuple[str, str, Callable]]:
    """Both rotations with cuDNN and flash, in head_tail order (its load balance)."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (1,)) if group is None else DeviceMesh.from_group(group, device)
    return [
        (f"{rotation}/{backend}", "head_tail", _entry(mesh, rotation, BACKENDS[backend]))
        for rotation in ("allgather", "alltoall")
        for backend in BACKENDS
    ]


def _entry(mesh, rotation: str, backend: SDPBackend) -> Callable:
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental import _attention as library

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        library.set_rotate_method(rotation)
        library._cp_options.enable_load_balance = True
        _install(library)
        cut = [DTensor.from_local(x.transpose(1, 2), mesh, [Shard(2)], run_check=False) for x in (q, k, v)]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*cut, is_causal=True, enable_gqa=q.shape[2] != k.shape[2])
        return out.to_local().transpose(1, 2)

    return f


def _install(library) -> None:
    """The handlers, unless they are in place: leaving a `context_parallel` context elsewhere takes them away."""
    from torch.distributed.tensor import DTensor

    handlers = DTensor._op_dispatcher._custom_op_handlers
    if torch.ops.aten._scaled_dot_product_cudnn_attention.default not in handlers:
        library._enable_context_parallel_dispatcher()
