"""How a transformers model lies on the mesh: whole on every rank, its batches cut, its gradients summed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator, communicator, cp_communicator
from lss.config.errors import Refused, refuse
from lss.config.support import refuse_pairs
from lss.context_parallel import AttentionOptions, count_inner, pick_strategy
from lss.integrations.hf import Adapter, traits_of, use_lss_attention
from lss.parallel.grad_sync import GradSync, global_grad_norm
from lss.segment import Segment, make_segment


class HFLayout:
    """A transformers model on the mesh; what `Layout` is to a model of `lss.model`, and with its methods.

    Every rank holds every parameter whole.
    """

    def __init__(self, model: Any, mesh: DeviceMesh, order: str, options: AttentionOptions, precut: bool) -> None:
        self.mesh, self.strategy, self.order, self.options, self.precut = mesh, options.strategy, order, options, precut
        self.traits = traits_of(model)
        refuse_pairs(options.features())
        pick_strategy(options.strategy)
        self.cp = cp_communicator(mesh)
        self.dp, self.all = communicator(mesh, ("dp",)), communicator(mesh, ("dp", "cp"))
        text = model.config.get_text_config()
        self._causal = self.traits.shifts and getattr(text, "is_causal", True)
        self.segment(1)  # refuses an unknown order
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        # refuses a number that does not fit, and makes its groups while all ranks are here
        self.cp.levels(count_inner(options.inner, options.strategy, heads, self.cp.size, self.cp.per_node))
        use_lss_attention(model)
        for tensor in (*model.parameters(), *model.buffers()):
            self.all.broadcast(tensor.data, "initial weights").wait()
        self._parameters = list(model.parameters())
        self._sync = GradSync(((self._parameters, self.all),))
        self.adapter = Adapter(
            self.traits, mesh, self.segment, cp=self.cp, everyone=self.all, options=options, precut=precut
        )
        model.register_forward_pre_hook(self.adapter.cut, with_kwargs=True)
        model.register_forward_hook(self.adapter.finish, with_kwargs=True)

    def segment(self, seq_len: int, cu_seqlens: torch.Tensor | None = None) -> Segment:
        """This rank's segment of a sequence of this length, packed from documents or one."""
        return make_segment(
            seq_len, cp=self.cp.size, rank=self.cp.rank, order=self.order, cu_seqlens=cu_seqlens, causal=self._causal
        )

    def no_sync(self) -> AbstractContextManager[None]:
        """Let gradients accumulate on this rank: for every micro-batch of a step but the last."""
        return self._sync.no_sync()

    def is_cut(self, name: str) -> bool:
        """Whether each rank holds only its part of this parameter: none is."""
        return False

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter: all of it."""
        return whole

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The inverse of `part`."""
        return part

    def grad_norm(self) -> torch.Tensor:
        """Norm of the whole gradient, equal to one process's; float64."""
        return global_grad_norm(((self._parameters, Communicator()),))


def lay_out_hf(
    model: Any,
    mesh: DeviceMesh,
    order: str,
    options: AttentionOptions,
    *,
    checkpointing: str | None,
    precut: bool,
    others: dict[str, tuple[Any, Any]],
) -> nn.Module:
    """`lss.parallelize` for a transformers model.

    Args:
        others: option -> (value, the only one that a transformers model takes).
    """
    name = type(model).__name__
    for option, (value, only) in others.items():
        if value != only:
            raise refuse(option, value, f"not for {name} of transformers in this version; use {only!r}")
    if options.strategy == "tp":
        raise refuse("strategy", "tp", f"it cuts the weights of lss.model.Transformer only; {name} takes 'lss'")
    if checkpointing not in (None, "none", "full"):
        raise refuse("checkpointing", checkpointing, f"{name} has transformers' own; use 'full' or 'none'")
    if hasattr(model, "parallel"):
        raise Refused("This model has been parallelized already; make a new one for another layout.")
    layout = HFLayout(model, mesh, order, options, precut)
    if checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # plain attributes: they hold no parameters, and are no modules
    object.__setattr__(model, "parallel", layout)
    object.__setattr__(model, "no_sync", layout.no_sync)
    return model
