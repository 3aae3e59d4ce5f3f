"""Chance by hash, the same on every machine: the order of an epoch as a permutation by index, and drawn bits."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _hash(x: int) -> int:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def hashes(seed: int, numbers: np.ndarray, *folded: int) -> np.ndarray:
    """64 drawn bits for each of `numbers` (whole numbers >= 0): uint64 of their shape.

    A function of (seed, folded numbers, number); distinct numbers get distinct bits.
    """
    key = _hash(seed)
    for fold in folded:
        key = _hash(key ^ fold)
    # unsigned arrays wrap around, as the masks do in _hash
    x = numbers.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: int, n: int, seed: int, epoch: int) -> int:
    """Where a permutation of range(n), drawn by (seed, epoch), sends `index`.

    A Feistel network permutes the smallest even number of bits that holds n; a value outside range(n) is sent through
    again until it falls inside, which keeps the map one to one. Whole-number arithmetic only, so that the order is
    the same on every machine and version.
    """
    assert 0 <= index < n
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [_hash(_hash(_hash(seed) ^ epoch) + r) for r in range(_ROUNDS)]
    value = index
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_hash(right ^ key) & mask)
        value = (left << half) | right
        if value < n:
            return value
