"""Hugging Face transformers (Llama) with gradient checkpointing on one device: what a user gets without any other library.

`model.gradient_checkpointing_enable()` (not reentrant), the model's own loss, whose logits exist whole in float32, torch's
scaled dot product attention, AdamW (fused), bfloat16 under autocast with float32 weights on a GPU and float32 on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
import _rival_kernels as kernels
import _rival_model as parts

NAME = "transformers, checkpointing"


def version() -> str | None:
    """transformers', with torch's."""
    found = kernels.installed("transformers")
    return None if found is None else f"{found} (torch {torch.__version__})"


def why_not() -> str | None:
    """One sentence, or None."""
    if version() is None:
        return "The package transformers is not installed."
    return kernels.cannot_import("transformers.models.llama")


def train(config: dict, group, rank: int, world: int, device) -> list[tuple[str, Callable[[], float]]]:
    """One entry, on one device; none on several, over which nothing here would be shared."""
    if world > 1:
        return []
    return [("sdpa", parts.Lazy(partial(_Step, parts.shape_of(config), torch.device(device))))]


class _Step:
    """A model, its optimizer, and one step of them at each call."""

    def __init__(self, shape: parts.Shape, device: torch.device) -> None:
        self.device, self.tokens = device, parts.Tokens(shape, device)
        self.model = parts.llama(shape, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=parts.LR, betas=parts.BETAS, weight_decay=parts.WEIGHT_DECAY, fused=True
        )

    def __call__(self) -> float:
        ids, labels = self.tokens()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(input_ids=ids, labels=ids, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), parts.CLIP)
        self.optimizer.step()
        return float(loss.detach())
