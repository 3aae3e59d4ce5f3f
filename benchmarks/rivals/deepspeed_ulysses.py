"""DeepSpeed's Ulysses: `DistributedAttention`, and ALST's `UlyssesSPAttentionHF`, each with the fastest local kernels.

Both exchange with `all_to_all_single`: q, k, v and out apart. ALST's class is the one that Hugging Face users get; it
also gathers the positions at every call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
import _rival_kernels as kernels

NAME = "DeepSpeed Ulysses"


def version() -> str | None:
    """DeepSpeed's."""
    return kernels.installed("deepspeed")


def why_not() -> str | None:
    """One sentence, or None."""
    if version() is None:
        return "The package deepspeed is not installed."
    return kernels.cannot_import("deepspeed.sequence.layer")


def attention(group, rank: int, world: int) -> list[tuple[str, str, Callable]]:
    """Ulysses over all ranks; needs key heads that the ranks divide."""
    import deepspeed.comm

    if group is None:
        return []
    deepspeed.comm.init_distributed(dist_init_required=False)  # wraps the process group that there is
    found = [(f"ulysses/{name}", "contiguous", _distributed(group, f)) for name, f in kernels.local_kernels().items()]
    if kernels.installed("transformers") is not None:
        found += [(f"alst/{name}", "contiguous", _alst(group, f)) for name, f in kernels.local_kernels().items()]
    return found


def _distributed(group, kernel: kernels.Kernel) -> Callable:
    from deepspeed.sequence.layer import DistributedAttention

    layer = DistributedAttention(kernel, group, scatter_idx=2, gather_idx=1)

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return layer(q, k, v, 0)  # 0: the batch is the first dimension

    return f


def _alst(group, kernel: kernels.Kernel) -> Callable:
    layers: dict[tuple, tuple] = {}

    def core(_module, q, k, v, _mask, **_kwargs):
        return kernel(*(x.transpose(1, 2) for x in (q, k, v))), None

    def build(B: int, T: int, N: int, K: int, H: int, device: torch.device) -> tuple:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        layer = UlyssesSPAttentionHF(
            attn=core, batch_size=B, attn_head_count=N, attn_head_size=H, kv_head_count=K, num_hidden_layers=1,
            process_group=group, local_seq_length=T, global_seq_length=T * group.size(),
        )  # fmt: skip
        start = group.rank() * T
        return layer, torch.nn.Module(), torch.arange(start, start + T, device=device).repeat(B, 1)

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        key = (*q.shape[:3], k.shape[2], q.shape[3], q.device)
        if key not in layers:
            layers[key] = build(*key)
        layer, module, positions = layers[key]
        out, _ = layer(module, *(x.transpose(1, 2) for x in (q, k, v)), None, position_ids=positions)
        return out.reshape(q.shape)

    return f
