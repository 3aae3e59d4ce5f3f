"""Layers of several kinds in one model: which is which, and what goes with layers that carry a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lss.config.errors import refuse

if TYPE_CHECKING:
    from lss.config.sections import ModelConfig

# letter of model.layers -> what mixes the tokens of such a layer
KINDS = {"a": "attention", "s": "scan", "b": "both"}
# keys of [model] that say something only where a layer scans
SCAN_KEYS = ("scan_heads", "scan_width", "scan_state", "scan_groups", "conv_width")


def layer_kind(model: ModelConfig, layer: int) -> str:
    """What mixes the tokens of a layer, counted from 0: "attention", "scan" or "both"."""
    return KINDS[model.layers[layer % len(model.layers)]] if model.layers else "attention"


def attention_layers(model: ModelConfig) -> tuple[int, ...]:
    """The layers that attend."""
    return tuple(layer for layer in range(model.n_layers) if layer_kind(model, layer) != "scan")


def scans(model: ModelConfig) -> bool:
    """Whether any layer scans; n_layers may be any number."""
    return any(KINDS.get(letter) != "attention" for letter in model.layers[: max(0, model.n_layers)])


def layer_counts(model: ModelConfig) -> tuple[int, int]:
    """How many layers attend and how many scan; n_layers may be any number."""
    if not model.layers:
        return model.n_layers, 0
    rounds, rest = divmod(model.n_layers, len(model.layers))

    def of(but: str) -> int:
        kinds = [KINDS[letter] != but for letter in model.layers]
        return rounds * sum(kinds) + sum(kinds[:rest])

    return of("scan"), of("attention")


def scan_width(model: ModelConfig) -> int:
    """Inner width of a scan: heads times head size."""
    return model.scan_width if isinstance(model.scan_width, int) else 2 * model.d_model


def state_numbers(model: ModelConfig) -> int:
    """Numbers of state that one row of tokens has in all layers that scan."""
    return layer_counts(model)[1] * scan_width(model) * model.scan_state


def refuse_misfit_layers(
    model: ModelConfig, *, strategy: str, prefix: int, plain: ModelConfig, scan_kernel: str = "auto"
) -> None:
    """Refuse kinds of layers that are none, sizes that do not fit, and what a recurrence does not compute.

    Args:
        strategy, prefix, scan_kernel: parallel.strategy, data.prefix and parallel.scan_kernel.
        plain: a section of defaults.
    """
    unknown = sorted(set(model.layers) - set(KINDS))
    if unknown:
        letters = ", ".join(f"{letter} for {kind}" for letter, kind in KINDS.items())
        raise refuse("model.layers", _quoted(model.layers), f'"{unknown[0]}" is no kind of layer; use {letters}')
    if not scans(model):
        for key in SCAN_KEYS:
            if getattr(model, key) != getattr(plain, key):
                fit = f'model.layers={_quoted(model.layers)} has no layer that scans; leave it out, or use model.layers="s"'
                raise refuse(f"model.{key}", _quoted(getattr(model, key)), fit)
        if scan_kernel != "auto":
            fit = f'model.layers={_quoted(model.layers)} has no layer that scans; leave it out'
            raise refuse("parallel.scan_kernel", _quoted(scan_kernel), fit)
        return
    if model.kind != "decoder":
        fit = f'model.kind="{model.kind}" reads in both directions, and a state goes forward; use "a"'
        raise refuse("model.layers", _quoted(model.layers), fit)
    if prefix:
        fit = f"model.layers={_quoted(model.layers)}: a state goes forward, so that no prefix sees itself whole; use 0"
        raise refuse("data.prefix", prefix, fit)
    if strategy == "tp":
        fit = f"model.layers={_quoted(model.layers)}: it does not cut the heads of a scan; use \"lss\""
        raise refuse("parallel.strategy", '"tp"', fit)
    width = scan_width(model)
    if width % model.scan_heads:
        raise refuse("model.scan_heads", model.scan_heads, f"must divide the scan's width, {width}")
    if model.scan_heads % model.scan_groups:
        raise refuse("model.scan_groups", model.scan_groups, f"must divide model.scan_heads={model.scan_heads}")


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
