"""Many blocks in one call: packed documents as the sequences of a kernel's varlen form.

A packed batch of short documents is a block for each document and run of a rank's tokens, and on a GPU the launches then
cost more than the scores. Blocks that are masked alike, and whose queries and keys both rise without overlapping, make a
*wave*: one call. Overlapping keys (two runs of one document's queries) must lie in different waves, since a call adds up
the gradients of a key only within its sequence; overlapping queries, since it writes each query's result once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from lss.kernels import reference
from lss.segment import Block, Run

aten = torch.ops.aten


@dataclass(frozen=True)
class Wave:
    """One varlen call: queries of run n see keys of run n, both by rising runs that do not overlap.

    Attributes:
        left, right: of n queries and m keys, query i sees key j where -left <= (j - i) - (m - n) <= right, in every
            sequence alike; None where a side is unbounded.
        blocks: the numbers of its blocks among those it was planned from.
    """

    left: int | None
    right: int | None
    q_runs: tuple[Run, ...]
    k_runs: tuple[Run, ...]
    blocks: tuple[int, ...]

    @property
    def causal(self) -> bool:
        """Whether the mask is the plain causal one."""
        return self.left is None and self.right == 0

    @property
    def window(self) -> reference.Window | None:
        """The bounds as a kernel's `window`, where the mask is neither causal nor absent."""
        if self.causal or (self.left is None and self.right is None):
            return None
        longest = max(b - a for run in (self.q_runs, self.k_runs) for a, b in run)
        return tuple(2 * longest if side is None else side for side in (self.left, self.right))  # type: ignore[return-value]


@lru_cache(maxsize=64)
def plan_waves(blocks: tuple[Block, ...]) -> tuple[Wave, ...]:
    """Waves that hold every block once: each block, in the order of the queries, goes to the first wave that it fits.

    Blocks whose scores depend on places are not to be planned so: a wave knows of no places.
    """
    waves: list[_Open] = []
    order = sorted(range(len(blocks)), key=lambda n: (blocks[n].q_start, blocks[n].k_start))
    for number in order:
        block = blocks[number]
        for wave in waves:
            if wave.takes(block):
                break
        else:
            wave = _Open()
            waves.append(wave)
        wave.add(number, block)
    return tuple(wave.close() for wave in waves)


class _Open:
    """A wave that still takes blocks; `most`: the bounds that its unbounded sequences need in order to stay so."""

    def __init__(self):
        self.members: list[tuple[int, Block]] = []
        self.bounds: list[int | None] = [None, None]
        self.most = [0, 0]

    def takes(self, block: Block) -> bool:
        if not self.members:
            return True
        last = self.members[-1][1]
        if block.q_start < last.q_stop or block.k_start < last.k_stop:
            return False
        for side, (bound, enough) in enumerate(zip(_bounds(block), _enough(block), strict=True)):
            own, most = self.bounds[side], self.most[side]
            if bound is None:  # any bound will do that leaves all of its scores
                if own is not None and own < enough:
                    return False
            elif own not in (None, bound) or bound < most:
                return False
        return True

    def add(self, number: int, block: Block) -> None:
        for side, (bound, enough) in enumerate(zip(_bounds(block), _enough(block), strict=True)):
            if bound is None:
                self.most[side] = max(self.most[side], enough)
            else:
                self.bounds[side] = bound
        self.members.append((number, block))

    def close(self) -> Wave:
        queries, keys = zip(*(((b.q_start, b.q_stop), (b.k_start, b.k_stop)) for _, b in self.members), strict=True)
        left, right = self.bounds
        return Wave(left, right, queries, keys, tuple(number for number, _ in self.members))


def _enough(block: Block) -> tuple[int, int]:
    """The smallest bounds to the left and right that hide nothing of a block."""
    return block.k_stop - block.k_start - 1, block.q_stop - block.q_start - 1


def _bounds(block: Block) -> tuple[int | None, int | None]:
    """A block's bounds to the left and right; None where one hides nothing."""
    left, right = block.window or (None, 0 if block.causal else None)
    return tuple(None if b is None or b >= e else b for b, e in zip((left, right), _enough(block), strict=True))  # type: ignore[return-value]


# -- the calls ---------------------------------------------------------------------------------------------------------


class Varlen(NamedTuple):
    """A kernel's varlen form, on one row of a batch: q (T, N, H), k and v (S, K, H), lse (N, T).

    `forward(out, lse, q, k, v, wave, scale)` writes out and lse at the wave's queries, in place, and nothing elsewhere.
    `backward(dq, dk, dv, dout, q, k, v, out, lse, wave, scale)` adds to dq, dk and dv at its queries and keys, in their
    dtype, from the out and lse of all keys that the queries see.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]


def plain(kernel: Any) -> Varlen:
    """The plain twin: any kernel of the table, sequence by sequence."""

    def forward(out_TNH, lse_NT, q_TNH, k_SKH, v_SKH, wave: Wave, scale: float) -> None:
        how = {"causal": wave.causal, "window": wave.window, "scale": scale}
        for t, s in _slices(wave):
            out, lse = kernel.forward(*(x[None] for x in (q_TNH[t], k_SKH[s], v_SKH[s])), **how)
            out_TNH[t], lse_NT[:, t] = out[0], lse[0]

    def backward(dq_TNH, dk_SKH, dv_SKH, dout_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_NT, wave: Wave, scale: float) -> None:
        how = {"causal": wave.causal, "window": wave.window, "scale": scale}
        for t, s in _slices(wave):
            inputs = (dout_TNH[t], q_TNH[t], k_SKH[s], v_SKH[s], out_TNH[t], lse_NT[:, t])
            for total, at, grad in zip((dq_TNH, dk_SKH, dv_SKH), (t, s, s),
                                       kernel.backward(*(x[None] for x in inputs), **how), strict=True):  # fmt: skip
                total[at] += grad[0]

    return Varlen(forward, backward)


def flash_forward(out_TNH, lse_NT, q_TNH, k_SKH, v_SKH, wave: Wave, scale: float) -> None:
    """By torch's CUDA flash operator; runs with gaps between them are copied together first."""
    q, k = _Packing.of(wave.q_runs, q_TNH.device), _Packing.of(wave.k_runs, q_TNH.device)
    out, lse, *_ = aten._flash_attention_forward(
        q.take(q_TNH), k.take(k_SKH), k.take(v_SKH), q.edges, k.edges, q.longest, k.longest, 0.0, wave.causal, False,
        scale=scale, **_sides(wave),
    )  # fmt: skip
    q.put(out_TNH, out)
    q.put(lse_NT.transpose(0, 1), lse.transpose(0, 1))


def flash_backward(
    dq_TNH, dk_SKH, dv_SKH, dout_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_NT, wave: Wave, scale: float
) -> None:
    """By torch's CUDA flash operator."""
    q, k = _Packing.of(wave.q_runs, q_TNH.device), _Packing.of(wave.k_runs, q_TNH.device)
    unused = torch.empty(2, dtype=torch.uint64, device=q_TNH.device)  # dropout's random state
    lse = q.take(lse_NT.transpose(0, 1)).transpose(0, 1).contiguous()  # read as if it were
    dq, dk, dv = aten._flash_attention_backward(
        q.take(dout_TNH), q.take(q_TNH), k.take(k_SKH), k.take(v_SKH), q.take(out_TNH), lse, q.edges, k.edges, q.longest,
        k.longest, 0.0, wave.causal, unused, unused[:0], scale=scale, **_sides(wave),
    )  # fmt: skip
    q.add(dq_TNH, dq)
    k.add(dk_SKH, dk)
    k.add(dv_SKH, dv)


def flash4_forward(out_TNH, lse_NT, q_TNH, k_SKH, v_SKH, wave: Wave, scale: float) -> None:
    """By flash-attn-4, in place and without copies: where runs have gaps, their starts and lengths are given apart."""
    from flash_attn.cute.interface import _flash_attn_fwd

    t, s, how = _flash4_how(wave, q_TNH.device)
    # a call writes out in place, but its lse has to be contiguous
    own = torch.empty(lse_NT.shape[0], t.stop - t.start, dtype=torch.float32, device=lse_NT.device)
    _flash_attn_fwd(q_TNH[t], k_SKH[s], v_SKH[s], softmax_scale=scale, return_lse=True, out=out_TNH[t], lse=own, **how)
    q = _Packing.of(wave.q_runs, q_TNH.device)
    if q.whole is not None:
        lse_NT[:, t] = own
    else:
        lse_NT.index_copy_(1, q.rows, own.index_select(1, q.rows - t.start))


def flash4_backward(
    dq_TNH, dk_SKH, dv_SKH, dout_TNH, q_TNH, k_SKH, v_SKH, out_TNH, lse_NT, wave: Wave, scale: float
) -> None:
    """By flash-attn-4; deterministic where torch's deterministic algorithms are asked for."""
    from flash_attn.cute.interface import _flash_attn_bwd

    t, s, how = _flash4_how(wave, q_TNH.device)
    # what lies between the runs is not written, and is 0
    grads = [torch.zeros_like(x) for x in (q_TNH[t], k_SKH[s], v_SKH[s])]
    _flash_attn_bwd(
        q_TNH[t], k_SKH[s], v_SKH[s], out_TNH[t], dout_TNH[t], lse_NT[:, t].contiguous(), softmax_scale=scale,
        dq=grads[0], dk=grads[1], dv=grads[2], deterministic=torch.are_deterministic_algorithms_enabled(), **how,
    )  # fmt: skip
    for total, at, grad in zip((dq_TNH, dk_SKH, dv_SKH), (t, s, s), grads, strict=True):
        total[at] += grad


def _flash4_how(wave: Wave, device: torch.device) -> tuple[slice, slice, dict[str, Any]]:
    """The queries and keys from a wave's first to its last, and how flash-attn-4 is told of its runs in them."""
    q, k = _Packing.of(wave.q_runs, device), _Packing.of(wave.k_runs, device)
    left, right = (wave.left, wave.right) if wave.window else (None, None)
    how = {
        "causal": wave.causal, "window_size_left": left, "window_size_right": right, "cu_seqlens_q": q.starts,
        "cu_seqlens_k": k.starts, "seqused_q": q.lengths, "seqused_k": k.lengths, "max_seqlen_q": q.longest,
        "max_seqlen_k": k.longest,
    }  # fmt: skip
    return q.hull, k.hull, how


def _sides(wave: Wave) -> dict[str, int | None]:
    left, right = wave.window or (None, None)
    return {"window_size_left": left, "window_size_right": right}


def _slices(wave: Wave) -> Iterable[tuple[slice, slice]]:
    return ((slice(*q), slice(*k)) for q, k in zip(wave.q_runs, wave.k_runs, strict=True))


@dataclass(frozen=True, eq=False)
class _Packing:
    """Runs of tokens as varlen kernels are told of them.

    Attributes:
        hull: from the first token to the last; `whole` the same where there are no gaps, None where there are.
        edges: int32, of the runs behind one another, gaps left out.
        starts, lengths: int32, of the runs in the hull, with the hull's end behind the last start; lengths None where
            the starts say them.
        rows: int64, the numbers of the runs' tokens.
    """

    hull: slice
    whole: slice | None
    longest: int
    edges: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor | None
    rows: torch.Tensor

    @staticmethod
    @lru_cache(maxsize=256)
    def of(runs: tuple[Run, ...], device: torch.device) -> _Packing:
        """The packing of these runs; kept, so that layers share its tensors."""
        first, last = runs[0][0], runs[-1][1]
        lengths = [b - a for a, b in runs]
        gapless = all(before[1] == after[0] for before, after in pairwise(runs))
        numbers = torch.tensor([[a - first, n] for (a, _), n in zip(runs, lengths, strict=True)], dtype=torch.int32)
        edges = torch.nn.functional.pad(numbers[:, 1].cumsum(0, dtype=torch.int32), (1, 0))
        starts = torch.cat((numbers[:, 0], torch.tensor([last - first], dtype=torch.int32)))
        rows = torch.cat([torch.arange(a, b) for a, b in runs])
        hull = slice(first, last)
        return _Packing(
            hull, hull if gapless else None, max(lengths), edges.to(device), starts.to(device),
            None if gapless else numbers[:, 1].contiguous().to(device), rows.to(device),
        )  # fmt: skip

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The runs of x behind one another."""
        return x.index_select(0, self.rows) if self.whole is None else x[self.whole]

    def put(self, x: torch.Tensor, packed: torch.Tensor) -> None:
        """Write the runs of x."""
        if self.whole is None:
            x.index_copy_(0, self.rows, packed.to(x.dtype))
        else:
            x[self.whole] = packed

    def add(self, x: torch.Tensor, packed: torch.Tensor) -> None:
        """Add to the runs of x."""
        if self.whole is None:
            x.index_add_(0, self.rows, packed.to(x.dtype))
        else:
            x[self.whole] += packed
