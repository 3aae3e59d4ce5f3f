"""A block of the reference model: a mixer of tokens, and what follows it."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lss.config import ModelConfig
from lss.config.hybrid import layer_kind
from lss.model.layers import (
    CROSS_ATTENTION,
    MLP,
    MLP_OUT,
    SELF_ATTENTION,
    Attention,
    Rotation,
    Shared,
    after_attention,
    make_norm,
)
from lss.model.scan import Beside, Scan

Mixer = Attention | Scan | Beside


class Block(nn.Module):
    """Pre-norm block: x + mixer(norm(x)), with `cross` x + attention to memory(norm(x)), then x + mlp(norm(x)).

    The mixer is attention, a scan, or both, as the config's `layers` have it.
    """

    def __init__(self, config: ModelConfig, layer: int, cross: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = make_norm(config)
        kind = layer_kind(config, layer)
        self.attention = Attention(config, layer) if kind == "attention" else None
        self.scan = Scan(config, layer) if kind == "scan" else None
        self.both = Beside(config, layer) if kind == "both" else None
        self.cross_norm = make_norm(config) if cross else None
        self.cross_attention = Attention(config, layer, cross=True) if cross else None
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: torch.Tensor, shared: Shared, memory_BSD: torch.Tensor | None = None) -> torch.Tensor:
        last, place = self.mixer, SELF_ATTENTION
        a_BTNH = self._attended(last, self.attention_norm, shared, shared.rotation, x_BTD)
        if self.cross_attention is not None and self.cross_norm is not None:
            x_BTD = self._after(last, place, shared, x_BTD, a_BTNH)
            last, place = self.cross_attention, CROSS_ATTENTION
            a_BTNH = self._attended(last, self.cross_norm, shared, shared.source_rotation, x_BTD, memory_BSD)
        return self._after(last, place, shared, x_BTD, a_BTNH, self.mlp_norm, self.mlp)

    @property
    def mixer(self) -> Mixer:
        """What mixes the block's own tokens."""
        mixer = self.attention or self.scan or self.both
        assert mixer is not None
        return mixer

    @staticmethod
    def _attended(mixer: Mixer, norm: nn.Module, shared: Shared, of_keys: Rotation, *inputs) -> torch.Tensor:
        before = mixer.before(norm, shared, of_keys)
        parameters = [p for module in (norm, *mixer.projections) for p in module.parameters()]
        run = partial(shared.ops.pieces.attended, mixer.layer, before, parameters, partial(mixer, shared=shared))
        return run(*inputs, by_token=mixer.by_token)

    def _after(self, mixer: Mixer, place: int, shared: Shared, x_BTD, a_BTNH, *mlp: nn.Module) -> torch.Tensor:
        """What follows a mixer: its residual and, where given, norm and MLP."""
        pieces, enter, leave = shared.ops.pieces, shared.ops.enter, shared.ops.leave
        finish, modules = pieces.compiled(after_attention), (mixer.out, *mlp)

        def piece(x: torch.Tensor, a: torch.Tensor, tokens: slice) -> torch.Tensor:
            drops = None
            if shared.drop is not None:
                drops = tuple(partial(shared.drop, layer=self.layer, place=p, tokens=tokens) for p in (place, MLP_OUT))
            return finish(x, a, modules, drops, enter, leave)

        parameters = [p for module in modules for p in module.parameters()]
        return pieces.after(self.layer, piece, parameters, x_BTD, a_BTNH)
