"""The attention function that transformers calls in every layer, and how a model is set to use it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lss.config.errors import Refused, refuse
from lss.context_parallel import attend
from lss.context_parallel.checks import check_rules, check_shapes
from lss.integrations.hf.masks import Pattern, mask_pattern
from lss.kernels import Rules

if TYPE_CHECKING:
    from lss.integrations.hf.batch import CutBatch

# the name of the implementation in transformers' registries
IMPLEMENTATION = "lss"
# what models hand to attention beside its arguments, and what changes nothing in what it computes
_HARMLESS = frozenset((
    "position_ids", "cache_position", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "num_items_in_batch", "deterministic", "layer_idx", "layer_type", "target_dtype",
))  # fmt: skip


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Pattern | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    lss_batch: CutBatch | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of this rank's queries to all keys, by the signature of transformers' `AttentionInterface`.

    Args:
        query: (B, N, T, H); key, value: (B, K, T, H): this rank's tokens.
        attention_mask: the layer's mask as `mask_pattern` read it.
        lss_batch: the batch as it was cut, handed down through the model's keyword arguments.
        s_aux: (N,) sinks.

    Returns:
        ((B, T, N, H), None): there are no attention weights to return.

    Collectives: those of `lss.attention`.

    Raises:
        Refused: what would not be computed exactly, by name.
    """
    where = type(module).__name__
    if lss_batch is None:
        raise Refused(f"{where} was called without the batch that was cut: call the whole model, as it was given to "
                      "lss.parallelize, whose forward cuts it.")  # fmt: skip
    given = sorted(name for name, value in others.items() if value is not None and value is not False)
    unknown = [name for name in given if name not in _HARMLESS]
    if unknown:
        raise refuse(unknown[0], f"an argument of {where}'s attention", "it cannot be honoured on a cut sequence")
    if dropout:
        raise refuse("dropout", dropout, f"{where} would draw another mask for every cut; set the config's dropout to 0")
    pattern = _pattern(module, attention_mask, sliding_window, is_causal)
    if torch.is_autocast_enabled(query.device.type):  # torch's own attention takes its inputs so; rotary ones are float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    narrow = v.shape[3] if v.shape[3] < k.shape[3] else None
    if narrow is not None:  # latent attention has narrower values; zeros beside them change nothing
        v = nn.functional.pad(v, (0, k.shape[3] - narrow))
    check_shapes(q, k, v)
    if k.shape[1] != q.shape[1]:
        fit = "keys of another sequence and caches are not supported here"
        raise refuse(where, f"{k.shape[1]} keys for {q.shape[1]} queries", fit)
    rules = Rules(pattern.causal, pattern.window, scaling, 0, lss_batch.keep, softcap or 0.0, sinks=s_aux)
    check_rules(rules, q, lss_batch.segment, None, None)
    lss_batch.calls += 1
    lss_batch.joined |= lss_batch.breaks and not pattern.packed
    if lss_batch.attend is not None:
        return lss_batch.attend(q, k, v, rules)[..., :narrow], None
    out = attend(q, k, v, rules, segment=lss_batch.segment, comm=lss_batch.comm, options=lss_batch.options)
    return out[..., :narrow], None


def _pattern(module: nn.Module, mask: Pattern | torch.Tensor | None, window: int | None, causal: bool | None) -> Pattern:
    """The layer's mask: what the model's mask says; without one, what transformers' sdpa would take it for."""
    if isinstance(mask, Pattern):
        return mask
    where = type(module).__name__
    if mask is not None:
        fit = f"{where} makes a mask of its own; only those made by transformers' mask functions can be cut"
        raise refuse("attention_mask", f"a tensor of shape {tuple(mask.shape)}", fit)
    if window is not None:
        raise refuse("sliding_window", window, f"{where} was given no mask to go with it, so that it would be dropped")
    return Pattern(bool(getattr(module, "is_causal", True) if causal is None else causal))


def use_lss_attention(model: Any) -> None:
    """Set this model, and no other one, to compute attention by `attention`.

    Two models made from one config object share it; this model gets copies, since the implementation is set there.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_pattern)
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, held in list(vars(module).items()):
            if isinstance(held, PretrainedConfig):
                setattr(module, name, copy.deepcopy(held, copies))
    model.set_attn_implementation(IMPLEMENTATION)
