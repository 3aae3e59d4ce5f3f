"""One pass of a model over given tokens with attention of our choosing: what generation needs of the two kinds of model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from lss.comm import Communicator
from lss.config.errors import refuse
from lss.config.hybrid import attention_layers
from lss.context_parallel import AttentionOptions
from lss.integrations.hf import CutBatch, is_hf_model, is_mixer, traits_of, use_lss_attention
from lss.kernels import Rules
from lss.model import ModelOps, Transformer
from lss.segment import Segment


class LayerOps(NamedTuple):
    """What the layers of one pass compute, each with its number among those that compute such.

    Attributes:
        attention: (q (B,T,N,H), k, v (B,T,K,H), rules, number) -> (B,T,N,H).
        scan: (q, k (B,T,K,P), v (B,T,N,H), log decay (B,T,N), number) -> (B,T,N,H).
        conv: (x (B,T,C), weight (C,W), number) -> (B,T,C).
    """

    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rules, int], torch.Tensor]
    scan: Callable[..., torch.Tensor]
    conv: Callable[..., torch.Tensor]


class Passes(Protocol):
    """A model's passes.

    Attributes:
        layers: calls of attention in one.
        vocab_size: token ids are below this.
        longest: the most tokens that it has positions for; None where there is no end to them.
    """

    layers: int
    vocab_size: int
    longest: int | None

    def run(
        self, ids_BT: torch.Tensor, positions_T: torch.Tensor, layers: LayerOps, segment: Segment, at: int
    ) -> torch.Tensor:
        """Logits (B, V) of the token that stands at `at` among those given."""
        ...


def passes_of(model: nn.Module, comm: Communicator) -> Passes:
    """The passes of a plain model, ours or one of transformers, whole on every rank.

    Raises:
        Refused: it was laid out by `parallelize`, or cannot say the next token.
    """
    if hasattr(model, "parallel"):
        raise refuse("model", type(model).__name__, "it is laid out for training; give the plain model, whole on every rank")
    if isinstance(model, Transformer):
        return _Ours(model)
    if is_hf_model(model):
        return _OfTransformers(model, comm)
    raise refuse("model", type(model).__name__, "lss.model.Transformer and models of transformers generate")


class _Ours:
    def __init__(self, model: Transformer) -> None:
        if model.config.kind != "decoder":
            raise refuse("model.kind", f'"{model.config.kind}"', "decoders say the next token, and generate")
        self._model, self.layers, self.vocab_size = model, len(attention_layers(model.config)), model.config.vocab_size
        self.longest = model.seq_len if model.config.positions == "learned" else None

    def run(self, ids_BT, positions_T, layers: LayerOps, segment: Segment, at: int) -> torch.Tensor:
        """See `Passes`."""
        attending, scanning, convolving = count(), count(), count()
        ops = ModelOps(
            attention=lambda q, k, v, rules: layers.attention(q, k, v, rules, next(attending)),
            scan=lambda q, k, v, log_decay: layers.scan(q, k, v, log_decay, next(scanning)),
            conv=lambda x, weight: layers.conv(x, weight, next(convolving)),
        )
        output = self._model(ids_BT, positions=positions_T, ops=ops)
        return F.linear(output.hidden[:, at], output.weight)


class _OfTransformers:
    def __init__(self, model: Any, comm: Communicator) -> None:
        self._traits = traits = traits_of(model)
        if not traits.shifts:
            raise refuse("model", traits.name, "it does not say the next token; a ...ForCausalLM does")
        if any(map(is_mixer, model.modules())):
            fit = "of transformers' models only keys and values are cached, no states; those of attention alone generate"
            raise refuse("model", traits.name, fit)
        if traits.rope_limit is not None and comm.size > 1:
            fit = f"its frequencies depend on the longest position at hand beyond {traits.rope_limit[1]}; use one rank"
            raise refuse("rope_type", traits.rope_limit[0], fit)
        self._model, self._comm = model, comm
        self.layers, self.longest = traits.layers, traits.table_rows
        self.vocab_size = model.config.get_text_config().vocab_size
        use_lss_attention(model)

    def run(self, ids_BT, positions_T, layers: LayerOps, segment: Segment, at: int) -> torch.Tensor:
        """See `Passes`."""
        batch = CutBatch(segment, self._comm, AttentionOptions(), None, None, None, None)

        def layer_attention(q, k, v, rules: Rules) -> torch.Tensor:
            self._refuse_calls(batch.calls, batch.calls > self.layers)
            return layers.attention(q, k, v, rules, batch.calls - 1)

        batch.attend = layer_attention
        given: dict[str, Any] = {"output_router_logits": False} if self._traits.aux_coef is not None else {}
        keep = "logits_to_keep" in self._traits.parameters
        if keep:
            given["logits_to_keep"] = torch.tensor([at], device=ids_BT.device)
        output = self._model(ids_BT, position_ids=positions_T[None], use_cache=False, lss_batch=batch, **given)
        self._refuse_calls(batch.calls, batch.calls < self.layers)
        return output.logits[:, 0 if keep else at]

    def _refuse_calls(self, calls: int, odd: bool) -> None:
        """Each layer's attention must come to us once, or some keys would be kept by nobody."""
        if odd:
            fit = "each layer must go through transformers' attention interface once; use transformers' own generate, on one"
            what = f"{calls} calls of attention in {self.layers} layers"
            raise refuse("model", self._traits.name, f"{what}: {fit} device, of what lss export --format hf writes")
