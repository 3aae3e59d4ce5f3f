"""Dropout whose random numbers belong to a token, not to a process.

Each element's keep-or-drop bit is a hash of (seed, site, sample, global position, feature): the same for any cut of
the sequence or the batch, in any order of computation, and again when an activation is recomputed.
"""

from __future__ import annotations

import torch

# Multipliers of the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit integers; torch's int64
# products wrap around, which is the arithmetic the finaliser wants.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_BITS = 24


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 shifts keep the sign; the mask makes this the unsigned shift
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64 tensors: a bijection whose output bits all depend on all input bits."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def fold(seed: int, *numbers: int) -> int:
    """Fold whole numbers (step, layer, place in the layer) into a seed; returns a 63-bit seed."""
    key = torch.tensor(seed & ((1 << 63) - 1))
    for number in numbers:
        key = mix(key * _GOLDEN + number + 1)
    return int(key) & ((1 << 63) - 1)


def _key(seed: int, device: torch.device) -> torch.Tensor:
    """A seed whose bits all count: the sums of neighbouring seeds and samples would meet."""
    return mix(torch.tensor(seed, device=device) * _GOLDEN)


def keyed_dropout(
    x_BTD: torch.Tensor, p: float, *, seed: int, samples_B: torch.Tensor, positions_T: torch.Tensor
) -> torch.Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p).

    Args:
        x_BTD: activations, (B, T, D), any float dtype.
        p: drop probability in [0, 1).
        seed: folds run seed, step, layer and place in the layer (see `fold`).
        samples_B: int64 (B,), each row's number in the global batch.
        positions_T: int64 (T,), each token's global position.
    """
    if p == 0.0:
        return x_BTD
    features = torch.arange(x_BTD.shape[-1], device=x_BTD.device)
    rows = mix(mix(samples_B + _key(seed, x_BTD.device))[:, None] * _GOLDEN + positions_T)
    bits = _shift_right(mix(rows[:, :, None] + features * _GOLDEN), 64 - _BITS)
    keep = bits >= round(p * (1 << _BITS))
    return x_BTD * keep.to(x_BTD.dtype) / (1.0 - p)


def keyed_keep(
    p: float, *, seed: int, samples_B: torch.Tensor, heads_N: torch.Tensor, i: torch.Tensor, j: torch.Tensor
) -> torch.Tensor:
    """Which elements of attention's P (B, N, q, k) a dropout of probability p keeps; boolean.

    The bit of an element is a hash of (seed, sample, head, i, j), with i and j the global places of its query and key:
    the same for any cut of tokens, heads or batch, any tiling, and again when it is recomputed.
    """
    rows = mix(mix(samples_B + _key(seed, i.device))[:, None] * _GOLDEN + heads_N)
    rows = mix(rows[:, :, None] * _GOLDEN + i)
    bits = _shift_right(mix(rows[..., None] + j * _GOLDEN), 64 - _BITS)
    return bits >= round(p * (1 << _BITS))
