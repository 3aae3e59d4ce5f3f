"""What DeepSpeed's ALST does for length on one device: its `TiledMLP` and `TiledFusedLogitsLoss` in a Llama of transformers.

Beside them what its recipe takes from elsewhere: layers recomputed in backward, their inputs kept in host memory
(`torch.autograd.graph.save_on_cpu`, pinned), bfloat16 weights, and AdamW in float32 on the host (torch's fused one over
master copies, in place of ZeRO's). MLP in ceil(S / width) tiles as its documentation has it, logits in tiles of a GiB.
Attention is torch's scaled dot product. On several devices its attention is `deepspeed_ulysses.py`'s.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent))
import _rival_kernels as kernels
import _rival_model as parts

NAME = "DeepSpeed ALST"
LOGITS_BYTES = 1 << 30


def version() -> str | None:
    """DeepSpeed's, with transformers'."""
    found = kernels.installed("deepspeed"), kernels.installed("transformers")
    return None if None in found else f"{found[0]} (transformers {found[1]}, torch {torch.__version__})"


def why_not() -> str | None:
    """One sentence, or None."""
    for package in ("deepspeed", "transformers"):
        if kernels.installed(package) is None:
            return f"The package {package} is not installed."
    modules = ("deepspeed.runtime.sequence_parallel.ulysses_sp", "transformers.models.llama")
    return next(filter(None, map(kernels.cannot_import, modules)), None)


def train(config: dict, group, rank: int, world: int, device) -> list[tuple[str, Callable[[], float]]]:
    """One entry, on one device; none on several."""
    if world > 1:
        return []
    return [("tiled/offload", parts.Lazy(partial(_Step, parts.shape_of(config), torch.device(device))))]


class _Step:
    """A model, master weights and their optimizer on the host, and one step of them at each call."""

    def __init__(self, shape: parts.Shape, device: torch.device) -> None:
        self.shape, self.device, self.tokens = shape, device, parts.Tokens(shape, device)
        # transformers refuses no dtype here, and a CPU computes the same in float32
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = parts.llama(shape, device).to(dtype)
        for layer in self.model.model.layers:
            layer.mlp.forward = partial(_tiled_mlp, layer.mlp)
        self.masters = [p.detach().to("cpu", torch.float32).clone() for p in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=parts.LR, betas=parts.BETAS, weight_decay=parts.WEIGHT_DECAY, fused=True
        )

    def __call__(self) -> float:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        ids, labels = self.tokens()
        head = self.model.lm_head
        tiles = math.ceil(self.shape.seq_len * self.shape.vocab_size * 4 / LOGITS_BYTES)
        with torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda"):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        total = TiledFusedLogitsLoss.apply(_loss, head, hidden, labels, None, tiles, [head.weight], "sum")
        (total / labels.numel()).backward()
        self._update(labels.numel())
        return float(total.detach()) / labels.numel()

    def _update(self, tokens: int) -> None:
        parameters = list(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, parts.CLIP)
        for master, p in zip(self.masters, parameters, strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.to("cpu", torch.float32), None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for master, p in zip(self.masters, parameters, strict=True):
                p.copy_(master)


def _tiled_mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
    return TiledMLP.apply(_mlp, mlp, x, math.ceil(x.shape[1] / x.shape[2]), weights)


def _mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def _loss(head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(x).float(), y, reduction="sum")
