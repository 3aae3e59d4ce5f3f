"""What is asked of a model that has been laid out: its layout, its gradients clipped, its parameters whole."""

from __future__ import annotations

import torch
from torch import nn

from lss.config.errors import refuse
from lss.parallel.hf import HFLayout
from lss.parallel.local import local_part
from lss.parallel.parallelize import Layout

AnyLayout = Layout | HFLayout


def clip_grad_norm_(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; returns the norm before.

    Right also where parameters are cut over ranks, which `torch.nn.utils.clip_grad_norm_` would count per rank.
    Scaling by max_norm / (norm + 1e-6) is torch's. `max_norm` 0 or infinite only measures.
    """
    norm = layout_of(model).grad_norm()
    if max_norm > 0:
        grads = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for dtype in {grad.dtype for grad in grads}:
            torch._foreach_mul_([grad for grad in grads if grad.dtype == dtype], scale.to(dtype))
    return norm


def layout_of(model: nn.Module) -> AnyLayout:
    """The layout that `parallelize` gave a model."""
    layout = getattr(model, "parallel", None)
    if not isinstance(layout, Layout | HFLayout):
        raise refuse("model", type(model).__name__, "it has not been parallelized; call lss.parallelize(model, mesh) first")
    return layout


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters whole, on every rank, under the names of the plain model."""
    layout = layout_of(model)
    if layout.sharding is not None:
        layout.sharding.give_back()
    return {name: layout.whole(name, parameter.detach()) for name, parameter in model.named_parameters()}
