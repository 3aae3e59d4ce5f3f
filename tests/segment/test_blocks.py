"""What a mask is cut into: each visible score once, by calls that every kernel computes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lss.segment import make_blocks, make_mask
from lss.segment.blocks import Block


def _scores(block: Block) -> np.ndarray:
    """(n, m): which of its keys the queries of a call see."""
    n, m = block.q_stop - block.q_start, block.k_stop - block.k_start
    ahead = np.arange(m) - np.arange(n)[:, None] - (m - n)
    if block.window is not None:
        return (-block.window[0] <= ahead) & (ahead <= block.window[1])
    return ahead <= 0 if block.causal else np.ones((n, m), bool)


@given(
    st.integers(0, 40), st.integers(1, 40), st.integers(0, 40), st.integers(1, 40), st.booleans(),
    st.none() | st.integers(1, 90),
)  # fmt: skip
def test_any_queries_meet_any_keys_in_calls_that_kernels_take(a, n, c, m, causal, window):
    """cuDNN has no windows, and torch's flash operator takes one of as many keys as there are for none at all."""
    mask = make_mask((0, 80), causal=causal, window=window)
    blocks = make_blocks(((0, n, a, a + n),), ((0, m, c, c + m),), mask)
    found = np.zeros((n, m), int)
    for block in blocks:
        found[block.q_start : block.q_stop, block.k_start : block.k_stop] += _scores(block)
        assert _scores(block).any(1).all(), "a query that sees nothing"
        if window is None:
            assert block.window is None
        elif block.window is not None:
            queries, keys = block.q_stop - block.q_start, block.k_stop - block.k_start
            assert block.window[1] < keys or block.window[1] >= queries - 1
    i, j = np.arange(a, a + n)[:, None], np.arange(c, c + m)
    seen = j <= i if causal else np.ones((n, m), bool)
    if window is not None:
        seen = seen & (abs(i - j) < window)
    assert (found == seen).all()
