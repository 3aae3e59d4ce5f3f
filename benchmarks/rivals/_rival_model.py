"""What the adapters of whole training steps share: the shape asked for, and random tokens that all ranks agree on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

LR, BETAS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Shape:
    """A decoder with RMSNorm, gated SiLU MLP and RoPE."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    seq_len: int
    tie_embeddings: bool
    rope_theta: float

    @property
    def head_size(self) -> int:
        """H."""
        return self.d_model // self.n_heads


def shape_of(config: dict) -> Shape:
    """The shape in a flat dict, or in one with sections such as "model" and "data"."""
    flat = dict(config)
    for section in config.values():
        if isinstance(section, dict):
            flat |= section
    return Shape(
        vocab_size=flat["vocab_size"], d_model=flat["d_model"], n_layers=flat["n_layers"], n_heads=flat["n_heads"],
        n_kv_heads=flat.get("n_kv_heads") or flat["n_heads"], d_mlp=flat["d_mlp"], seq_len=flat["seq_len"],
        tie_embeddings=bool(flat.get("tie_embeddings", False)), rope_theta=float(flat.get("rope_theta") or 10000.0),
    )  # fmt: skip


class Tokens:
    """Random sequences, new ones at each call, the same on every rank: (inputs, labels), each (1, S), labels shifted."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.randint(self.shape.vocab_size, (1, self.shape.seq_len + 1), generator=self.generator).to(self.device)
        return row[:, :-1].contiguous(), row[:, 1:].contiguous()


def llama(shape: Shape, device: torch.device) -> torch.nn.Module:
    """transformers' Llama of this shape, its layers recomputed in backward (not reentrant), torch's attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_mlp,
                num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
                num_key_value_heads=shape.n_kv_heads, head_dim=shape.head_size,
                max_position_embeddings=shape.seq_len, rms_norm_eps=1e-5, use_cache=False,
                tie_word_embeddings=shape.tie_embeddings, attn_implementation="sdpa",
                rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            )
        )  # fmt: skip
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


class Lazy:
    """step() that builds what it steps at the first call, so that entries do not hold memory side by side."""

    def __init__(self, make: Callable[[], Callable[[], float]], forget: Callable[[], None] = lambda: None) -> None:
        self.make, self.forget, self.made = make, forget, None

    def __call__(self) -> float:
        if self.made is None:
            self.made = self.make()
        return self.made()

    def close(self) -> None:
        """Free the model; another call would build it anew."""
        self.made = None
        self.forget()
        gc.collect()
