"""How a transformers model lies on the mesh: whole on every rank or sharded, its batches cut, its gradients summed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator, communicator, cp_communicator
from lss.config.errors import Refused, refuse
from lss.config.support import refuse_pairs
from lss.context_parallel import AttentionOptions, count_inner, pick_strategy
from lss.integrations.hf import Adapter, traits_of, use_cut_mixers, use_lss_attention
from lss.parallel.grad_sync import GradSync, global_grad_norm
from lss.parallel.local import check_reshard
from lss.segment import Piece, Segment, make_segment, whole_piece

if TYPE_CHECKING:
    from lss.parallel.fsdp import Shares


class HFLayout:
    """A transformers model on the mesh; what `Layout` is to a model of `lss.model`, and with its methods.

    Every rank holds every parameter whole, or its rows of each: `fsdp_reshard` is None, or what `Shares` takes.
    """

    offloader = None

    def __init__(
        self,
        model: Any,
        mesh: DeviceMesh,
        order: str,
        options: AttentionOptions,
        precut: bool,
        fsdp_reshard: bool | str | None = None,
    ) -> None:
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
        use_cut_mixers(model)
        for tensor in (*model.parameters(), *model.buffers()):
            self.all.broadcast(tensor.data, "initial weights").wait()
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}  # before any is cut
        self.sharding: Shares | None = None
        if fsdp_reshard is not None and self.all.size > 1:
            from lss.parallel.fsdp import Shares

            self.sharding = Shares(model, mesh, self.all, blocks_of(model), reshard=fsdp_reshard)
        self._parameters = list(model.parameters())
        self._sync = GradSync((([] if self.sharding is not None else self._parameters, self.all),))
        self.adapter = Adapter(
            self.traits, mesh, self.segment, cp=self.cp, everyone=self.all, options=options, precut=precut
        )
        # first of all hooks: inputs are cut, and refused, before any weights are gathered
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.sharding is not None:
            self.sharding.give_back()
        return self.adapter.cut(module, args, kwargs)

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.sharding is not None and not torch.is_grad_enabled():
            self.sharding.give_back()
        return self.adapter.finish(module, args, kwargs, output)

    def segment(self, seq_len: int, cu_seqlens: torch.Tensor | None = None) -> Segment:
        """This rank's segment of a sequence of this length, packed from documents or one."""
        return make_segment(
            seq_len, cp=self.cp.size, rank=self.cp.rank, order=self.order, cu_seqlens=cu_seqlens, causal=self._causal
        )

    def no_sync(self) -> AbstractContextManager[None]:
        """Let gradients accumulate on this rank: for every micro-batch of a step but the last."""
        return self._sync.no_sync()

    def is_cut(self, name: str) -> bool:
        """Whether each rank of the cp axis holds only its part of this parameter: none does."""
        return False

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter."""
        return whole if self.sharding is None else self.sharding.part(whole)

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The inverse of `part`, on every rank. Collectives: one all-gather where sharded."""
        return part if self.sharding is None else self.sharding.whole(part)

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter of the plain model."""
        return self._shapes[name]

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Which boxes of a whole parameter lie where in this rank's part."""
        whole = whole_piece(self._shapes[name])
        return (whole,) if self.sharding is None else self.sharding.pieces(whole.size)

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks that hold the same part of a parameter as this one, itself included."""
        names = self.mesh.mesh_dim_names or ()
        everyone = tuple(self.mesh.mesh.movedim(names.index("cp"), -1).flatten().tolist())
        return everyone if self.sharding is None else (everyone[self.all.rank],)

    def grad_norm(self) -> torch.Tensor:
        """Norm of the whole gradient, equal to one process's; float64."""
        return global_grad_norm(((self._parameters, Communicator() if self.sharding is None else self.all),))


def blocks_of(model: Any) -> list[nn.Module]:
    """The decoder's or encoder's layers of a transformers model: the one list of as many modules as it has layers."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def lay_out_hf(
    model: Any,
    mesh: DeviceMesh,
    order: str,
    options: AttentionOptions,
    *,
    checkpointing: str | None,
    precut: bool,
    fsdp_reshard: bool | str | None,
    others: dict[str, tuple[Any, Any]],
) -> nn.Module:
    """`lss.parallelize` for a transformers model.

    Args:
        fsdp_reshard: None where parameters stay whole.
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
    if fsdp_reshard is not None:
        check_reshard(fsdp_reshard)
    layout = HFLayout(model, mesh, order, options, precut, fsdp_reshard)
    if checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # plain attributes: they hold no parameters, and are no modules
    object.__setattr__(model, "parallel", layout)
    object.__setattr__(model, "no_sync", layout.no_sync)
    return model
