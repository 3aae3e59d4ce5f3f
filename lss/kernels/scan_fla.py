"""flash-linear-attention's Triton kernels (PyPI `fla-core`, optional) for the recurrence of bfloat16 on a GPU.

States from block to block, outputs and dv are its kernels', called with explicit backward; dq, dk and the gradient of the
decays are matrix products of plain torch in bfloat16. Its kernel of these three (`chunk_bwd_dqkwg`) is refused by itself
on Hopper GPUs under Triton 3.4 to 3.7.0, which torch comes with: it is compiled wrongly there.

A chunk is computed a section of blocks at a time, so that memory does not grow with its length: states of every block
exist of one section only, and one state a section is kept until backward. A document begins by a decay of 2^RESET, which
is 0 in float32; its kernels then need not know of documents (`block_sums`).

Source: https://github.com/fla-org/flash-linear-attention, MIT; `fla.ops.common.chunk_h` and `chunk_o`, version 0.6.0: g is
the running sum of log decays inside blocks of 64, in powers of 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from lss.kernels.scan_blocks import BLOCK, Passing
from lss.segment import Segment

# powers of 2 that are 0 in float32: of a document's beginning, and the least decay of a token that is told from 0
RESET, LEAST = -200.0, -150.0
# what decays are rounded to in blocks where a document begins; sums of a block's 64 RESETs are exact in float32 with it
GRID = 2.0**-10
# numbers of state in a section's blocks, over all rows and heads: 128 MiB of them
SECTION = 1 << 26


@cache
def installed() -> str | None:
    """The version of fla-core, or None where it is not installed."""
    try:
        return version("fla-core") if find_spec("fla") is not None and find_spec("triton") is not None else None
    except PackageNotFoundError:
        return None


def why_not() -> str | None:
    """Why its kernels cannot be called here, or None where they can."""
    found = installed()
    if found is None:
        return "fla-core is not installed; pip install 'lss-transformer[fla]'"
    if found.split(".")[:2] != ["0", "6"]:
        return f"it calls functions of fla-core 0.6, which the installed {found} may have changed"
    return None


class _Functions(NamedTuple):
    states: Any
    outputs: Any
    states_gradient: Any
    dv: Any


@cache
def _functions() -> _Functions:
    # imported at first use: it takes seconds, and compiles kernels as they are asked for
    from fla.ops.common.chunk_h import chunk_bwd_dh, chunk_fwd_h
    from fla.ops.common.chunk_o import chunk_bwd_dv, chunk_fwd_o

    return _Functions(chunk_fwd_h, chunk_fwd_o, chunk_bwd_dh, chunk_bwd_dv)


class Marked(NamedTuple):
    """Blocks in which a document begins, of so many rows: their numbers (b,), row after row, and first tokens (b, C)."""

    rows: int
    numbers: torch.Tensor
    begins: torch.Tensor


def marked_blocks(begins_XL: torch.Tensor, device: torch.device | None = None) -> Marked | None:
    """The blocks of these rows in which a document begins, or None where none does."""
    begins = F.pad(begins_XL, (0, -begins_XL.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).flatten(0, 1)
    numbers = begins.any(1).nonzero()[:, 0]
    return Marked(len(begins_XL), numbers.to(device), begins[numbers].to(device)) if len(numbers) else None


class _Places(NamedTuple):
    """What a segment marks, on the device; None: nothing is.

    Attributes:
        begins: documents' first tokens (T,).
        blocks: numbers of the blocks of the chunks one after another where a document begins, and the first tokens in them.
        through: chunks that no document begins in (M,).
        padding: (T,).
    """

    begins: torch.Tensor | None
    blocks: Marked | None
    through: torch.Tensor | None
    padding: torch.Tensor | None


@lru_cache(maxsize=16)
def _places(segment: Segment, device: torch.device) -> _Places:
    positions, padding = segment.positions, segment.positions >= segment.seq_len
    begins = blocks = through = None
    if segment.edges or segment.cp > 1:
        begins = (segment.document_positions == 0) | (positions == segment.seq_len)
        through = ~begins.view(len(segment.chunks), -1).any(1)
        blocks = marked_blocks(begins.view(len(segment.chunks), -1), device)
        begins, through = (begins.to(device), through.to(device)) if blocks is not None else (None, None)
    return _Places(begins, blocks, through, padding.to(device) if bool(padding.any()) else None)


class _Rows:
    """A call's tensors with a row for each chunk of each sequence, and what its kernels take of a section of them.

    Shape letters beside the library's: X rows, L tokens of a row, l tokens of a section.
    """

    def __init__(self, q, k, v, g, segment: Segment) -> None:
        self.chunks = len(segment.chunks)
        begins, blocks, self.through, self.padding = _places(segment, q.device)
        g = g.float()
        if begins is not None:
            g = g.masked_fill(begins[:, None], 0.0)
        self.q, self.k, self.v, self.g = (self.cut(x) for x in (q, k, v, g))
        self.share = v.shape[2] // q.shape[2]
        X, L, N, H = self.v.shape
        self.state = (X, N, q.shape[3], H)
        length = BLOCK * max(1, SECTION // math.prod(self.state))
        self.sums = block_sums(self.g, blocks)
        self.sections = [slice(at, min(at + length, L)) for at in range(0, L, length)]

    def cut(self, x_BT: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) as (X, L, ...)."""
        return x_BT.reshape(x_BT.shape[0] * self.chunks, -1, *x_BT.shape[2:])

    def back(self, x_XL: torch.Tensor) -> torch.Tensor:
        """The inverse of `cut`."""
        return x_XL.reshape(-1, self.chunks * x_XL.shape[1], *x_XL.shape[2:])

    def by_chunk(self, x_X: torch.Tensor) -> torch.Tensor:
        """(X, ...) as (B, M, ...)."""
        return x_X.unflatten(0, (-1, self.chunks))

    def decay(self) -> torch.Tensor:
        """What is left behind each chunk of the state that enters it: (B, M, N), 0 where a document begins in it."""
        decay = self.by_chunk(self.g.sum(1).exp())
        return decay if self.through is None else decay * self.through[:, None]

    def of(self, at: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v, and the running sums of decays in blocks, in powers of 2, of a section."""
        q, k, v, sums = (x[:, at].contiguous() for x in (self.q, self.k, self.v, self.sums))
        return q, k, v, sums

    def wide(self, x_XlKP: torch.Tensor) -> torch.Tensor:
        """Queries or keys of every head of v."""
        return x_XlKP if self.share == 1 else x_XlKP.repeat_interleave(self.share, 2)

    def zeros(self) -> torch.Tensor:
        """A state that holds nothing. Always given: with and without are two kernels to compile, and to tune."""
        return self.q.new_zeros(self.state, dtype=torch.float32)

    def states(self, k, v, sums, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before each block of a section (X, blocks, N, P, H), in k's dtype, and that behind it, in float32."""
        return _functions().states(self.wide(k), v, g=sums, h0=state, output_final_state=True, chunk_size=BLOCK)

    def leaving(self, q, dy, sums, behind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of the state that leaves each block, and of that which enters the section, in float32.

        Args:
            behind: that of the state that leaves the section.
        """
        q = self.wide(q)
        # h0: where there is one, its gradient is computed; its numbers are not read
        return _functions().states_gradient(q, q, dy, dy, h0=behind, dht=behind, scale=1.0, g=sums, chunk_size=BLOCK)


def block_sums(g_XLN: torch.Tensor, marked: Marked | None) -> torch.Tensor:
    """The running sum of log decays in each block, in powers of 2; where a document begins, RESET below all before.

    What a document computes is differences of these. So that they have not a bit of the documents before, sums go from each
    document's first token, and in blocks where one begins they are rounded to GRID, which makes adding what came before, and
    taking it away again, exact.

    Args:
        g_XLN: log decays, 0 at documents' first tokens.
        marked: of a sequence's rows, by `marked_blocks`; the next sequence's are alike. None: no document begins.
    """
    X, length, N = g_XLN.shape
    g = F.pad(g_XLN / math.log(2.0), (0, 0, 0, -length % BLOCK))
    g = g.view(X if marked is None else X // marked.rows, -1, BLOCK, N)
    sums = g.cumsum(2)
    if marked is not None:
        sums[:, marked.numbers] = _sums_of_documents(g[:, marked.numbers], marked.begins[..., None])
    return sums.view(X, -1, N)[:, :length].contiguous()


def _sums_of_documents(g_BbCN: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
    sums, barred, step = g_BbCN.clamp_min(LEAST), begins, 1
    while step < BLOCK:
        sums = sums + F.pad(sums[:, :, :-step], (0, 0, step, 0)).masked_fill(barred, 0.0)
        barred = barred | F.pad(barred[:, :-step], (0, 0, step, 0))
        step *= 2
    sums = (sums / GRID).round() * GRID
    return sums + torch.where(begins, F.pad(sums[:, :, :-1], (0, 0, 1, 0)) + RESET, 0.0).cumsum(2)


def forward(q, k, v, g, segment: Segment, passing: Passing | None) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, T, N, H), and the states that enter the sections of each chunk (sections, X, N, P, H), in float32.

    Memory while it computes: a section's states, and its q, k, v where there are several.
    """
    with torch.cuda.device(q.device):
        rows = _Rows(q, k, v, g, segment)
        entering = rows.zeros()
        if passing is not None:
            end = entering
            for at in rows.sections:
                _, k_s, v_s, sums = rows.of(at)
                _, end = rows.states(k_s, v_s, sums, end)
            entering = passing.forward(rows.decay(), rows.by_chunk(end))().flatten(0, 1).contiguous()
        kept, out = [], torch.empty_like(rows.v)
        for at in rows.sections:
            q_s, k_s, v_s, sums = rows.of(at)
            kept.append(entering)
            h, entering = rows.states(k_s, v_s, sums, entering)
            out[:, at] = _functions().outputs(q_s, k_s, v_s, h, g=sums, scale=1.0, chunk_size=BLOCK)
        y = rows.back(out)
        return y if rows.padding is None else y.masked_fill_(rows.padding[:, None, None], 0.0), torch.stack(kept)


def backward(dy, q, k, v, g, states, segment: Segment, passing: Passing | None) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv, dg), each in its input's dtype.

    Memory while it computes: a section's states and their gradients, and a few times its scores, X N l C, in float32.
    """
    with torch.cuda.device(q.device):
        rows = _Rows(q, k, v, g, segment)
        dy = dy.to(v.dtype)
        dy = rows.cut(dy if rows.padding is None else dy.masked_fill(rows.padding[:, None, None], 0.0))
        behind = rows.zeros()
        if passing is not None:
            for at in reversed(rows.sections):
                q_s, _, _, sums = rows.of(at)
                _, behind = rows.leaving(q_s, dy[:, at].contiguous(), sums, behind)
            behind = passing.backward(rows.by_chunk(behind))().flatten(0, 1).contiguous()
        grads = [torch.empty_like(x) for x in (rows.q, rows.k, rows.v, rows.g)]
        for number, at in reversed(list(enumerate(rows.sections))):
            q_s, k_s, v_s, sums = rows.of(at)
            dy_s = dy[:, at].contiguous()
            h, _ = rows.states(k_s, v_s, sums, states[number])
            dh, behind = rows.leaving(q_s, dy_s, sums, behind)
            dv = _functions().dv(q_s, k_s, dy_s, dh, g=sums, scale=1.0, chunk_size=BLOCK)
            dq, dk, dg = _gradients(q.device.type)(q_s, k_s, v_s, sums, dy_s, h, dh)
            for grad, part in zip(grads, (dq, dk, dv, dg), strict=True):
                grad[:, at] = part
        dq, dk, dv, dg = (rows.back(grad) for grad in grads)
        return dq, dk, dv, dg.to(g.dtype)


@cache
def _gradients(device_type: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    # compiled: what stands between its products is read and written once, not by each operation
    return torch.compile(section_gradients, dynamic=False) if device_type == "cuda" else section_gradients


def section_gradients(q, k, v, sums, dy, h, dh) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dg of a section, as `lss.kernels.scan_blocks` has them, by matrix products in the inputs' dtype.

    Args:
        q, k: (X, l, K, P); v, dy: (X, l, N, H).
        sums: (X, l, N), of `block_sums`.
        h, dh: (X, blocks, N, P, H), the state before each block and the gradient of the state behind it.
    """
    length, K = q.shape[1:3]

    def cut(x: torch.Tensor) -> torch.Tensor:
        """(X, l, n, f) as (X, Z, K, n / K, C, f)."""
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        return x.transpose(2, 3).unflatten(2, (K, -1))

    def back(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]

    # the last block is filled up with tokens that decay nothing
    sums = torch.cat((sums, sums[:, -1:].expand(-1, -length % BLOCK, -1)), 1)
    q, k, c = cut(q)[:, :, :, 0], cut(k)[:, :, :, 0], cut(sums[..., None])[..., 0]
    # head after head, as every product takes them: copied once
    v, dy = cut(v).contiguous(), cut(dy).contiguous()
    h, dh = (x.unflatten(2, (K, -1)).to(q.dtype) for x in (h, dh))
    last = c[..., -1]
    upper = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu()
    # gradients of the scores, with their decays; products of (X,Z,K,R,C,C) stay in the inputs' dtype, sums are of float32
    weighted = (c[..., :, None] - c[..., None, :]).masked_fill_(~upper.T, float("-inf")).exp2_().to(q.dtype)
    weighted *= dy @ v.mT
    pairs = (q @ k.mT)[:, :, :, None] * weighted
    dg = (upper.to(q.dtype) @ pairs).masked_fill_(upper, 0.0).sum(-1, dtype=torch.float32)
    dscores = weighted.sum(3, dtype=torch.float32).to(q.dtype)
    # what each head reads of the state before the block, and writes to that behind it
    read, written = dy @ h.mT, v @ dh.mT
    read *= c.exp2()[..., None]
    written *= (last[..., None] - c).exp2()[..., None]
    dq = (dscores @ k).float() + read.sum(3, dtype=torch.float32)
    dk = (dscores.mT @ q).float() + written.sum(3, dtype=torch.float32)
    read, written = ((x * of[:, :, :, None]).sum(-1, dtype=torch.float32) for x, of in ((read, q), (written, k)))
    passed = last.exp2() * (h.flatten(-2)[..., None, :] @ dh.flatten(-2)[..., None])[..., 0, 0]
    dg += read.flip(-1).cumsum(-1).flip(-1) + F.pad(written.cumsum(-1)[..., :-1], (1, 0)) + passed[..., None]
    return back(dq[:, :, :, None]), back(dk[:, :, :, None]), back(dg[..., None])[..., 0]
