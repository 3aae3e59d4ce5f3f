"""What can be told of a transformers model before it runs, and the models that are refused by it.

All but attention, and the mixers of `lss.integrations.hf.mixers`, must be local to a token. What mixes tokens elsewhere
(other state spaces, convolutions, recurrences, pooling, positions that are counted from the first token at hand) is found by
walking the modules, and refused by name.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lss.config.errors import Refused, refuse
from lss.integrations.hf.mixers import is_mixer

_SHIFTED = ("ForCausalLM", "LMHeadModel")
_UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")
_LAYERS = {"full_attention", "sliding_attention", "attention", "dense", "sparse", "moe"}
# of models whose mixers can be computed
_SCANNED = {"linear_attention", "mamba"}
# classes whose names say that they mix tokens, or choose among them, outside of plain attention
_MIXERS = re.compile(
    r"(?i:mamba|rwkv|rglru|recurrent|linear_?attention|lightning|delta_?(?:net|attention|rule)|gateddelta|short_?conv|hyena|"
    r"retention|time_?mix|token_?shift|mlstm|slstm|indexer|engram)|SSM"
)
_MIXING_LAYERS = (
    nn.RNNBase, nn.ZeroPad1d, nn.ZeroPad2d, nn.Unfold, nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd,
)  # fmt: skip
_OF_CLASSIFIERS = ("classifier", "cls_", "summary", "classification")
_BY_LENGTH = ("dynamic", "longrope")  # RoPE whose frequencies depend on the longest position at hand


@dataclass(frozen=True)
class Traits:
    """What `Adapter` needs to know of a model.

    Attributes:
        name: of its class.
        shifts: labels are those of the next token (a causal language model); False: of the token itself.
        parameters: names of its forward's arguments.
        own_positions: why positions must come with the batch, where the model would not count them from 0; else "".
        masked_positions: positions that are not given are counted by the attention mask.
        table_rows: rows of its learned position table; None without one.
        rope_limit: (kind, length from which on RoPE depends on the longest position at hand); None where it never does.
        layers: calls of attention that a forward must make at least.
        aux_coef: factor of the router's load-balancing loss; None where its formula is not known.
        router: the config asks for that loss.
    """

    name: str
    shifts: bool
    parameters: tuple[str, ...]
    own_positions: str
    masked_positions: bool
    table_rows: int | None
    rope_limit: tuple[str, int] | None
    layers: int
    aux_coef: float | None
    router: bool


def is_hf_model(model: nn.Module) -> bool:
    """Whether this is a model of transformers; told without importing it."""
    return any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(model).__mro__)


def traits_of(model: Any) -> Traits:
    """Walk a model and its config.

    Raises:
        Refused: it would not be computed exactly on a cut sequence; the sentence names the part.
    """
    name, config = type(model).__name__, model.config
    _refuse_kind(name, config)
    _refuse_modules(name, model)
    text = config.get_text_config()
    _refuse_layers(name, text, _LAYERS | (_SCANNED if any(map(is_mixer, model.modules())) else set()))
    _refuse_dropout(name, model, config)
    if getattr(text, "token_dropout", False):
        fit = "it counts the masked tokens of the whole sequence; set the config's token_dropout=False"
        raise refuse("token_dropout", True, f"{name}: {fit}")
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        fit = "its forward takes no position_ids, so that every segment's positions would begin anew"
        raise refuse("model", name, f"{fit}; a model with given positions fits")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise refuse("model", name, "its forward hands no further keyword arguments to attention; transformers 5 models do")
    router = bool(getattr(text, "output_router_logits", False))
    aux = _aux_coef(model, text)
    if router and aux is None:
        raise router_refusal(name)
    return Traits(
        name, name.endswith(_SHIFTED), tuple(parameters), _own_positions(model), _masked_positions(model),
        _table_rows(model), _rope_limit(text), int(getattr(text, "num_hidden_layers", 1)), aux, router,
    )  # fmt: skip


def router_refusal(name: str) -> Refused:
    """The refusal of a load-balancing loss of unknown form."""
    fit = "its load-balancing loss is none whose counts over all ranks are known; set output_router_logits=False"
    return refuse("output_router_logits", True, f"{name}: {fit}")


def _refuse_kind(name: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        fit = "encoder-decoders of transformers count positions from the first token at hand; a decoder or an encoder fits"
        raise refuse("model", name, fit)
    if not name.endswith(_SHIFTED + _UNSHIFTED):
        fit = "only models with logits for every token can be cut: ...ForCausalLM, ...LMHeadModel, ...ForMaskedLM, "
        raise refuse("model", name, f"{fit}...ForTokenClassification")
    if getattr(config, "output_attentions", False):
        raise refuse("output_attentions", True, f"{name}: attention weights are never made; set it to False")


def _refuse_modules(name: str, model: nn.Module) -> None:
    wholes = [module for module in model.modules() if is_hf_model(module)]
    parts = [(path, module) for path, module in model.named_modules() if not is_hf_model(module)]
    ours = tuple(f"{path}." for path, module in parts if is_mixer(module))
    for path, module in parts:
        if _mixes(module) and not is_mixer(module) and not path.startswith(ours):
            where = f"{path} ({type(module).__name__})"
            raise refuse("model", name, f"{where} mixes tokens outside of attention, which a cut sequence would get wrong")
    for module in wholes:
        if not getattr(module, "_supports_attention_backend", False):
            fit = f"{type(module).__name__} does not take its attention from transformers' attention interface"
            raise refuse("model", name, f"{fit}; a class with _supports_attention_backend does")


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return any(size > 1 for size in module.kernel_size)
    return isinstance(module, _MIXING_LAYERS) or bool(_MIXERS.search(type(module).__name__))


def _refuse_layers(name: str, text: Any, known: set[str]) -> None:
    for setting in ("layer_types", "layers_block_type", "block_types", "_block_types"):
        kinds = getattr(text, setting, None)
        other = sorted({str(kind) for kind in kinds} - known) if isinstance(kinds, (list, tuple)) else []
        if other:
            raise refuse(setting, other[0], f"{name}: only full_attention and sliding_attention layers can be cut")


def _refuse_dropout(name: str, model: nn.Module, config: Any) -> None:
    settings = {**config.to_dict(), **config.get_text_config().to_dict()}
    for setting, value in settings.items():
        # those of classifiers are read by other classes of the same config
        known = "drop" in setting and not setting.startswith(_OF_CLASSIFIERS) and type(value) in (int, float)
        if known and value > 0:
            fit = f"{name} draws it anew for every cut; set {setting}=0.0 in its config before the model is made"
            raise refuse(setting, value, fit)
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise refuse(f"{path}.p", module.p, f"{name} draws dropout anew for every cut; set it to 0")


def _own_positions(model: nn.Module) -> str:
    """The class that counts positions from its padding token on, if one does."""
    for module in model.modules():
        methods = ("create_position_ids_from_input_ids", "create_position_ids_from_inputs_embeds")
        table = getattr(module, "position_embedding_type", "absolute") == "absolute"
        if table and any(hasattr(module, method) for method in methods):
            return type(module).__name__
    return ""


def _masked_positions(model: nn.Module) -> bool:
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return any("attention_mask" in inspect.signature(table.forward).parameters for table in tables)


def _table_rows(model: nn.Module) -> int | None:
    names = re.compile(r"(^|\.)(wpe|position_embeddings?|embed_positions?|position_table)$")
    rows = [m.num_embeddings for path, m in model.named_modules() if isinstance(m, nn.Embedding) and names.search(path)]
    return min(rows) if rows else None


def _ropes(given: Any) -> Iterator[dict[str, Any]]:
    """Every description of RoPE in a config: one, or one a layer type."""
    if isinstance(given, dict):
        if "rope_type" in given or "type" in given:
            yield given
        for value in given.values():
            yield from _ropes(value)


def _rope_limit(text: Any) -> tuple[str, int] | None:
    limits = []
    for setting in ("rope_parameters", "rope_scaling"):
        for rope in _ropes(getattr(text, setting, None)):
            kind = rope.get("rope_type", rope.get("type"))
            if kind in _BY_LENGTH:
                first = rope.get("original_max_position_embeddings") or getattr(
                    text, "original_max_position_embeddings", None) or text.max_position_embeddings  # fmt: skip
                limits.append((kind, int(first)))
    return min(limits, key=lambda limit: limit[1]) if limits else None


def _aux_coef(model: Any, text: Any) -> float | None:
    """The factor of a load-balancing loss in the form of Mixtral's, which many models copy word for word."""
    theirs: Callable | None = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    coef = getattr(model, "router_aux_loss_coef", getattr(text, "router_aux_loss_coef", None))
    if theirs is None or coef is None or not hasattr(text, "num_experts_per_tok"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as known

    same = theirs.__code__.co_code == known.__code__.co_code and theirs.__code__.co_names == known.__code__.co_names
    return float(coef) if same else None
