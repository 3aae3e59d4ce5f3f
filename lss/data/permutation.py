"""A permutation of range(n) by index, in constant memory: the order of an epoch."""

from __future__ import annotations

_ROUNDS = 6
_MASK = (1 << 64) - 1


def _hash(x: int) -> int:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


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
