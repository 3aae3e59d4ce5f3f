"""The parts of the reference model: attention, MLP, rotary positions, and what every layer of a pass shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lss.config import ModelConfig
from lss.config.errors import refuse
from lss.kernels import Rules, single_attention
from lss.kernels.conv import single_conv
from lss.kernels.dropout import fold
from lss.kernels.scan import single_scan
from lss.tiled import linear_cross_entropy_sum

# (q (B,T,N,H), k, v (B,T,K,H), rules) -> (B,T,N,H)
AttentionOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rules], torch.Tensor]
# (hidden states (B,T,D), weight (V,D), labels (B,T), count or None) -> scalar
LossOp = Callable[..., torch.Tensor]
# (x (B,T,C), weight (C,W)) -> (B,T,C)
ConvOp = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (q, k (B,T,K,P), v (B,T,N,H), log decay (B,T,N)) -> (B,T,N,H)
ScanOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# (inputs, the slice of tokens that they are) -> what a block's mixer of tokens is given, as many tensors as it takes
Before = Callable[..., tuple[torch.Tensor, ...]]
Rotation = tuple[torch.Tensor, torch.Tensor] | None
# places in a layer that draw dropout, so that no two share their numbers
EMBEDDING, SELF_ATTENTION, CROSS_ATTENTION, MLP_OUT, PROBABILITIES, CROSS_PROBABILITIES = range(6)


def look_up_positions(table_SD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Rows of a whole position table; (T, D)."""
    if len(positions_T) and int(positions_T.max()) >= len(table_SD):
        fit = f"the position table has {len(table_SD)} rows"
        raise refuse("input_ids", f"position {int(positions_T.max())}", fit)
    return table_SD[positions_T]


def mean_cross_entropy(
    x_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor, count: int | torch.Tensor | None
) -> torch.Tensor:
    """Sum of the losses over the number of counted labels (or `count`), in at least float32; 0 where none counts."""
    total = linear_cross_entropy_sum(x_BTD.flatten(0, 1), weight_VD, labels_BT.flatten())
    counted = (labels_BT != -100).sum() if count is None else torch.as_tensor(count, device=labels_BT.device)
    return total / counted.clamp(min=1)


class Pieces:
    """How a block's pieces are run: one after another, keeping what autograd keeps. A place for checkpointing."""

    def compiled(self, function: Callable) -> Callable:
        """The function that computes what this one does."""
        return function

    def attended(
        self, layer: int, before: Before, parameters: Sequence[torch.Tensor], attend: Callable[..., torch.Tensor],
        *inputs: Any, by_token: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        """attend(*before(*inputs, slice(None))) in the block of this number; `before` uses these parameters.

        `by_token`: whether `before` looks at each token alone, and can be given some of them.
        """
        return attend(*before(*inputs, slice(None)))

    def after(
        self, layer: int, piece: Callable[..., torch.Tensor], parameters: Sequence[torch.Tensor], x: torch.Tensor,
        a: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """piece(x, a, slice(None)), which uses these parameters: what follows an attention whose output is `a`."""
        return piece(x, a, slice(None))

    def stand_for(self, before: int) -> None:
        """In a trace of a sequence that stands for a longer one: nothing, where there are no tiles."""

    def alone(
        self, piece: Callable[..., torch.Tensor], parameters: Sequence[torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """piece(x, slice(None)), which uses these parameters: what stands behind all blocks."""
        return piece(x, slice(None))


@dataclass(frozen=True)
class ModelOps:
    """What a parallel layout replaces in the model.

    Attributes:
        attention: self-attention of the text (or of an encoder's only sequence), by rules.
        source_attention, cross_attention: an encoder-decoder's self-attention of its source, and of text to source.
        scan, conv: the recurrence and the convolution of layers that carry a state.
        loss: (hidden states (B,T,D), weight (V,D), labels (B,T), count or None) -> scalar.
        positions: (T,) -> positions of the tokens that attention computes on.
        position_rows: (table, positions (T,)) -> rows (T, D) of the text's learned table.
        enter, leave: around attention and MLP, on (B,T,D): the gather and the scatter of tensor parallelism, or nothing.
        pieces: how the pieces of a block are run.
    """

    attention: AttentionOp = single_attention
    source_attention: AttentionOp = single_attention
    cross_attention: AttentionOp = single_attention
    scan: ScanOp = single_scan
    conv: ConvOp = single_conv
    loss: LossOp = mean_cross_entropy
    positions: Callable[[torch.Tensor], torch.Tensor] = lambda positions: positions
    position_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = look_up_positions
    enter: Callable[[torch.Tensor], torch.Tensor] | None = None
    leave: Callable[[torch.Tensor], torch.Tensor] | None = None
    pieces: Pieces = field(default_factory=Pieces)


@dataclass(frozen=True)
class Shared:
    """What every layer of one stack shares in one forward pass.

    `attend` computes its self-attention by `rules`, the layout's cross-attention that to `memory` by `cross_rules`, with
    each layer's own window, sinks and dropout seed; `drop(x, layer, place, tokens)` is dropout of activations of a slice of
    the tokens, None where there is none; rotations are (cos, sin) of the tokens' positions, and of the source's positions
    in the text.
    """

    ops: ModelOps
    attend: AttentionOp
    rules: Rules
    drop: Callable[..., torch.Tensor] | None
    seed: int
    rotation: Rotation = None
    source_rotation: Rotation = None
    cross_rules: Rules = field(default_factory=Rules)


class Attention(nn.Module):
    """Grouped-query attention: `n_heads` query heads share `n_kv_heads` key and value heads.

    Args:
        layer: its number among all blocks of the model, which picks its window and keys its dropout.
        cross: keys and values come from another sequence; then there are no windows, and rotary positions only where the
            source's tokens are given places in the text.
        alone: whether the projection back, `out`, is its own.

    Attributes:
        by_token: whether what `before` makes of a token depends on that token only.
    """

    by_token = True

    def __init__(self, config: ModelConfig, layer: int, cross: bool = False, alone: bool = True) -> None:
        super().__init__()
        self.head_size = config.d_model // config.n_heads
        self.layer, self.cross = layer, cross
        self.window = None if cross else config.window_of(layer)
        kv_width = config.n_kv_heads * self.head_size
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False) if alone else None
        self.sinks = nn.Parameter(torch.zeros(config.n_heads)) if config.sinks else None

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """What makes queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def out(self) -> nn.Module:
        """The projection back into the residual stream."""
        assert self.o_proj is not None
        return self.o_proj

    def before(self, norm: nn.Module, shared: Shared, of_keys: Rotation) -> Before:
        """What stands before the attention, of the tokens (and of `memory`); `of_keys` are the rotations of keys."""
        project = shared.ops.pieces.compiled(queries_keys_values)

        def before(*given: Any) -> QKV:
            *xs, tokens = given
            rotations = (None if r is None else (r[0][tokens], r[1][tokens]) for r in (shared.rotation, of_keys))
            return project(norm, self, shared.ops.enter, *rotations, *xs)

        return before

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: Shared) -> torch.Tensor:
        """The attention itself, (B,T,N,H), by the rules of this layer; `queries_keys_values` gives its inputs."""
        attend, rules = (shared.ops.cross_attention, shared.cross_rules) if self.cross else (shared.attend, shared.rules)
        if rules.dropout_p:
            place = CROSS_PROBABILITIES if self.cross else PROBABILITIES
            rules = replace(rules, seed=fold(shared.seed, self.layer, place))
        return attend(q, k, v, replace(rules, window=self.window, sinks=self.sinks))


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


# -- the pieces: functions of tensors and modules, which know no layer, so that one compilation serves all layers ----------


def queries_keys_values(
    norm: nn.Module,
    attention: Attention,
    enter: Callable | None,
    rotation: Rotation,
    of_keys: Rotation,
    x_BTD: torch.Tensor,
    memory_BSD: torch.Tensor | None = None,
) -> QKV:
    """norm, projections (of keys and values from `memory` where given), rotary positions: what stands before attention."""
    x_BTD = normed(norm, x_BTD)
    x_BTD = x_BTD if enter is None else enter(x_BTD)
    source = x_BTD if memory_BSD is None else memory_BSD
    # the number of heads comes from the weights, which tensor parallelism cuts
    q, k, v = (
        proj(x).unflatten(-1, (-1, attention.head_size))
        for proj, x in ((attention.q_proj, x_BTD), (attention.k_proj, source), (attention.v_proj, source))
    )
    if rotation is not None and of_keys is not None:
        q, k = rotate(q, *rotation), rotate(k, *of_keys)
    return q, k, v


def after_attention(
    x_BTD: torch.Tensor,
    a_BTNH: torch.Tensor,
    modules: tuple[nn.Module, ...],
    drops: tuple[Callable, Callable] | None,
    enter: Callable | None,
    leave: Callable | None,
) -> torch.Tensor:
    """x + out(a), then, where `modules` holds a norm and an MLP behind out, x + mlp(norm(x))."""
    out, *norm_and_mlp = modules

    def added(x: torch.Tensor, y: torch.Tensor, number: int) -> torch.Tensor:
        y = y if leave is None else leave(y)
        return x + (y if drops is None else drops[number](y))

    x_BTD = added(x_BTD, out(a_BTNH.flatten(-2)), 0)
    if not norm_and_mlp:
        return x_BTD
    norm, mlp = norm_and_mlp
    hidden = normed(norm, x_BTD)
    return added(x_BTD, mlp(hidden if enter is None else enter(hidden)), 1)


def normed(norm: nn.Module, x_BTD: torch.Tensor) -> torch.Tensor:
    """norm(x), in the dtype of the norm's weights, returned in x's: before attention, MLP and logits."""
    dtype = next(norm.parameters()).dtype
    return norm(x_BTD) if x_BTD.dtype == dtype else norm(x_BTD.to(dtype)).to(x_BTD.dtype)


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
