"""The reference model: a decoder, an encoder, or both with attention between them.

It computes on whatever tokens it is given, at the positions it is told. The few places where a cut sequence or cut
weights need something else than local arithmetic are the fields of `ModelOps`; `lss.parallelize` fills them in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lss.config import ModelConfig
from lss.config.errors import refuse
from lss.config.hybrid import refuse_misfit_layers, scans
from lss.kernels import MaskMod, Rules, keep_rows, single_attention
from lss.kernels.conv import single_conv
from lss.kernels.dropout import fold, keyed_dropout
from lss.kernels.scan import single_scan
from lss.model.block import Block
from lss.model.layers import EMBEDDING, AttentionOp, ModelOps, Shared, alibi_slopes, make_norm, normed, rope
from lss.segment import make_segment
from lss.tiled import ambient_autocast, compute_dtype


@dataclass(frozen=True)
class ModelOutput:
    """`loss` (None without labels) is global and equal on every rank; `logits` (B, T, V) are this rank's tokens'.

    Logits are computed when they are first asked for, since the loss needs no more than a tile of them at a time; by the
    weights of the forward pass, so before these change. `hidden` (B, T, D) is what they are computed from.
    """

    loss: torch.Tensor | None
    hidden: torch.Tensor
    weight: torch.Tensor
    autocast: Callable[[], AbstractContextManager]
    version: int

    @cached_property
    def logits(self) -> torch.Tensor:
        """hidden W^T."""
        if self.weight._version != self.version:
            raise RuntimeError("logits: the weights have changed since the forward pass; ask for logits before the update.")
        with self.autocast():
            return F.linear(self.hidden, self.weight)


class Transformer(nn.Module):
    """A language model of one of three kinds.

    `decoder`: each token sees those before it and is to say the next. `encoder`: each sees all, and is to say what
    stands at its own place. `encoder_decoder`: a decoder that also sees an encoder's reading of a source.

    Args:
        config: a resolved `ModelConfig`.
        seq_len: S, the rows of a learned position table; a model without one takes any length.
        seed: of the initial weights, which depend on nothing else.
    """

    def __init__(self, config: ModelConfig, seq_len: int, seed: int = 0) -> None:
        super().__init__()
        refuse_misfit_layers(config, strategy="lss", prefix=0, plain=ModelConfig())
        self.config, self.seq_len, self.seed = config, seq_len, seed
        both, learned, n = config.kind == "encoder_decoder", config.positions == "learned", config.n_layers
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_table = nn.Embedding(seq_len, config.d_model) if learned else None
        self.source_position_table = nn.Embedding(seq_len, config.d_model) if both and learned else None
        self.source_blocks = nn.ModuleList(Block(config, n + layer) for layer in range(n)) if both else None
        self.source_norm = make_norm(config) if both else None
        self.blocks = nn.ModuleList(Block(config, layer, cross=both) for layer in range(n))
        self.final_norm = make_norm(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.passes = 0
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw N(0, 0.02^2) weights; projections into the residual stream are scaled by 1 / sqrt(2 layers).

        A scan's convolution is N(0, 1 / width), so that it hands on what is as large as what it is given.
        """
        if self.embedding.weight.is_meta:
            return  # a model without storage, for counting
        generator = torch.Generator().manual_seed(self.seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # norms start at 1 and 0, sinks at 0, and a scan's heads each at its own
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 * ((2 * self.config.n_layers) ** -0.5 if into_residual else 1.0)
            std = self.config.conv_width**-0.5 if name.endswith("conv_weight") else std
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
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prefix: int = 0,
        mask_mod: MaskMod | None = None,
        source_ids: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        source_places: torch.Tensor | None = None,
        source_positions: torch.Tensor | None = None,
        ops: ModelOps | None = None,
    ) -> ModelOutput:
        """Compute what logits come from and, with labels, the mean cross-entropy in nats.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, -100 where not counted. For decoders unshifted: each token's label is the next one,
                of its own document; for an encoder each token's own.
            positions: (T,) int64; by default 0..T-1, counted anew in each document.
            shift_labels: (B, T) labels as they are to be compared, instead of `labels`.
            num_items_in_batch: the count to divide by, instead of the labels counted in this call.
            samples: (B,) int64, each row's number in the global batch, which keys dropout; 0..B-1 by default.
            dropout_seed: keys dropout of this pass; by default the model's seed and a count of training passes.
            cu_seqlens: int32, borders of packed documents, of which none sees another; batch 1.
            attention_mask: (B, S), 0 or False at padding, which sees nothing and is seen by nothing.
            prefix: the first tokens (of each document) that see each other; decoders only.
            mask_mod: what may be seen besides, as in `lss.attention`.
            source_ids, source_mask: (B, T_source), an encoder-decoder's source, and its padding.
            source_positions: (T_source,) int64, where each source token stands in the text, if it has a place there (every
                second byte of it, for one): with rotary positions the text then sees the source by distance.
            places, source_places: (T,) int64, the tokens' places in the whole sequence, which key dropout; 0..T-1 by
                default.
            ops: the parallel layout of this pass, from `lss.parallelize`; one device by default.
        """
        if ops is None:  # whole sequences on one device
            self.refuse_misfits(input_ids, cu_seqlens, prefix, attention_mask, source_ids, source_mask)
            segment = make_segment(input_ids.shape[1], cp=1, rank=0, cu_seqlens=cu_seqlens)
            ops = one_device(segment, None if source_ids is None else source_ids.shape[1])
            positions = segment.document_positions.to(input_ids.device) if positions is None else positions
            if labels is not None and shift_labels is None:
                shift_labels = self.targets(labels, segment.documents)
        assert positions is not None
        if mask_mod is not None and scans(self.config):
            fit = f"model.layers={self.config.layers!r}: a state goes forward through all tokens; leave it out"
            raise refuse("mask_mod", "a function", fit)
        rules, seed = self._rules(input_ids, samples, dropout_seed)
        rules = replace(rules, keep=_keep(attention_mask), prefix=prefix, mask_mod=mask_mod)
        memory = None
        if source_ids is not None:
            source_keep = _keep(source_mask)
            memory = self._encode(source_ids, source_places, replace(rules, keep=source_keep), seed, ops)
            cross_rules = replace(rules, causal=False, slopes=None, prefix=0, mask_mod=None, keep=source_keep)
        else:
            cross_rules = rules
        shared = self._shared(ops, ops.attention, rules, seed, positions, places)
        if source_positions is not None and shared.rotation is not None:
            shared = replace(shared, source_rotation=rope(source_positions, self.config, shared.rotation[0].dtype))
        x_BTD = self._embed(input_ids, self.position_table, positions, shared, layer=0)
        x_BTD = self._run(self.blocks, x_BTD, replace(shared, cross_rules=cross_rules), memory)
        last = ops.pieces.compiled(normed)
        x_BTD = ops.pieces.alone(lambda x, _: last(self.final_norm, x), tuple(self.final_norm.parameters()), x_BTD)
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        loss = None if shift_labels is None else ops.loss(x_BTD, weight, shift_labels, num_items_in_batch)
        return ModelOutput(loss, x_BTD, weight, ambient_autocast(x_BTD.device.type), weight._version)

    def targets(self, labels_BS: torch.Tensor, documents: tuple[int, ...]) -> torch.Tensor:
        """What a whole sequence's logits are compared with: its labels, for decoders shifted inside each document."""
        return labels_BS if self.config.kind == "encoder" else shift(labels_BS, documents)

    def refuse_misfits(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        prefix: int = 0,
        attention_mask: torch.Tensor | None = None,
        source_ids: torch.Tensor | None = None,
        source_mask: torch.Tensor | None = None,
        *,
        lengths: tuple[int | None, int | None] = (None, None),
    ) -> None:
        """Refuse inputs of `forward` that do not fit this kind of model or one another.

        `lengths` are those of text and source where the ids are cut; masks are whole.
        """
        kind = self.config.kind
        if (source_ids is not None) != (kind == "encoder_decoder"):
            given = "a tensor" if source_ids is not None else None
            raise refuse("source_ids", given, f'model.kind="{kind}" {"has no source" if given else "reads a source"}')
        if cu_seqlens is not None and kind == "encoder_decoder":
            fit = 'model.kind="encoder_decoder" reads one source for one text; leave it out'
            raise refuse("cu_seqlens", "a tensor", fit)
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
            raise refuse("prefix", prefix, "give a whole number of tokens, 0 or more")
        why = f"model.layers={self.config.layers!r}: a state goes forward through all tokens; "
        if scans(self.config) and prefix:
            raise refuse("prefix", prefix, f"{why}use 0")
        if scans(self.config) and attention_mask is not None:
            raise refuse("attention_mask", tuple(attention_mask.shape), f"{why}fill rows at their ends, and leave it out")
        if prefix and kind == "encoder":
            raise refuse("prefix", prefix, 'model.kind="encoder" sees everything already; use 0')
        for name, mask, ids, length in (("attention_mask", attention_mask, input_ids, lengths[0]),
                                        ("source_mask", source_mask, source_ids, lengths[1])):  # fmt: skip
            if mask is None:
                continue
            if ids is None:
                raise refuse(name, tuple(mask.shape), "there are no source_ids that it could be of")
            expected = (ids.shape[0], length or ids.shape[1])
            if tuple(mask.shape) != expected:
                raise refuse(name, tuple(mask.shape), f"give one value a token of the whole batch, {expected}")

    def _rules(self, input_ids, samples, dropout_seed) -> tuple[Rules, int]:
        """What all layers' attention has in common, and the seed of this pass."""
        config = self.config
        if self.training:
            # counted, so that ranks agree on the seed of a pass without talking
            self.passes += 1
        seed = fold(self.seed, self.passes) if dropout_seed is None else dropout_seed
        if samples is None:
            samples = torch.arange(input_ids.shape[0], device=input_ids.device)
        slopes = alibi_slopes(config.n_heads).to(input_ids.device) if config.positions == "alibi" else None
        p = config.attention_dropout if self.training else 0.0
        rules = Rules(
            causal=config.kind != "encoder", softcap=config.softcap, slopes=slopes, dropout_p=p, samples=samples
        )
        return rules, seed

    def _shared(
        self,
        ops: ModelOps,
        attend: AttentionOp,
        rules: Rules,
        seed: int,
        positions: torch.Tensor,
        places: torch.Tensor | None,
    ) -> Shared:
        p = self.config.dropout if self.training else 0.0
        samples = rules.samples
        assert samples is not None
        where = torch.arange(len(positions), device=positions.device) if places is None else places

        def drop(x_BTD: torch.Tensor, layer: int, place: int, tokens: slice) -> torch.Tensor:
            return keyed_dropout(x_BTD, p, seed=fold(seed, layer, place), samples_B=samples, positions_T=where[tokens])

        rotation = None
        if self.config.positions == "rope":
            dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
            # only the text's attention may compute on other tokens than the layer holds
            at = ops.positions(positions) if attend is ops.attention else positions
            rotation = rope(at, self.config, dtype)
        return Shared(ops, attend, rules, drop if p else None, seed, rotation)

    def _embed(self, ids, table: nn.Embedding | None, positions, shared: Shared, layer: int) -> torch.Tensor:
        x_BTD = self.embedding(ids)
        if table is not None:
            rows = shared.ops.position_rows if table is self.position_table else ModelOps().position_rows
            x_BTD = x_BTD + rows(table.weight, positions)
        if self.config.residual == "compute":
            x_BTD = x_BTD.to(compute_dtype(x_BTD))
        return x_BTD if shared.drop is None else shared.drop(x_BTD, layer, EMBEDDING, slice(None))

    def _encode(self, ids, places, rules: Rules, seed: int, ops: ModelOps) -> torch.Tensor:
        """The source as the decoder sees it: (B, T_source, D)."""
        assert self.source_blocks is not None
        assert self.source_norm is not None
        positions = torch.arange(ids.shape[1], device=ids.device) if places is None else places
        rules = replace(rules, causal=False, prefix=0, mask_mod=None)
        table = self.source_position_table
        shared = self._shared(ops, ops.source_attention, rules, seed, positions, positions)
        if table is not None:
            positions = positions.clamp(max=len(table.weight) - 1)  # padding's rows reach nobody
        x_BTD = self._embed(ids, table, positions, shared, layer=len(self.blocks))
        return normed(self.source_norm, self._run(self.source_blocks, x_BTD, shared, None))

    @staticmethod
    def _run(blocks: Any, x_BTD: torch.Tensor, shared: Shared, memory: torch.Tensor | None) -> torch.Tensor:
        for block in blocks:
            x_BTD = block(x_BTD, shared, memory)
        return x_BTD


def one_device(segment, source_len: int | None) -> ModelOps:
    """The operations of a model on one device, for whole sequences with these documents."""
    attention = partial(single_attention, segment=segment)
    if source_len is None:
        scan, conv = partial(single_scan, segment=segment), partial(single_conv, segment=segment)
        return ModelOps(attention=attention, scan=scan, conv=conv)
    cross = partial(single_attention, segment=segment, kv_segment=make_segment(source_len, cp=1, rank=0))
    return ModelOps(attention=attention, cross_attention=cross)


def shift(labels_BS: torch.Tensor, documents: tuple[int, ...] = (), ignore_index: int = -100) -> torch.Tensor:
    """Labels of a whole sequence, shifted: each token's label is the next token's; a document's last token has none."""
    shifted = F.pad(labels_BS[:, 1:], (0, 1), value=ignore_index)
    if len(documents) > 2:
        shifted[:, torch.tensor(documents[1:-1], device=labels_BS.device) - 1] = ignore_index
    return shifted


def _keep(attention_mask: torch.Tensor | None):
    return None if attention_mask is None else keep_rows(attention_mask)
