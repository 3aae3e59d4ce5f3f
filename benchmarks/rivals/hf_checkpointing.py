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
        from transformers import LlamaConfig, LlamaForCausalLM

        self.device, self.tokens = device, parts.Tokens(shape, device)
        torch.manual_seed(0)
        with torch.device(device):
            self.model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_mlp,
                    num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
                    num_key_value_heads=shape.n_kv_heads, head_dim=shape.head_size,
                    max_position_embeddings=shape.seq_len, rms_norm_eps=1e-5, use_cache=False,
                    tie_word_embeddings=shape.tie_embeddings, attn_implementation="sdpa",
                    rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
                )
            )  # fmt: skip
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
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
