"""Layers that carry a state: Mamba-2's state-space mixer, and SPADE's, which stands beside attention.

Mamba-2 (Dao and Gu 2024, "Transformers are SSMs"): projections of a token give z, x, b, c and a step dt a head; x, b and c
pass a short causal convolution and silu. A head's state S (P x H) then goes

    S_t = exp(-dt_t exp(A)) S_{t-1} + b_t (dt_t x_t)^T,    y_t = c_t S_t + skip x_t,    out = W_o norm(y_t silu(z_t))

SPADE (Zuo et al. 2022, "Efficient Long Sequence Modeling via State Space Augmented Transformer") has a state-space layer at
its bottom for the far past, beside attention that sees the near. What joins the two is ours, of their outputs' norms: one
projection of both, W_o (norm(attention), norm(y silu(z))).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from lss.config import ModelConfig
from lss.config.hybrid import scan_width
from lss.model.layers import Attention, Before, ConvOp, Rotation, Shared, normed, queries_keys_values

# c, b (B,T,K,P), dt x (B,T,N,H), log decay (B,T,N), x (B,T,N,H), z (B,T,N H)
Scanned = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# steps dt that heads begin with, from the shortest to the longest, and decays exp(A)
SHORTEST, LONGEST, FASTEST = 1e-3, 1e-1, 16.0


class NormedOut(nn.Module):
    """W_o of the norms of several outputs that stand behind one another: (B, T, sum of widths) -> (B, T, D)."""

    def __init__(self, widths: tuple[int, ...], d_model: int) -> None:
        super().__init__()
        self.widths = widths
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for width in widths)
        self.o_proj = nn.Linear(sum(widths), d_model, bias=False)

    def forward(self, x_BTW: torch.Tensor) -> torch.Tensor:
        """The projection."""
        parts = zip(self.norms, x_BTW.split(self.widths, -1), strict=True)
        return self.o_proj(torch.cat([normed(norm, part) for norm, part in parts], -1))


class Scan(nn.Module):
    """Mamba-2's mixer, without its projection back unless it stands alone.

    Args:
        layer: its number among all blocks of the model.
        alone: whether `out` is its own.
    """

    by_token = False  # the convolution looks back

    def __init__(self, config: ModelConfig, layer: int, alone: bool = True) -> None:
        super().__init__()
        self.layer, self.heads, self.groups, self.width = layer, config.scan_heads, config.scan_groups, scan_width(config)
        self.state = config.scan_groups * config.scan_state
        mixed = self.width + 2 * self.state
        self.in_proj = nn.Linear(config.d_model, self.width + mixed + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(mixed, config.conv_width))
        self.conv_bias = nn.Parameter(torch.zeros(mixed))
        # heads from slow to fast, that which remembers longest first
        steps = torch.linspace(math.log(SHORTEST), math.log(LONGEST), self.heads).exp()
        self.dt_bias = nn.Parameter(steps + (-(-steps).expm1()).log())  # the inverse of softplus
        self.decay_log = nn.Parameter(torch.linspace(1.0, FASTEST, self.heads).log())
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.normed_out = NormedOut((self.width,), config.d_model) if alone else None

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """What stands before the recurrence, all but its convolution's numbers."""
        return (self.in_proj,)

    @property
    def out(self) -> nn.Module:
        """The projection back into the residual stream."""
        assert self.normed_out is not None
        return self.normed_out

    def before(self, norm: nn.Module, shared: Shared, of_keys: Rotation) -> Before:
        """What stands before the recurrence; it has no positions to rotate."""
        return lambda x_BTD, _tokens: self.projected(normed(norm, x_BTD), shared.ops.conv)

    def projected(self, x_BTD: torch.Tensor, conv: ConvOp) -> Scanned:
        """Projections and convolution of what has been normalised."""
        z, mixed, dt = self.in_proj(x_BTD).split((self.width, self.width + 2 * self.state, self.heads), -1)
        mixed = F.silu(conv(mixed, self.conv_weight) + self.conv_bias.to(mixed.dtype))
        x, b, c = mixed.split((self.width, self.state, self.state), -1)
        x = x.unflatten(-1, (self.heads, -1))
        b, c = (part.unflatten(-1, (self.groups, -1)) for part in (b, c))
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        return c, b, (x * dt[..., None]).to(x.dtype), -dt * self.decay_log.to(wide).exp(), x, z

    def forward(self, c, b, v, log_decay, x, z, shared: Shared) -> torch.Tensor:
        """The recurrence, what skips it, and the gate: (B, T, 1, width)."""
        y = shared.ops.scan(c, b, v, log_decay)
        y = (y + self.skip.to(y.dtype)[:, None] * x).flatten(-2)
        return (y * F.silu(z))[:, :, None]


class Beside(nn.Module):
    """SPADE's bottom layer: attention and a scan of the same tokens."""

    by_token = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention = Attention(config, layer, alone=False)
        self.scan = Scan(config, layer, alone=False)
        self.out = NormedOut((config.d_model, self.scan.width), config.d_model)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """What stands before both, all but the convolution's numbers."""
        return (*self.attention.projections, *self.scan.projections)

    def before(self, norm: nn.Module, shared: Shared, of_keys: Rotation) -> Before:
        """What stands before both."""

        def both(x_BTD: torch.Tensor, _tokens: slice) -> tuple[torch.Tensor, ...]:
            qkv = queries_keys_values(norm, self.attention, None, shared.rotation, of_keys, x_BTD)
            return *qkv, *self.scan.projected(normed(norm, x_BTD), shared.ops.conv)

        return both

    def forward(self, q, k, v, *scanned: torch.Tensor, shared: Shared) -> torch.Tensor:
        """Both outputs behind one another: (B, T, 1, D + width)."""
        a_BTNH = self.attention(q, k, v, shared)
        return torch.cat((a_BTNH.flatten(-2)[:, :, None], self.scan(*scanned, shared=shared)), -1)
