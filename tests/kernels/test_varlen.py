"""Waves of blocks: every block once, nothing of a wave overlaps, and one call by the plain twin is what the blocks are."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from lss.kernels import KERNELS
from lss.kernels.varlen import _Packing, plain, plan_waves
from lss.segment import Block, make_blocks, make_mask, make_segment
from tests.kernels.test_kernels import inputs


def some_blocks(seed, order, causal, window, S=400):
    """The blocks of a random rank on a random packed sequence, all of its keys at hand."""
    rng = random.Random(seed)
    edges = [0, *sorted(rng.sample(range(1, S), rng.choice([0, 3, 40]))), S]
    cp = rng.choice([1, 2, 4])
    segment = make_segment(S, cp=cp, rank=rng.randrange(cp), order=order, cu_seqlens=edges, causal=causal, window=window)
    mask = make_mask(tuple(edges), causal=causal, window=window)
    return make_blocks(segment.local_runs, ((0, S, 0, S),), mask)


CASES = [(order, causal, window) for order in ("contiguous", "head_tail", "balanced") for causal in (True, False)
         for window in (None, 7, 60)]  # fmt: skip


@pytest.mark.parametrize("order, causal, window", CASES)
def test_every_block_is_in_one_wave_and_nothing_of_a_wave_overlaps(order, causal, window):
    for seed in range(30):
        blocks = some_blocks(seed, order, causal, window)
        waves = plan_waves(blocks)
        assert sorted(n for wave in waves for n in wave.blocks) == list(range(len(blocks)))
        for wave in waves:
            members = [blocks[n] for n in wave.blocks]
            assert wave.q_runs == tuple((b.q_start, b.q_stop) for b in members)
            assert wave.k_runs == tuple((b.k_start, b.k_stop) for b in members)
            for runs in (wave.q_runs, wave.k_runs):
                assert all(a < b for a, b in runs)
                assert all(before[1] <= after[0] for before, after in pairwise(runs))


def seen_by(n, m, left, right):
    """The keys that each query sees, by these bounds."""
    d = torch.arange(m) - torch.arange(n)[:, None] - (m - n)
    return (d >= (-m - n if left is None else -left)) & (d <= (m + n if right is None else right))


@pytest.mark.parametrize("order, causal, window", CASES)
def test_a_waves_bounds_are_each_blocks_own(order, causal, window):
    for seed in range(30):
        blocks = some_blocks(seed, order, causal, window)
        for wave in plan_waves(blocks):
            left, right = wave.window or (None, 0 if wave.causal else None)
            for b in (blocks[n] for n in wave.blocks):
                n, m = b.q_stop - b.q_start, b.k_stop - b.k_start
                own = b.window or (None, 0 if b.causal else None)
                assert torch.equal(seen_by(n, m, left, right), seen_by(n, m, *own))
                assert torch.equal(seen_by(n, m, wave.left, wave.right), seen_by(n, m, *own))


def test_packed_documents_are_one_wave_and_one_more_where_two_runs_share_keys():
    edges = tuple(range(0, 1025, 32))
    mask = make_mask(edges, causal=True)
    keys = ((0, 1024, 0, 1024),)
    assert len(plan_waves(make_blocks(keys, keys, mask))) == 1
    # the last of a cut's ranks: its first document begins before it
    assert len(plan_waves(make_blocks(((0, 250, 774, 1024),), keys, mask))) == 1
    windowed = make_mask(edges, causal=True, window=20)
    assert len(plan_waves(make_blocks(keys, keys, windowed))) == 1
    # two runs of one document's queries see the same keys
    long = make_mask((0, 100, 900, 1024), causal=True)
    runs = ((0, 200, 0, 200), (200, 400, 824, 1024))
    blocks = make_blocks(runs, keys, long)
    waves = plan_waves(blocks)
    assert len(blocks) == 4
    assert sorted(len(wave.blocks) for wave in waves) == [1, 3]


def test_short_documents_join_a_windowed_wave():
    """A document no longer than the window is plainly causal, and its scores are those of the window."""
    mask = make_mask((0, 10, 200, 215, 500), causal=True, window=15)
    run = ((0, 500, 0, 500),)
    blocks = make_blocks(run, run, mask)
    assert [b.window is None for b in blocks] == [True, False, True, False]
    (wave,) = plan_waves(blocks)
    assert (wave.left, wave.right) == (14, 0)
    assert plan_waves((Block(0, 4, 0, 9, False), Block(4, 8, 9, 18, True)))[0].blocks == (0,)


@pytest.mark.parametrize("order, causal, window", CASES)
@pytest.mark.parametrize("name", ["sdpa_cpu", "reference"])
def test_the_plain_twin_is_the_blocks_one_by_one(order, causal, window, name):
    kernel, twin, scale = KERNELS[name], plain(KERNELS[name]), 0.4
    q, k, v, dout = inputs(400, 400, B=1)
    for seed in range(3):
        blocks = some_blocks(seed, order, causal, window)
        T = max(b.q_stop for b in blocks)
        mine = [x[:, :T] for x in (q, dout)]
        results = []
        for by_waves in (False, True):
            out, lse = torch.zeros_like(mine[0]), torch.full((1, 4, T), float("-inf"), dtype=torch.float64)
            grads = [torch.zeros_like(x) for x in (mine[0], k, v)]
            row = (out[0], lse[0])
            if by_waves:
                for wave in plan_waves(blocks):
                    twin.forward(*row, mine[0][0], k[0], v[0], wave, scale)
                for wave in plan_waves(blocks):
                    twin.backward(*(g[0] for g in grads), mine[1][0], mine[0][0], k[0], v[0], *row, wave, scale)
            else:
                for b in blocks:
                    t, s = slice(b.q_start, b.q_stop), slice(b.k_start, b.k_stop)
                    how = {"causal": b.causal, "window": b.window, "scale": scale}
                    out[:, t], lse[:, :, t] = kernel.forward(mine[0][:, t], k[:, s], v[:, s], **how)
                for b in blocks:
                    t, s = slice(b.q_start, b.q_stop), slice(b.k_start, b.k_stop)
                    how = {"causal": b.causal, "window": b.window, "scale": scale}
                    part = kernel.backward(
                        mine[1][:, t], mine[0][:, t], k[:, s], v[:, s], out[:, t], lse[:, :, t], **how
                    )
                    for total, at, grad in zip(grads, (t, s, s), part, strict=True):
                        total[:, at] += grad
            results.append((out, lse, *grads))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("runs", [((3, 7), (7, 8), (8, 20)), ((3, 7), (9, 10), (12, 20)), ((0, 5),)])
def test_runs_are_taken_put_and_added_as_varlen_kernels_are_told(runs):
    packing = _Packing.of(runs, torch.device("cpu"))
    x = torch.arange(40.0).view(20, 2)
    rows = [r for run in runs for r in range(*run)]
    packed = packing.take(x)
    assert torch.equal(packed, x[rows])
    lengths = [b - a for a, b in runs]
    assert packing.longest == max(lengths)
    assert packing.edges.tolist() == [sum(lengths[:n]) for n in range(len(runs) + 1)]
    hull = x[packing.hull]
    for n, run in enumerate(runs):
        start, stop = packing.starts.tolist()[n : n + 2]
        stop = stop if packing.lengths is None else start + packing.lengths.tolist()[n]
        assert torch.equal(hull[start:stop], x[slice(*run)])
    assert packing.edges.dtype == packing.starts.dtype == torch.int32
    put, added = torch.zeros_like(x), torch.ones_like(x)
    packing.put(put, packed)
    packing.add(added, packed)
    expected = torch.zeros_like(x)
    expected[rows] = x[rows]
    assert torch.equal(put, expected)
    assert torch.equal(added, 1 + expected)
    packing.put(put.T.contiguous().T, packed)  # and through a transposed view, as lse is
