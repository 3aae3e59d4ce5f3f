"""How many parameters a model has, by arithmetic, so that one too large to build can be told without building it."""

from __future__ import annotations

from lss.config import ModelConfig


def parameter_count(config: ModelConfig, seq_len: int) -> int:
    """Parameters of `Transformer(config, seq_len)`."""
    D, F, layers = config.d_model, config.d_mlp, config.n_layers
    both = config.kind == "encoder_decoder"
    norm = D if config.norm == "rmsnorm" else 2 * D
    kv_width = D // config.n_heads * config.n_kv_heads
    attention = 2 * D * D + 2 * D * kv_width + (config.n_heads if config.sinks else 0)
    mlp = (3 if config.mlp == "swiglu" else 2) * D * F
    block = attention + mlp + 2 * norm
    tables = seq_len * D * (2 if both else 1) if config.positions == "learned" else 0
    total = config.vocab_size * D * (1 if config.tie_embeddings else 2) + tables + layers * block + norm
    # an encoder beside the decoder, with a norm at its end, and attention to it in every block of the decoder
    return total + (layers * block + norm + layers * (attention + norm) if both else 0)
