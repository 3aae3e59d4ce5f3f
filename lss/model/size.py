"""How many parameters a model has, by arithmetic, so that one too large to build can be told without building it."""

from __future__ import annotations

from lss.config import ModelConfig
from lss.config.hybrid import layer_counts, scan_width


def parameter_count(config: ModelConfig, seq_len: int) -> int:
    """Parameters of `Transformer(config, seq_len)`."""
    D, F, layers = config.d_model, config.d_mlp, config.n_layers
    both = config.kind == "encoder_decoder"
    norm = D if config.norm == "rmsnorm" else 2 * D
    kv_width = D // config.n_heads * config.n_kv_heads
    attention = 2 * D * D + 2 * D * kv_width + (config.n_heads if config.sinks else 0)
    mlp = (3 if config.mlp == "swiglu" else 2) * D * F
    block = mlp + 2 * norm
    tables = seq_len * D * (2 if both else 1) if config.positions == "learned" else 0
    # the projection back of what is beside a scan reads both, behind a norm of each
    attending, scanning = layer_counts(config)
    mixers = attending * attention + scanning * _scan(config) + (attending + scanning - layers) * D
    total = config.vocab_size * D * (1 if config.tie_embeddings else 2) + tables + layers * block + mixers + norm
    # an encoder beside the decoder, with a norm at its end, and attention to it in every block of the decoder
    return total + (layers * (block + attention) + norm + layers * (attention + norm) if both else 0)


def _scan(config: ModelConfig) -> int:
    """Parameters of one scan, its projection back included."""
    width, heads = scan_width(config), config.scan_heads
    mixed = width + 2 * config.scan_groups * config.scan_state
    return config.d_model * (2 * width + mixed + heads) + mixed * (config.conv_width + 1) + 3 * heads + width
