"""What a recurrence computes by blocks of tokens, forward and backward (`lss.kernels.scan` has the formulas).

Shape letters beside the library's: Z blocks, C tokens of a block, M chunks of a rank, K groups of R heads each, P the size
of q and k, so that a state is P x H.

The gradient of the decays comes from those of everything else. A pair i >= j has the factor exp(c_i - c_j), so that with
w_ij its part of the loss' derivative, dL/dg_t is the sum of all w_ij with j < t <= i: pairs inside the block, tokens from t
on with the state that entered, tokens before t with the state that leaves, and the one state with the other. All are added
up; the shorter way, differences of what rows and columns sum up to, cancels most of its digits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
from torch.nn import functional as F

from lss.segment import ScanBlocks

# Tokens of a block: scores of C by C are made in each, states once in each.
BLOCK = 64

# Scores exist of an eighth of the blocks at a time: in many heads all of them would be most of the memory.
TILES = 8

Masks = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# dq, dk (B,Z,K,C,P), dv (B,Z,K,R,C,H), and dg (B,Z,K,R,C)
Inside = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Passing(Protocol):
    """Brings states from chunk to chunk where a rank holds several, or only some, of a sequence's.

    States are (B, M, ..., P, H) with heads in one dimension or in two, decays the same without P and H.
    """

    def forward(self, decay_BMN: torch.Tensor, ends_BMNPH: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Given each chunk's whole decay, and its end state if it began with 0: the states that enter, when asked for."""
        ...

    def backward(self, entering_BMNPH: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Given gradients of entering states by their own chunk alone: those of the states that leave, when asked for."""
        ...


def chained(terms: torch.Tensor, decay: torch.Tensor, reverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before each block and that behind the last, from 0: state = decay * state + term, block after block.

    (B, M, blocks, K, R, P, H) and (B, M, blocks, K, R) or (B, M, blocks, K, R, P); `reverse` begins with the last block.
    """
    decay = of_states(decay, terms)
    before, state = torch.empty_like(terms), torch.zeros_like(terms[:, :, 0])
    order = range(terms.shape[2])
    for z in reversed(order) if reverse else order:
        before[:, :, z] = state
        state = torch.addcmul(terms[:, :, z], decay[:, :, z], state)
    return before, state


def of_states(decay: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Decays of heads or of their channels with the dimensions of states (..., P, H)."""
    return decay.reshape(*decay.shape, *[1] * (states.dim() - decay.dim()))


def _masks(blocks: ScanBlocks, device: torch.device) -> Masks:
    """(true tokens (T, 1, 1) or None, pairs that see each other (Z or 1, 1, 1, C, C), first, last (Z, 1, 1, C), passes)."""
    first, last, passes = (torch.from_numpy(x).to(device) for x in (blocks.first, blocks.last, blocks.passes))
    true = None if blocks.true is None else torch.from_numpy(blocks.true).to(device)[:, None, None]
    sees = torch.ones(blocks.size, blocks.size, dtype=torch.bool, device=device).tril()[None]
    if blocks.documents is not None:
        documents = torch.from_numpy(blocks.documents).to(device)
        sees = sees & (documents[:, :, None] == documents[:, None, :])
    return true, sees[:, None, None], first[:, None, None], last[:, None, None], passes[:, None, None]


@lru_cache(maxsize=16)
def _masks_kept(blocks: ScanBlocks, device: torch.device) -> Masks:
    """Masks on a GPU; kept, since bringing them there would wait for the GPU in every layer."""
    return _masks(blocks, device)


class ScanWork:
    """A call's tensors cut into blocks, in float32 at least, with what decays in and between them.

    Attributes:
        decay: (B, Z, K, R), what is left behind a block of the state that entered it.
    """

    def __init__(self, q, k, v, g, blocks: ScanBlocks) -> None:
        self._blocks, self._dtype = blocks, torch.promote_types(q.dtype, torch.float32)
        self._groups = q.shape[2]
        masks = _masks_kept(blocks, q.device) if q.is_cuda else _masks(blocks, q.device)
        self._true, sees, first, last, passes = masks
        self._q, self._k, self._v = self.cut(q)[:, :, :, 0], self.cut(k)[:, :, :, 0], self.cut(v)
        self._sees = sees
        self._set_decays(g, first, last, passes)

    def _set_decays(self, g, first: torch.Tensor, last: torch.Tensor, passes: torch.Tensor) -> None:
        """What decays from each block's begin to its tokens, from them to its end, and in all of it."""
        self._g = self.cut(g[..., None])[..., 0]
        c, never = self._g.cumsum(-1), float("-inf")
        behind = F.pad(_from_each_on(self._g.masked_fill(~last, 0.0), -1)[..., 1:], (0, 1))
        # masked before exp: in another document decays may be far beyond what its result can hold
        self._into = c.masked_fill(~first, never).exp()
        self._out = behind.masked_fill(~last, never).exp()
        self.decay = c[..., -1].exp() * passes

    # -- shapes ------------------------------------------------------------------------------------------------------

    def cut(self, x_BTnf: torch.Tensor, *, masked: bool = False) -> torch.Tensor:
        """(B, T, n, f) as (B, Z, K, n / K, C, f), filled up with 0; `masked`: 0 at padding."""
        b, x = self._blocks, x_BTnf.to(self._dtype)
        x = x * self._true if masked and self._true is not None else x
        x = x.unflatten(1, (b.chunks, b.chunk_len))
        fill = b.per_chunk * b.size - b.chunk_len
        x = F.pad(x, (0, 0, 0, 0, 0, fill)) if fill else x
        x = x.reshape(x.shape[0], -1, b.size, *x.shape[3:]).transpose(2, 3)
        return x.unflatten(2, (self._groups, -1))

    def back(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The inverse of `cut`, as (B, T, n, f); 0 at padding."""
        b = self._blocks
        x = x.flatten(2, 3).transpose(2, 3)
        x = x.reshape(x.shape[0], b.chunks, -1, *x.shape[3:])[:, :, : b.chunk_len].flatten(1, 2)
        return (x if self._true is None else x * self._true).to(dtype)

    def by_chunk(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Z, ...) as (B, M, blocks of a chunk, ...)."""
        return x.unflatten(1, (self._blocks.chunks, self._blocks.per_chunk))

    # -- forward -----------------------------------------------------------------------------------------------------

    def ends(self) -> torch.Tensor:
        """Each block's state at its end if it began with 0: (B, Z, K, R, P, H)."""
        return torch.einsum("bzkcp,bzkrch->bzkrph", self._k, self._v * self._out[..., None])

    def _tiles(self) -> list[slice]:
        """Blocks whose scores exist at a time."""
        count = self._q.shape[1]
        size = -(-count // TILES)
        return [slice(at, min(at + size, count)) for at in range(0, count, size)]

    def _weights(self, z: slice) -> torch.Tensor:
        """exp of the decays from each token to those behind it, in some blocks: (B, z, K, R, C, C)."""
        g, sees = self._g[:, z], self._sees if len(self._sees) == 1 else self._sees[z]
        # sums, not differences of two sums, which would lose digits where decays are strong
        gaps = g[..., :, None].masked_fill(~sees.tril(-1), 0.0).cumsum(-2)
        return gaps.masked_fill_(~sees, float("-inf")).exp_()

    def inside(self) -> torch.Tensor:
        """What tokens have of their own block: (B, Z, K, R, C, H)."""
        parts = []
        for z in self._tiles():
            scores = self._q[:, z] @ self._k[:, z].transpose(-1, -2)
            parts.append((scores[:, :, :, None] * self._weights(z)) @ self._v[:, z])
        return torch.cat(parts, 1)

    def from_states(self, states: torch.Tensor) -> torch.Tensor:
        """What tokens have of the state that enters their block: (B, Z, K, R, C, H)."""
        return torch.einsum("bzkcp,bzkrph->bzkrch", self._q, states) * self._into[..., None]

    def entered(self, states: torch.Tensor, entering: torch.Tensor | None) -> torch.Tensor:
        """The state that enters each block, (B, Z, ...), where chunks begin with `entering` (B, M, ...) and not with 0."""
        if entering is None:
            return states.flatten(1, 2)
        decay = self.by_chunk(self.decay)
        left = torch.cat((torch.ones_like(decay[:, :, :1]), decay[:, :, :-1]), 2).cumprod(2)
        return (states + of_states(left, states) * entering[:, :, None]).flatten(1, 2)

    # -- backward ----------------------------------------------------------------------------------------------------

    def states_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of the state that enters each block, by this block's tokens alone."""
        return torch.einsum("bzkcp,bzkrch->bzkrph", self._q, dy * self._into[..., None])

    def left(self, leaving: torch.Tensor, behind: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the state that leaves each block, (B, Z, ...), with that of what leaves chunks (B, M, ...)."""
        if behind is None:
            return leaving.flatten(1, 2)
        decay = self.by_chunk(self.decay)
        rest = torch.cat((decay[:, :, 1:], torch.ones_like(decay[:, :, :1])), 2).flip(2).cumprod(2).flip(2)
        return (leaving + of_states(rest, leaving) * behind[:, :, None]).flatten(1, 2)

    def inside_gradients(self, dy: torch.Tensor) -> Inside:
        """Gradients by what tokens have of their own block."""
        dq, dk, dv, dg = zip(*(self._tile_gradients(z, dy[:, z]) for z in self._tiles()), strict=True)
        return torch.cat(dq, 1), torch.cat(dk, 1), torch.cat(dv, 1), torch.cat(dg, 1)

    def _tile_gradients(self, z: slice, dy: torch.Tensor) -> Inside:
        q, k, v, weights = self._q[:, z], self._k[:, z], self._v[:, z], self._weights(z)
        attended, dscores = (q @ k.transpose(-1, -2))[:, :, :, None] * weights, dy @ v.transpose(-1, -2)
        dv = attended.transpose(-1, -2) @ dy
        dg = _from_each_on(attended * dscores, -2).tril(-1).sum(-1)
        dscores = (dscores * weights).sum(3)
        return dscores @ k, dscores.transpose(-1, -2) @ q, dv, dg

    def gradients(
        self, dy: torch.Tensor, states: torch.Tensor, leaving: torch.Tensor, inside: Inside
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """All gradients, in the shapes that `back` takes."""
        dq, dk, dv, dg = inside
        dy_into, v_out = dy * self._into[..., None], self._v * self._out[..., None]
        dq = dq + torch.einsum("bzkrch,bzkrph->bzkcp", dy_into, states)
        dk = dk + torch.einsum("bzkrch,bzkrph->bzkcp", v_out, leaving)
        dv_out = torch.einsum("bzkcp,bzkrph->bzkrch", self._k, leaving)
        read = (dy_into * torch.einsum("bzkcp,bzkrph->bzkrch", self._q, states)).sum(-1)
        written = (dv_out * v_out).sum(-1)
        passed = self.decay * (states * leaving).sum((-1, -2))
        dg = dg + _from_each_on(read, -1) + F.pad(written.cumsum(-1)[..., :-1], (1, 0)) + passed[..., None]
        dv = dv + dv_out * self._out[..., None]
        return dq[:, :, :, None], dk[:, :, :, None], dv, dg[..., None]


def _from_each_on(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum of each element and all behind it along `dim`."""
    return x.flip(dim).cumsum(dim).flip(dim)
