"""The parts of the reference model: attention, MLP, blocks, rotary positions, and what every layer of a pass shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional as F

from lss.config import ModelConfig
from lss.config.errors import refuse
from lss.kernels import Rules, single_attention
from lss.kernels.dropout import fold

# (q (B,T,N,H), k, v (B,T,K,H), rules) -> (B,T,N,H)
AttentionOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rules], torch.Tensor]
# places in a layer that draw dropout, so that no two share their numbers
EMBEDDING, SELF_ATTENTION, CROSS_ATTENTION, MLP_OUT, PROBABILITIES, CROSS_PROBABILITIES = range(6)


def look_up_positions(table_SD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Rows of a whole position table; (T, D)."""
    if len(positions_T) and int(positions_T.max()) >= len(table_SD):
        fit = f"the position table has {len(table_SD)} rows"
        raise refuse("input_ids", f"position {int(positions_T.max())}", fit)
    return table_SD[positions_T]


def mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None) -> torch.Tensor:
    """Sum of the losses over the number of counted labels (or `count`), in at least float32; 0 where none counts."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(logits.flatten(0, -2).to(dtype), labels.flatten(), reduction="sum")
    counted = (labels != -100).sum() if count is None else torch.as_tensor(count, device=labels.device)
    return total / counted.clamp(min=1)


@dataclass(frozen=True)
class ModelOps:
    """What a parallel layout replaces in the model.

    Attributes:
        attention: self-attention of the text (or of an encoder's only sequence), by rules.
        source_attention, cross_attention: an encoder-decoder's self-attention of its source, and of text to source.
        loss: (logits (B,T,V), labels (B,T), count or None) -> scalar.
        positions: (T,) -> positions of the tokens that attention computes on.
        position_rows: (table, positions (T,)) -> rows (T, D) of the text's learned table.
        enter, leave: around attention and MLP, on (B,T,D): identities, or the gather and the scatter of tensor
            parallelism.
        block: runs one block; a place for activation checkpointing.
    """

    attention: AttentionOp = single_attention
    source_attention: AttentionOp = single_attention
    cross_attention: AttentionOp = single_attention
    loss: Callable[[torch.Tensor, torch.Tensor, int | torch.Tensor | None], torch.Tensor] = mean_cross_entropy
    positions: Callable[[torch.Tensor], torch.Tensor] = lambda positions: positions
    position_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = look_up_positions
    enter: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    leave: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    block: Callable[..., torch.Tensor] = lambda block, *args: block(*args)


@dataclass(frozen=True)
class Shared:
    """What every layer of one stack shares in one forward pass.

    `attend` computes its self-attention by `rules`, the layout's cross-attention that to `memory` by `cross_rules`, with
    each layer's own window, sinks and dropout seed; `drop(x, layer, place)` is dropout of activations; rotations are
    (cos, sin) of the tokens' positions, and of the source's positions in the text.
    """

    ops: ModelOps
    attend: AttentionOp
    rules: Rules
    drop: Callable[[torch.Tensor, int, int], torch.Tensor]
    seed: int
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    source_rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    cross_rules: Rules = field(default_factory=Rules)


class Attention(nn.Module):
    """Grouped-query attention: `n_heads` query heads share `n_kv_heads` key and value heads.

    Args:
        layer: its number among all blocks of the model, which picks its window and keys its dropout.
        cross: keys and values come from another sequence; then there are no windows, and rotary positions only where the
            source's tokens are given places in the text.
    """

    def __init__(self, config: ModelConfig, layer: int, cross: bool = False) -> None:
        super().__init__()
        self.head_size = config.d_model // config.n_heads
        self.layer, self.cross = layer, cross
        self.window = None if cross else config.window_of(layer)
        kv_width = config.n_kv_heads * self.head_size
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.sinks = nn.Parameter(torch.zeros(config.n_heads)) if config.sinks else None

    def forward(self, x_BTD: torch.Tensor, shared: Shared, memory_BSD: torch.Tensor | None = None) -> torch.Tensor:
        source = x_BTD if memory_BSD is None else memory_BSD
        # the number of heads comes from the weights, which tensor parallelism cuts
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_size))
            for proj, x in ((self.q_proj, x_BTD), (self.k_proj, source), (self.v_proj, source))
        )
        of_keys = shared.source_rotation if self.cross else shared.rotation
        if shared.rotation is not None and of_keys is not None:
            q, k = rotate(q, *shared.rotation), rotate(k, *of_keys)
        attend, rules = (shared.ops.cross_attention, shared.cross_rules) if self.cross else (shared.attend, shared.rules)
        if rules.dropout_p:
            place = CROSS_PROBABILITIES if self.cross else PROBABILITIES
            rules = replace(rules, seed=fold(shared.seed, self.layer, place))
        rules = replace(rules, window=self.window, sinks=self.sinks)
        return self.o_proj(attend(q, k, v, rules).flatten(-2))


class MLP(nn.Module):
    """SwiGLU, W_down(silu(W_gate x) * W_up x), or GELU, W_down(gelu(W_up x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=False) if config.mlp == "swiglu" else None
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x_BTD)
        hidden = F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x_BTD)) * up
        return self.down_proj(hidden)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), with `cross` x + attention to memory(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, cross: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.cross_norm = make_norm(config) if cross else None
        self.cross_attention = Attention(config, layer, cross=True) if cross else None
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: torch.Tensor, shared: Shared, memory_BSD: torch.Tensor | None = None) -> torch.Tensor:
        ops = shared.ops
        attended = ops.leave(self.attention(ops.enter(self.attention_norm(x_BTD)), shared))
        x_BTD = x_BTD + shared.drop(attended, self.layer, SELF_ATTENTION)
        if self.cross_attention is not None and self.cross_norm is not None:
            attended = self.cross_attention(self.cross_norm(x_BTD), shared, memory_BSD)
            x_BTD = x_BTD + shared.drop(attended, self.layer, CROSS_ATTENTION)
        hidden = ops.leave(self.mlp(ops.enter(self.mlp_norm(x_BTD))))
        return x_BTD + shared.drop(hidden, self.layer, MLP_OUT)


def make_norm(config: ModelConfig) -> nn.Module:
    """The config's normalisation over D."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=1e-5)
    return nn.LayerNorm(config.d_model, eps=1e-5)


def alibi_slopes(n_heads: int) -> torch.Tensor:
    """A slope a head (N,), float64: 2^(-8 i / n), i = 1..n, for n a power of 2 (Press et al. 2022).

    For other numbers of heads, as there: those of the power of 2 below, then every other one of the power above.
    """
    below = 1 << (n_heads.bit_length() - 1)

    def of(n: int) -> list[float]:
        return [2.0 ** (-8 * i / n) for i in range(1, n + 1)]

    return torch.tensor(of(below) + of(2 * below)[::2][: n_heads - below], dtype=torch.float64)


def rope(positions_T: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, H/2) of position * theta^(-2i/H) (Su et al. 2021).

    Angles are computed in float64: at a million tokens float32 positions times frequencies are off by 0.03 radians.
    """
    H = config.d_model // config.n_heads
    frequency = config.rope_theta ** -(torch.arange(0, H, 2, dtype=torch.float64, device=positions_T.device) / H)
    angle = positions_T.double()[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BTNH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + H/2), the layout of Hugging Face's Llama weights; in the tables' dtype, returned in x's."""
    first, second = x_BTNH.to(cos_TH.dtype).chunk(2, dim=-1)
    cos, sin = cos_TH[:, None], sin_TH[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)
