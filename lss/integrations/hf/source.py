"""A model of transformers by a folder or a name: found, described, and built."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lss.config import Config
from lss.config.errors import Refused, refuse
from lss.integrations.hf.refusals import Traits, traits_of

_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_NO_NETWORK = ("couldn't connect", "offline", "can't load", "cannot find the requested files", "connection error")


@dataclass(frozen=True)
class Source:
    """A model that was found and not built yet.

    Attributes:
        name: as it was given.
        setting: what it was given by, for refusals.
        config: its config as it stands there.
        cls: the class of transformers that it names.
        place: where its weights are; None where they are drawn, since only a config is there.
    """

    name: str
    setting: str
    config: Any
    cls: type
    place: str | None

    def build(self, *, dtype: torch.dtype, seed: int = 0, dropout: bool = False, weights: bool = True) -> Any:
        """The model, on the CPU.

        Args:
            seed: of weights that are drawn.
            dropout: False sets all rates of dropout to 0.
            weights: False draws weights where there are others, for a model that is loaded from elsewhere.

        Raises:
            Refused: the weights cannot be read, or are not all of this class's.
        """
        config = copy.deepcopy(self.config) if dropout else without_dropout(self.config)
        if self.place is None or not weights:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                # buffers are then made as from_pretrained makes them, which `to` would round otherwise
                return self.cls._from_config(config, dtype=dtype)  # type: ignore[attr-defined]
        try:
            model, info = self.cls.from_pretrained(  # type: ignore[attr-defined]
                self.place, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
            raise _cannot_load(self.setting, self.name, error) from None
        missing = sorted(info.get("missing_keys") or ())
        if missing:
            fit = f"its files lack {len(missing)} weights of {self.cls.__name__}, {missing[0]} for one"
            raise refuse(self.setting, self.name, f"{fit}; give a model whose weights are all there")
        return model

    @cached_property
    def _meta(self) -> Any:
        with torch.device("meta"):
            return self.cls(without_dropout(self.config))

    def traits(self) -> Traits:
        """What the adapter sees of it; refuses, by name, a class that cannot be cut exactly."""
        return traits_of(self._meta)

    def parameters(self) -> dict[str, torch.Size]:
        """Shapes of its parameters by name; one that is tied stands there once."""
        return {name: parameter.shape for name, parameter in self._meta.named_parameters()}

    def matrix_parameters(self) -> int:
        """Parameters in matrix products: all matrices but look-up tables; an embedding that is the head counts."""
        head, tables = self._meta.get_output_embeddings(), []
        for module in self._meta.modules():
            if isinstance(module, torch.nn.Embedding) and (head is None or module.weight is not head.weight):
                tables.append(id(module.weight))
        return sum(p.numel() for p in self._meta.parameters() if p.dim() >= 2 and id(p) not in tables)

    def head_size(self) -> int:
        """Size of a query head."""
        text = self.config.get_text_config()
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def shape(self) -> dict[str, Any]:
        """Its shape in the words of [model]."""
        text = self.config.get_text_config()
        heads, width = text.num_attention_heads, text.hidden_size
        return {
            "d_model": width,
            "n_layers": text.num_hidden_layers,
            "n_heads": heads,
            "n_kv_heads": getattr(text, "num_key_value_heads", None) or heads,
            "d_mlp": getattr(text, "intermediate_size", None) or 4 * width,
            "vocab_size": text.vocab_size,
            "windows": _windows(text),
            **_scans(text),
        }

    def save_generation(self, folder: Path) -> None:
        """Write its settings of generation into a folder, where it has any."""
        from transformers import GenerationConfig

        with suppress(OSError, ValueError):
            GenerationConfig.from_pretrained(self.name).save_pretrained(folder)

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON: enough to build it without its folder or the Hub."""
        return {"class": self.cls.__name__, "config": json.loads(self.config.to_json_string(use_diff=False))}


def open_source(name: str, setting: str = "model.hf") -> Source:
    """Find the model of a folder that `save_pretrained` wrote, of one with a config.json alone, or of a name on the Hub.

    No code of the source is run: only classes of the transformers that is installed are made, from safetensors.

    Raises:
        Refused: transformers is not installed, there is no such model or no network to ask for it, it is of a class
            that transformers does not know, quantized, or its weights are in files that can hold code.
    """
    transformers = _transformers(setting, name)
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise refuse(setting, name, "no such folder; give one with a config.json, or OWNER/NAME on the Hugging Face Hub")
    place = str(folder) if folder.is_dir() else name
    try:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise _cannot_load(setting, name, error) from None
    weights: str | None = place
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
        if others:
            fit = "only weights in safetensors are read, which can hold no code; save it anew with save_pretrained"
            raise refuse(setting, name, f"{others[0]}: {fit}")
        weights = None
    return _source(transformers, name, setting, config, weights)


def kept_source(
    state: Mapping[str, Any], name: str, setting: str = "model.hf", *, weights: bool = False
) -> Source:
    """The model that a checkpoint kept by `Source.to_state`.

    Args:
        weights: its own weights are needed, so that `name` must still be there; else the checkpoint has them.

    Raises:
        Refused: what was kept makes no model of the transformers that is installed.
    """
    transformers = _transformers(setting, name)
    config = state.get("config")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise refuse(setting, name, f"transformers {transformers.__version__} knows no kind {kind!r}, which was saved")
    try:
        made = transformers.CONFIG_MAPPING[kind].from_dict(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _cannot_load(setting, name, error) from None
    made.architectures = [state.get("class")]
    return _source(transformers, name, setting, made, open_source(name, setting).place if weights else None)


def _source(transformers: Any, name: str, setting: str, config: Any, place: str | None) -> Source:
    if getattr(config, "quantization_config", None) is not None:
        raise refuse(setting, name, "its weights are quantized, and cannot be trained; give the model that they are of")
    return Source(name, setting, config, _class_of(transformers, config, setting), place)


def with_shape(config: Config, source: Source) -> Config:
    """The config with the source's shape read into [model], and checked against it.

    Raises:
        Refused: a class that cannot be cut exactly or is not trained here, or a setting that does not fit its shape.
    """
    traits = source.traits()
    if not traits.shifts:
        fit = "lss train fine-tunes causal language models; for others write a loop around lss.parallelize"
        raise refuse(source.setting, source.name, f"{traits.name}: {fit}")
    if traits.router and config.train.accumulate > 1:
        fit = f"the load-balancing loss of {traits.name} is one of a whole step; use 1, or set output_router_logits to false"
        raise refuse("train.accumulate", config.train.accumulate, fit)
    rows = traits.table_rows
    if rows is not None and config.data.seq_len > rows:
        raise refuse("data.seq_len", config.data.seq_len, f"the position table of {traits.name} has {rows} rows; use {rows}")
    config = replace(config, model=replace(config.model, **source.shape()))
    config.validate()
    return config


def with_rope_scaling(source: Source, kind: str, factor: float) -> Source:
    """The source with its rotary positions stretched, by transformers' own formulas, to `factor` times its length.

    Raises:
        Refused: it has no rotary positions, several kinds of them, or stretched ones already.
    """
    if kind == "none":
        return source
    config = copy.deepcopy(source.config)
    text = config.get_text_config()
    rope, length = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope or not length:
        why = "it has no rotary positions, or other ones by layer"
        raise refuse("model.rope_scaling", repr(kind), f"{source.cls.__name__}: {why}; use \"none\"")
    if rope.get("rope_type", "default") != "default":
        fit = f"its rotary positions are of the kind {rope['rope_type']} already; use \"none\", or change its config"
        raise refuse("model.rope_scaling", repr(kind), f"{source.cls.__name__}: {fit}")
    text.rope_parameters = rope | {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        text.rope_parameters["original_max_position_embeddings"] = length
    # the dynamic kind stretches from max_position_embeddings on by itself
    text.max_position_embeddings = length if kind == "dynamic" else int(length * factor)
    return replace(source, config=config)


def without_dropout(config: Any) -> Any:
    """A copy of a transformers config with all rates of dropout 0."""
    config = copy.deepcopy(config)
    for setting in dropout_rates(config):
        setattr(config, setting, 0.0)
    return config


def dropout_rates(config: Any) -> dict[str, float]:
    """The rates of dropout of a transformers config that are not 0."""
    return {key: rate for key, rate in config.to_dict().items() if "drop" in key and type(rate) is float and rate}


def _transformers(setting: str, name: str) -> Any:
    if find_spec("transformers") is None:
        raise refuse(setting, name, "transformers is not installed; pip install 'lss-transformer[hf]'")
    import transformers

    return transformers


def _scans(text: Any) -> dict[str, Any]:
    """Which layers scan, and how large their states are, in the words of [model]; nothing where none does."""
    kinds = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None) or []
    if "linear_attention" not in kinds:
        return {}
    letters = "".join("s" if kind == "linear_attention" else "a" for kind in kinds)
    heads, groups = text.mamba_n_heads, text.mamba_n_groups
    return {"layers": letters, "scan_heads": heads, "scan_width": heads * text.mamba_d_head, "scan_groups": groups,
            "scan_state": text.mamba_d_state, "conv_width": text.mamba_d_conv}  # fmt: skip


def _windows(text: Any) -> tuple[int, ...]:
    """Each layer's window, 0 where it sees everything; empty where all do."""
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if not window or getattr(text, "use_sliding_window", True) is False:
        return ()
    if kinds is None:
        return (window,)
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _class_of(transformers: Any, config: Any, setting: str) -> type:
    """The class that the config names, or the causal language model of its kind."""
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cls is None:
        raise Refused(f"{setting}: its config names no class of transformers {transformers.__version__}, but "
                      f"{getattr(config, 'architectures', None)}.")  # fmt: skip
    return cls


def _cannot_load(setting: str, name: str, error: Exception) -> Refused:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160].rstrip(".")
    if not Path(name).expanduser().is_dir() and any(words in str(error).lower() for words in _NO_NETWORK):
        fit = "it is not in the local cache, and there is no network, or no such model on the Hugging Face Hub; download it "
        return refuse(setting, name, f"{fit}elsewhere and give its folder ({reason})")
    return refuse(setting, name, f"transformers cannot load it ({reason})")
