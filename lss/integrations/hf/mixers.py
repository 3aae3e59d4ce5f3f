"""Mamba-2's mixer of transformers on a cut sequence: the same parameters, by the cut scan and convolution.

A class of transformers is taken for what it is by its name, since mixers go through no interface. Its module is replaced by
one that holds the same parameters under the same names; the model's own code, and its checkpointing, stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from lss.config.errors import Refused, refuse
from lss.context_parallel import cut_conv, cut_scan

if TYPE_CHECKING:
    from lss.integrations.hf.batch import CutBatch

# classes whose forward is Mamba-2's, word for word
MIXERS = ("GraniteMoeHybridMambaLayer",)
# what such a mixer's forward may be given beside, and what changes nothing in it
_HARMLESS = frozenset((
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "num_items_in_batch",
))  # fmt: skip


def is_mixer(module: nn.Module) -> bool:
    """Whether this module can be computed on a cut sequence."""
    return type(module).__name__ in MIXERS and type(module).__module__.startswith("transformers.")


def use_cut_mixers(model: nn.Module) -> None:
    """Replace the model's mixers, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_mixer(child):
                setattr(parent, name, CutMixer(child))


class CutMixer(nn.Module):
    """A mixer of `MIXERS` over this rank's tokens.

    States, and what transformers casts to float32 before them, are float32 here, and float64 in models of float64.
    """

    in_proj: nn.Module
    out_proj: nn.Module
    norm: nn.Module
    conv1d: nn.Conv1d
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.n_groups = mixer.num_heads, mixer.head_dim, mixer.n_groups
        self.inner, self.state = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
        self.act, self.time_step_limit = mixer.act, mixer.time_step_limit
        self.where = type(mixer).__name__
        # as they are, in their order: names and identities are what optimizers and checkpoints know
        for name, parameter in mixer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in mixer.named_children():
            setattr(self, name, child)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        *,
        lss_batch: CutBatch | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D), by the signature of transformers' mixers.

        Args:
            attention_mask: ignored: the batch has this rank's part of it.

        Collectives: those of `lss.causal_conv` and `lss.scan`.
        """
        if lss_batch is None:
            raise Refused(f"{self.where} was called without the batch that was cut: call the whole model, as it was given "
                          "to lss.parallelize, whose forward cuts it.")  # fmt: skip
        given = [name for name, value in others.items() if value is not None and value is not False]
        unknown = sorted(set(given) - _HARMLESS)
        if unknown or cache is not None:
            what = unknown[0] if unknown else "cache"
            raise refuse(what, f"an argument of {self.where}", "it cannot be honoured on a cut sequence")
        lss_batch.calls += 1
        cut = {"segment": lss_batch.segment, "comm": lss_batch.comm}
        mask = None if lss_batch.mask is None else lss_batch.mask[..., None]
        dtype, wide = hidden_states.dtype, torch.promote_types(hidden_states.dtype, torch.float32)
        projected = self.in_proj(_masked(hidden_states, mask))
        gate, mixed, dt = projected.split((self.inner, self.inner + 2 * self.state, self.num_heads), -1)
        mixed = cut_conv(mixed, self.conv1d.weight[:, 0], **cut)
        mixed = mixed if self.conv1d.bias is None else mixed + self.conv1d.bias
        x, b, c = _masked(self.act(mixed), mask).to(wide).split((self.inner, self.state, self.state), -1)
        x, b, c = (part.unflatten(-1, (n, -1)) for part, n in ((x, self.num_heads), (b, self.n_groups), (c, self.n_groups)))
        dt = F.softplus(dt + self.dt_bias.to(dt.dtype)).clamp(*self.time_step_limit).to(wide)
        y = cut_scan(c, b, x * dt[..., None], -dt * self.A_log.to(wide).exp(), **cut)
        y = (y + self.D.to(wide)[:, None] * x).flatten(-2)
        return self.out_proj(self.norm(y, gate).to(dtype))


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """0 at padding, as transformers has it: what it is given there, and what the convolution makes of it."""
    return x if mask is None else (x * mask).to(x.dtype)
