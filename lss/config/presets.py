"""Named model shapes: each is a set of [model] values, which single keys override.

They stand with the config and not with the model since validation needs the resolved values.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # the small model of `make demo` and the tests
    "tiny": {
        "d_model": 128,
        "n_layers": 4,
        "n_heads": 8,
        "n_kv_heads": 4,
        "d_mlp": 352,
        "vocab_size": 256,
        "positions": "rope",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "tie_embeddings": True,
        "dropout": 0.0,
        "kind": "decoder",
        "rope_theta": 10000.0,
    },
    # a character model of the size that enwik8 results are usually reported with
    "enwik8": {
        "d_model": 512,
        "n_layers": 12,
        "n_heads": 8,
        "n_kv_heads": 8,
        "d_mlp": 2048,
        "vocab_size": 256,
        "positions": "learned",
        "norm": "layernorm",
        "mlp": "gelu",
        "tie_embeddings": True,
        "dropout": 0.1,
        "kind": "decoder",
        "rope_theta": 10000.0,
    },
    # shapes of the published models; weights are drawn afresh
    "llama-3.2-1b": {
        "d_model": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "d_mlp": 8192,
        "vocab_size": 128256,
        "positions": "rope",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "tie_embeddings": True,
        "dropout": 0.0,
        "kind": "decoder",
        "rope_theta": 500000.0,
    },
    "llama-3.1-8b": {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "d_mlp": 14336,
        "vocab_size": 128256,
        "positions": "rope",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "tie_embeddings": False,
        "dropout": 0.0,
        "kind": "decoder",
        "rope_theta": 500000.0,
    },
}
# tiny, for restoring masked bytes; id 256 stands for a masked one
PRESETS["tiny-encoder"] = PRESETS["tiny"] | {"vocab_size": 257, "kind": "encoder"}
# n_layers of encoder and as many of decoder
PRESETS["tiny-encoder-decoder"] = PRESETS["tiny"] | {"n_layers": 2, "kind": "encoder_decoder"}
# state-space layers, and attention in every fourth, as in Mamba-2's hybrids
PRESETS["tiny-hybrid"] = PRESETS["tiny"] | {"layers": "sssa"}
# SPADE (Zuo et al. 2022): a state-space layer beside the attention of the bottom layer, and windows in all layers
PRESETS["tiny-spade"] = PRESETS["tiny"] | {"layers": "baaa", "windows": (128,)}
