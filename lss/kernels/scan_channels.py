"""Recurrences whose heads have a decay for each row of their state, by blocks of tokens, forward and backward.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,    y_t = q_t S_t

with g_t of P numbers a head: gated linear attention (Yang et al. 2024), and Mamba's diagonal states. In a block

    y_i = sum_{j <= i} (sum_p q_ip k_jp exp(c_ip - c_jp)) v_j + (q_i exp(c_i)) h

Split into q_i exp(c_i) and k_j exp(-c_j), as products of matrices would have it, the second overflows where decays are
strong. Here every exp is of a sum of the g between j and i, never of more than decays: C P of them for each token and head,
so blocks are shorter than those of one decay a head.

The gradient of g is of each channel what `lss.kernels.scan_blocks` has for all of them.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lss.kernels.scan_blocks import Inside, ScanWork

# Tokens of a block, and numbers of a tile of blocks: of what decays between each two tokens in each channel.
CHANNEL_BLOCK = 16
TILE = 1 << 22


class ChannelWork(ScanWork):
    """As `ScanWork`, with decays (B, Z, K, R, P) of blocks."""

    def _set_decays(self, g, first: torch.Tensor, last: torch.Tensor, passes: torch.Tensor) -> None:
        self._g = self.cut(g)
        c, never = self._g.cumsum(-2), float("-inf")
        behind = F.pad(_from_each_on(self._g.masked_fill(~last[..., None], 0.0), -2)[..., 1:, :], (0, 0, 0, 1))
        into = c.masked_fill(~first[..., None], never).exp()
        out = behind.masked_fill(~last[..., None], never).exp()
        self._into, self._out = into, out
        self._q_into, self._k_out = self._q[:, :, :, None] * into, self._k[:, :, :, None] * out
        self.decay = c[..., -1, :].exp() * passes[..., None]

    # -- forward -----------------------------------------------------------------------------------------------------

    def ends(self) -> torch.Tensor:
        """Each block's state at its end if it began with 0: (B, Z, K, R, P, H)."""
        return self._k_out.transpose(-1, -2) @ self._v

    def _tiles(self) -> list[slice]:
        """Blocks whose decays between each two tokens exist at a time."""
        B, count, K, R, C, P = self._g.shape
        size = max(1, TILE // (B * K * R * C * C * P))
        return [slice(at, min(at + size, count)) for at in range(0, count, size)]

    def _weights(self, z: slice) -> torch.Tensor:
        """exp of the decays from each token to those behind it, in some blocks: (B, z, K, R, C, C, P)."""
        sees = (self._sees if len(self._sees) == 1 else self._sees[z])[..., None]
        earlier = sees & torch.ones(sees.shape[-3:-1], dtype=torch.bool, device=sees.device).tril(-1)[..., None]
        gaps = self._g[:, z, :, :, :, None].masked_fill(~earlier, 0.0).cumsum(-3)
        return gaps.masked_fill_(~sees, float("-inf")).exp_()

    def inside(self) -> torch.Tensor:
        """What tokens have of their own block: (B, Z, K, R, C, H)."""
        parts = []
        for z in self._tiles():
            q, k = self._q[:, z, :, None, :, None], self._k[:, z, :, None, None]
            parts.append((self._weights(z) * q * k).sum(-1) @ self._v[:, z])
        return torch.cat(parts, 1)

    def from_states(self, states: torch.Tensor) -> torch.Tensor:
        """What tokens have of the state that enters their block: (B, Z, K, R, C, H)."""
        return self._q_into @ states

    # -- backward ----------------------------------------------------------------------------------------------------

    def states_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of the state that enters each block, by this block's tokens alone."""
        return self._q_into.transpose(-1, -2) @ dy

    def _tile_gradients(self, z: slice, dy: torch.Tensor) -> Inside:
        q, k, v, weights = self._q[:, z, :, None, :, None], self._k[:, z, :, None, None], self._v[:, z], self._weights(z)
        dv = (weights * q * k).sum(-1).transpose(-1, -2) @ dy
        weights *= (dy @ v.transpose(-1, -2))[..., None]
        of_q, of_k = weights * k, weights * q
        dq, dk = of_q.sum((3, -2)), of_k.sum((3, -3))
        earlier = torch.ones(q.shape[4], q.shape[4], dtype=torch.bool, device=q.device).tril(-1)[..., None]
        dg = _from_each_on(of_q * q, -3).masked_fill_(~earlier, 0.0).sum(-2)
        return dq, dk, dv, dg

    def gradients(
        self, dy: torch.Tensor, states: torch.Tensor, leaving: torch.Tensor, inside: Inside
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """All gradients, in the shapes that `back` takes."""
        dq, dk, dv, dg = inside
        dq_into, dk_out = dy @ states.transpose(-1, -2), self._v @ leaving.transpose(-1, -2)
        read, written = dq_into * self._q_into, dk_out * self._k_out
        passed = self.decay * (states * leaving).sum(-1)
        dg = dg + _from_each_on(read, -2) + F.pad(written.cumsum(-2)[..., :-1, :], (0, 0, 1, 0)) + passed[..., None, :]
        dq, dk = dq + (dq_into * self._into).sum(3), dk + (dk_out * self._out).sum(3)
        return dq[:, :, :, None], dk[:, :, :, None], dv + self._k_out @ leaving, dg


def _from_each_on(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum of each element and all behind it along `dim`."""
    return x.flip(dim).cumsum(dim).flip(dim)
