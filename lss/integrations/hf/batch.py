"""Cutting a transformers model's batch before its forward, and its loss after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator
from lss.config.errors import Refused, refuse
from lss.context_parallel import AttentionOptions, shard
from lss.context_parallel.loss import global_cross_entropy
from lss.context_parallel.sharding import IGNORE_INDEX, refuse_packed_rows
from lss.integrations.hf.loss import load_balancing_loss
from lss.integrations.hf.refusals import Traits, router_refusal
from lss.kernels import Rules, keep_rows
from lss.mesh import moved
from lss.segment import Run, Segment

MakeSegment = Callable[[int, torch.Tensor | None], Segment]
# arguments of a model's forward that are cut or passed on; all others are refused unless they are None or False
_PASSED_ON = ("return_dict", "output_hidden_states", "output_router_logits")
_BORDERS = ("cu_seqlens", "cu_seq_lens_q")  # ours, and the name that transformers' collators use
_KNOWN = frozenset((
    "input_ids", "attention_mask", "position_ids", "token_type_ids", "labels", "shift_labels", "num_items_in_batch",
    "seq_len", "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache", *_BORDERS, *_PASSED_ON,
))  # fmt: skip


@dataclass(eq=False)
class CutBatch:
    """One batch as it was cut: what attention in every layer and the loss need to know of it.

    It travels through the model's keyword arguments, so that layers that are computed again in backward get the batch
    that they were computed with.

    Attributes:
        segment: this rank's tokens.
        comm: the cp group.
        keep: each row's runs of tokens that are no padding; None where all are kept.
        labels: (B, T), this rank's, shifted; None where no loss is asked for.
        count: the global number of labels to divide by, where it is given.
        mask: (B, T), this rank's part of the attention mask; None where nothing is padding.
        weights: (B, T), 1 for tokens that count in a load-balancing loss; None where there is none.
        by_position: documents begin where positions restart.
        breaks: this rank's own positions do not all rise by one, so that a model's mask shows whether it minds.
        calls: how often attention, or a mixer in its place, was computed.
        joined: a layer's own mask lets such documents see each other.
        attend: what computes attention in place of `lss.context_parallel.attend`, by layer's q, k, v and rules; None for
            that.
    """

    segment: Segment
    comm: Communicator
    options: AttentionOptions
    keep: tuple[tuple[Run, ...], ...] | None
    labels: torch.Tensor | None
    count: int | torch.Tensor | None
    weights: torch.Tensor | None
    by_position: bool = False
    breaks: bool = False
    calls: int = 0
    joined: bool = False
    mask: torch.Tensor | None = None
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rules], torch.Tensor] | None = None


class Adapter:
    """Cuts batches for a model and computes its loss: the two hooks around its forward.

    Args:
        make_segment: (length, borders of documents) -> this rank's segment.
        everyone: the group that losses are summed over, dp x cp.
    """

    def __init__(
        self,
        traits: Traits,
        mesh: DeviceMesh,
        make_segment: MakeSegment,
        *,
        cp: Communicator,
        everyone: Communicator,
        options: AttentionOptions,
        precut: bool,
    ) -> None:
        self.traits, self.mesh, self.cp, self.all = traits, mesh, cp, everyone
        self._make_segment, self._options, self._precut = make_segment, options, precut

    # -- before the model's forward ------------------------------------------------------------------------------------

    def cut(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A forward pre-hook: cuts the whole batch (unless it comes cut) and sends the cut along.

        Raises:
            Refused: an argument that would not be honoured.
        """
        inputs = dict(zip(self.traits.parameters, args, strict=False)) | kwargs
        inputs = {name: value for name, value in inputs.items() if value is not None}
        self._refuse_unknown(inputs)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        positions = self._given_positions(ids, inputs.get("position_ids"), mask)
        borders = self._borders(inputs, positions, mask)
        S = inputs.get("seq_len", ids.shape[1] * self.cp.size) if self._precut else ids.shape[1]
        segment = self._make_segment(S, borders)
        refuse_packed_rows(segment, ids.shape[0])
        whole = (ids.shape[0], S)
        if mask is not None and tuple(mask.shape) != whole:
            raise refuse("attention_mask", tuple(mask.shape), f"give one value a token of the whole batch, {whole}")
        if self._precut and segment.local_len != ids.shape[1]:
            raise refuse("input_ids", tuple(ids.shape), f"a segment of {S} tokens has {segment.local_len}")
        self._refuse_far_positions(segment, positions)
        given = {name: inputs[name] for name in _PASSED_ON if name in inputs}
        given["input_ids"] = self._part(ids, segment, 0)
        given["position_ids"] = self._positions(segment, positions, ids.device)
        if "token_type_ids" in inputs:
            given["token_type_ids"] = self._part(inputs["token_type_ids"], segment, 0)
        keep = None if mask is None else keep_rows(mask)
        if mask is not None and keep is not None:  # for what else a model does with it; attention has it whole
            given["attention_mask"] = shard(mask, self.mesh, seg=segment, pad_value=0)
        if self.traits.shifts or "use_cache" in self.traits.parameters:
            given["use_cache"] = False
        labels = self._labels(inputs, ids, segment)
        if keep is not None and labels is not None:
            self._refuse_labels_at_padding(labels, given["attention_mask"])
        router = inputs.get("output_router_logits", self.traits.router)
        weights = self._weights(segment, given, ids) if router else None
        batch = CutBatch(segment, self.cp, self._options, keep, labels, inputs.get("num_items_in_batch"), weights)
        batch.mask = given.get("attention_mask")
        batch.by_position = borders is not None and not any(name in inputs for name in _BORDERS)
        batch.breaks = batch.by_position and bool((given["position_ids"].diff(dim=1) != 1).any())
        return (), {**given, "lss_batch": batch}

    def _refuse_unknown(self, inputs: dict[str, Any]) -> None:
        name = self.traits.name
        for argument, value in inputs.items():
            if argument not in _KNOWN and not (value is False or (argument == "logits_to_keep" and value == 0)):
                fit = f"{name} is cut over ranks, and this argument is not; leave it out"
                raise refuse(argument, type(value).__name__, fit)
        if "input_ids" not in inputs:
            raise Refused(f"input_ids: {name} is cut by its token ids; give them.")
        if inputs.get("use_cache"):
            raise refuse("use_cache", True, "keys are cut over ranks, and no cache holds them; leave it out")
        if inputs.get("output_router_logits") and self.traits.aux_coef is None:
            raise router_refusal(name)
        if self._precut and self.traits.shifts and "labels" in inputs:
            raise Refused("labels: a segment's last label lies in the next one; give shift_labels, shifted before the cut.")
        if self._precut and "position_ids" not in inputs:
            raise Refused("position_ids: a segment does not know its place; give its global positions.")

    def _given_positions(self, ids: torch.Tensor, positions: torch.Tensor | None, mask: Any) -> torch.Tensor | None:
        if positions is None:
            if self.traits.own_positions:
                fit = f"{self.traits.own_positions} counts them from its padding token on; give them with the batch"
                raise refuse("position_ids", None, fit)
            if self.traits.masked_positions and mask is not None:
                fit = f"{self.traits.name} counts them by the attention_mask; give them with the batch"
                raise refuse("position_ids", None, fit)
            return None
        positions = positions[None] if positions.dim() == 1 else positions
        if positions.dim() != 2 or positions.shape[0] not in (1, ids.shape[0]) or positions.shape[1] != ids.shape[1]:
            raise refuse("position_ids", tuple(positions.shape), f"give one a token, {tuple(ids.shape)}")
        return positions

    def _borders(self, inputs: dict[str, Any], positions: torch.Tensor | None, mask: Any) -> torch.Tensor | None:
        """Borders of packed documents: as given, or where positions restart, by the rule of transformers."""
        for name in _BORDERS:
            if name in inputs:
                return inputs[name]
        if positions is None or mask is not None or self._precut or positions.shape[1] < 2:
            return None
        breaks = (positions.diff(dim=1) != 1).cpu()
        if not bool(breaks.any()):
            return None
        if inputs["input_ids"].shape[0] != 1:
            fit = "packed documents come one row at a time; give one row, or an attention_mask"
            raise refuse("position_ids", "positions that do not rise by one", fit)
        inside = breaks[0].nonzero()[:, 0] + 1
        return torch.cat((inside.new_zeros(1), inside, inside.new_tensor([positions.shape[1]])))

    def _refuse_far_positions(self, segment: Segment, positions: torch.Tensor | None) -> None:
        rows, rope = self.traits.table_rows, self.traits.rope_limit
        if rows is None and (rope is None or self.cp.size == 1):
            return
        if positions is None:
            longest = max(b - a for a, b in zip(segment.documents, segment.documents[1:], strict=False))
        elif not self._precut:
            longest = int(positions.max()) + 1
        else:
            longest = int(self.cp.all_reduce_max(positions.max().clone(), "positions").wait()) + 1
        if rows is not None and longest > rows:
            raise refuse("input_ids", f"{longest} tokens", f"the position table of {self.traits.name} has {rows} rows")
        if rope is not None and longest > rope[1] and self.cp.size > 1:
            fit = f"its frequencies depend on the longest position at hand beyond {rope[1]}, which differs from rank to rank"
            raise refuse("rope_type", rope[0], f"{fit}; use another rope_type, 'yarn' for one, for {longest} tokens")

    def _part(self, x: torch.Tensor, segment: Segment, pad: int) -> torch.Tensor:
        return x if self._precut else shard(x, self.mesh, seg=segment, pad_value=pad)

    def _positions(self, segment: Segment, given: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        if given is not None:
            return self._part(given, segment, 0)
        places = segment.document_positions.masked_fill(segment.positions >= segment.seq_len, 0)
        return moved(places, device)[None]

    def _labels(self, inputs: dict[str, Any], ids: torch.Tensor, segment: Segment) -> torch.Tensor | None:
        """This rank's labels, shifted before the cut where the model predicts the next token."""
        given = inputs.get("labels", inputs.get("shift_labels"))
        if given is None:
            return None
        labels = inputs.get("shift_labels", given)
        if tuple(labels.shape) != tuple(ids.shape):
            raise refuse("labels", tuple(labels.shape), f"give one a token, {tuple(ids.shape)}")
        if "shift_labels" not in inputs and self.traits.shifts:
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            if any(name in inputs for name in _BORDERS):  # a document's last token has no next one
                labels[:, torch.tensor(segment.documents[1:-1], dtype=torch.int64, device=labels.device) - 1] = IGNORE_INDEX
        return self._part(labels, segment, IGNORE_INDEX)

    def _refuse_labels_at_padding(self, labels: torch.Tensor, mask: torch.Tensor) -> None:
        """Padding has no logits to speak of; transformers would count whatever they are."""
        wrong = ((labels != IGNORE_INDEX) & (mask == 0)).sum()
        if int(self.cp.all_reduce(wrong, "labels at padding").wait()):
            fit = "padding has no output to compare; give -100 there"
            what = "the label of the token after a padding token" if self.traits.shifts else "the label of a padding token"
            raise refuse("labels", what, f"{fit}, in a row that begins with padding also for its first token"
                         if self.traits.shifts else fit)  # fmt: skip

    def _refuse_joined(self, batch: CutBatch, device: torch.device) -> None:
        joined = torch.tensor(float(batch.joined), device=device)
        if float(self.cp.all_reduce_max(joined, "documents").wait()):
            fit = f"{self.traits.name}'s own masks do not part documents by them; give the documents' borders as cu_seqlens"
            raise refuse("position_ids", "positions that restart", fit)

    def _weights(self, segment: Segment, given: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
        true = moved(segment.positions < segment.seq_len, ids.device).expand(ids.shape[0], -1)
        return true if "attention_mask" not in given else true & (given["attention_mask"] != 0)

    # -- after it --------------------------------------------------------------------------------------------------------

    def finish(self, module: Any, _args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook: computes the global loss from this rank's logits, and puts it first into the output.

        Collectives: one all-reduce of two numbers; with a load-balancing loss one more, of 2 E + 1.
        """
        batch: CutBatch = kwargs["lss_batch"]
        if batch.calls < self.traits.layers:
            fit = "the others do not go through transformers' attention interface, and saw their own segment only"
            raise refuse("model", self.traits.name, f"{batch.calls} of {self.traits.layers} layers were cut; {fit}")
        if batch.by_position:
            self._refuse_joined(batch, kwargs["position_ids"].device)
        if batch.labels is None:
            return output
        logits = output[0] if isinstance(output, tuple) else output.logits
        loss = global_cross_entropy(logits, batch.labels, self.all, batch.count)
        if isinstance(output, tuple):
            if batch.weights is not None:
                raise refuse("return_dict", False, "the load-balancing loss reads router_logits by name; leave it out")
            return (loss, *output)
        added = {}
        if batch.weights is not None:
            assert self.traits.aux_coef is not None
            top_k = module.config.get_text_config().num_experts_per_tok
            aux = load_balancing_loss(output.router_logits, batch.weights.flatten(), top_k, self.all)
            loss, added = loss + self.traits.aux_coef * aux.to(loss.dtype), {"aux_loss": aux}
        # made anew: fields keep the order in which they are set, and the loss comes first
        return type(output)(**{"loss": loss, **dict(output.items()), **added})
