"""Low-rank adapters (LoRA) in a model of transformers, by peft: a frozen weight W acts as W + (alpha / rank) B A.

A (rank x in) is drawn and B (out x rank) starts at 0, so that the model begins as it was; these alone are trained and saved.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from lss.config import ModelConfig
from lss.config.errors import Refused, refuse


def add_adapters(model: Any, settings: ModelConfig, seed: int) -> Any:
    """Put adapters into a model, in place, and freeze all else; returns it.

    Args:
        settings: lora_rank, lora_alpha and lora_targets are read.
        seed: of the drawn matrices.

    Raises:
        Refused: peft is not installed, or the targets are none of this model's.
    """
    config = _config(settings)
    from peft import inject_adapter_in_model

    with _drawn_by(seed), _refusing(model, settings):
        return inject_adapter_in_model(config, model)


def with_adapters(model: Any, settings: ModelConfig, weights: Mapping[str, torch.Tensor]) -> Any:
    """The model in a `PeftModel` with these adapters, by the names of `add_adapters`; what `merged` takes."""
    config = _config(settings)
    from peft import get_peft_model

    with _drawn_by(0), _refusing(model, settings):
        wrapped = get_peft_model(model, config)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    if trained.keys() != {f"base_model.model.{name}" for name in weights}:
        kind = f"{type(model).__name__} with model.lora_rank={settings.lora_rank}"
        raise Refused(f"CKPT: its adapters are not those of {kind}.")
    with torch.no_grad():
        for name, tensor in weights.items():
            trained[f"base_model.model.{name}"].copy_(tensor)
    return wrapped


def merged(wrapped: Any) -> Any:
    """The plain model whose weights are W + (alpha / rank) B A."""
    return wrapped.merge_and_unload()


def _config(settings: ModelConfig) -> Any:
    if find_spec("peft") is None:
        raise refuse("model.lora_rank", settings.lora_rank, "peft is not installed; pip install 'lss-transformer[lora]'")
    from peft import LoraConfig

    names = [name.strip() for name in settings.lora_targets.split(",") if name.strip()]
    targets = "all-linear" if names == ["all-linear"] else names or None
    alpha: Any = settings.lora_alpha  # peft takes any number, whatever its types say
    return LoraConfig(
        r=settings.lora_rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip


@contextmanager
def _refusing(model: Any, settings: ModelConfig) -> Iterator[None]:
    """Turns what peft says of targets into a refusal."""
    try:
        yield
    except ValueError as error:
        reason = str(error).splitlines()[0][:100].rstrip(".")
        fit = f"names no modules of {type(model).__name__} that take adapters ({reason}); give names such as q_proj,v_proj"
        raise refuse("model.lora_targets", repr(settings.lora_targets), f"{fit}, or all-linear") from None


@contextmanager
def _drawn_by(seed: int) -> Iterator[None]:
    """Draws by a seed, and leaves torch's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
