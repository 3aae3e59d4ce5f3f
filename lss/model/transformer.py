"""The reference decoder: embedding, blocks of attention and MLP, logits, loss.

It computes on whatever tokens it is given, at the positions it is told. The few places where a cut sequence or cut
weights need something else than local arithmetic are the fields of `ModelOps`; `lss.parallelize` fills them in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lss.config import ModelConfig
from lss.config.errors import refuse
from lss.kernels import single_attention
from lss.kernels.dropout import fold, keyed_dropout


def _look_up_positions(table_SD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    if len(positions_T) > len(table_SD):
        raise refuse("input_ids", f"{len(positions_T)} tokens", f"the position table has {len(table_SD)} rows")
    return table_SD[positions_T]


def _mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None) -> torch.Tensor:
    """Sum of the losses over the number of counted labels (or `count`), in at least float32; 0 where none counts."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(logits.flatten(0, -2).to(dtype), labels.flatten(), reduction="sum")
    counted = (labels != -100).sum() if count is None else torch.as_tensor(count, device=labels.device)
    return total / counted.clamp(min=1)


@dataclass(frozen=True)
class ModelOps:
    """What a parallel layout replaces in the model.

    Attributes:
        attention: (q (B,T,N,H), k, v (B,T,K,H)) -> (B,T,N,H), causal.
        loss: (logits (B,T,V), shifted labels (B,T), count or None) -> scalar.
        positions: (T,) -> positions of the tokens that attention computes on.
        position_rows: (table, positions (T,)) -> rows (T, D) of a learned table.
        enter, leave: around attention and MLP, on (B,T,D): identities, or the gather and the scatter of tensor
            parallelism.
        block: runs one block; a place for activation checkpointing.
    """

    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = single_attention
    loss: Callable[[torch.Tensor, torch.Tensor, int | torch.Tensor | None], torch.Tensor] = _mean_cross_entropy
    positions: Callable[[torch.Tensor], torch.Tensor] = lambda positions: positions
    position_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _look_up_positions
    enter: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    leave: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    block: Callable[..., torch.Tensor] = lambda block, *args: block(*args)


@dataclass(frozen=True)
class ModelOutput:
    """`loss` (None without labels) is global and equal on every rank; `logits` (B, T, V) are this rank's tokens'."""

    loss: torch.Tensor | None
    logits: torch.Tensor


@dataclass(frozen=True)
class _Pass:
    """What every layer of one forward pass shares."""

    ops: ModelOps
    cos_TH: torch.Tensor | None
    sin_TH: torch.Tensor | None
    drop: Callable[[torch.Tensor, int], torch.Tensor]


class Attention(nn.Module):
    """Grouped-query attention: `n_heads` query heads share `n_kv_heads` key and value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.d_model // config.n_heads
        kv_width = config.n_kv_heads * self.head_size
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_BTD: torch.Tensor, shared: _Pass) -> torch.Tensor:
        # the number of heads comes from the weights, which tensor parallelism cuts
        q, k, v = (proj(x_BTD).unflatten(-1, (-1, self.head_size)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if shared.cos_TH is not None and shared.sin_TH is not None:
            q, k = (_rotate(x, shared.cos_TH, shared.sin_TH) for x in (q, k))
        return self.o_proj(shared.ops.attention(q, k, v).flatten(-2))


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
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: torch.Tensor, shared: _Pass) -> torch.Tensor:
        ops = shared.ops
        attended = ops.leave(self.attention(ops.enter(self.attention_norm(x_BTD)), shared))
        x_BTD = x_BTD + shared.drop(attended, 2 * self.layer + 1)
        hidden = ops.leave(self.mlp(ops.enter(self.mlp_norm(x_BTD))))
        return x_BTD + shared.drop(hidden, 2 * self.layer + 2)


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: a resolved `ModelConfig`.
        seq_len: S, the rows of a learned position table; a model with RoPE takes any length.
        seed: of the initial weights, which depend on nothing else.
    """

    def __init__(self, config: ModelConfig, seq_len: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.seq_len, self.seed = config, seq_len, seed
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_table = nn.Embedding(seq_len, config.d_model) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = _norm(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.passes = 0
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw N(0, 0.02^2) weights; projections into the residual stream are scaled by 1 / sqrt(2 layers)."""
        if self.embedding.weight.is_meta:
            return  # a model without storage, for counting
        generator = torch.Generator().manual_seed(self.seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # norms start at 1 and 0
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 * ((2 * self.config.n_layers) ** -0.5 if into_residual else 1.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
        dropout_seed: int | None = None,
        ops: ModelOps | None = None,
    ) -> ModelOutput:
        """Compute logits and, with labels, the mean cross-entropy in nats.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, unshifted, -100 where not counted: each token's label is the next one.
            positions: (T,) int64, global; 0..T-1 by default.
            shift_labels: (B, T) labels already shifted, instead of `labels`.
            num_items_in_batch: the count to divide by, instead of the labels counted in this call.
            samples: (B,) int64, each row's number in the global batch, which keys dropout; 0..B-1 by default.
            dropout_seed: keys dropout of this pass; by default the model's seed and a count of training passes.
            ops: the parallel layout of this pass, from `lss.parallelize`; one device by default.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if labels is not None and shift_labels is None:
            shift_labels = shift(labels)
        ops = ops or ModelOps()
        shared = self._shared(input_ids, positions, samples, dropout_seed, ops)
        x_BTD = self.embedding(input_ids)
        if self.position_table is not None:
            x_BTD = x_BTD + ops.position_rows(self.position_table.weight, positions)
        x_BTD = shared.drop(x_BTD, 0)
        for block in self.blocks:
            x_BTD = ops.block(block, x_BTD, shared)
        x_BTD = self.final_norm(x_BTD)
        logits = F.linear(x_BTD, self.embedding.weight if self.lm_head is None else self.lm_head.weight)
        loss = None if shift_labels is None else ops.loss(logits, shift_labels, num_items_in_batch)
        return ModelOutput(loss, logits)

    def _shared(self, input_ids, positions, samples, dropout_seed, ops: ModelOps) -> _Pass:
        p = self.config.dropout if self.training else 0.0
        if self.training:
            # counted, so that ranks agree on the seed of a pass without talking
            self.passes += 1
        seed = fold(self.seed, self.passes) if dropout_seed is None else dropout_seed
        if samples is None:
            samples = torch.arange(input_ids.shape[0], device=input_ids.device)

        def drop(x_BTD: torch.Tensor, place: int) -> torch.Tensor:
            if p == 0.0:
                return x_BTD
            return keyed_dropout(x_BTD, p, seed=fold(seed, place), samples_B=samples, positions_T=positions)

        cos, sin = None, None
        if self.config.positions == "rope":
            dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
            cos, sin = _rope(ops.positions(positions), self.config, dtype)
        return _Pass(ops, cos, sin, drop)


def shift(labels_BS: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Labels of a whole sequence, shifted: each token's label is the next token's; the last has none."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=ignore_index)


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=1e-5)
    return nn.LayerNorm(config.d_model, eps=1e-5)


def _rope(positions_T: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, H/2) of position * theta^(-2i/H) (Su et al. 2021).

    Angles are computed in float64: at a million tokens float32 positions times frequencies are off by 0.03 radians.
    """
    H = config.d_model // config.n_heads
    frequency = config.rope_theta ** -(torch.arange(0, H, 2, dtype=torch.float64, device=positions_T.device) / H)
    angle = positions_T.double()[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x_BTNH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + H/2), the layout of Hugging Face's Llama weights; in the tables' dtype, returned in x's."""
    first, second = x_BTNH.to(cos_TH.dtype).chunk(2, dim=-1)
    cos, sin = cos_TH[:, None], sin_TH[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)

