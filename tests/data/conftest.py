"""A small corpus on disk."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def folder(tmp_path):
    """Three files of 1000, 1 and 499 bytes in a tree, an empty one and a hidden one."""
    generator = np.random.default_rng(0)
    (tmp_path / "sub").mkdir()
    for name, size in (("a.bin", 1000), ("sub/b.bin", 1), ("sub/c.txt", 499), ("empty", 0), (".hidden", 7)):
        (tmp_path / name).write_bytes(generator.integers(0, 256, size, dtype=np.uint8).tobytes())
    return tmp_path


@pytest.fixture
def whole(folder):
    """The bytes of `folder`'s corpus."""
    return np.concatenate([np.fromfile(folder / name, np.uint8) for name in ("a.bin", "sub/b.bin", "sub/c.txt")])
