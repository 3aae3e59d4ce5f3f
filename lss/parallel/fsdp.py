"""Parameters, gradients and optimizer state sharded over all ranks, by torch's FSDP2 (`fully_shard`).

Every rank keeps its rows of each parameter (of dimension 0, in nearly even slices), and so their gradients and optimizer
state. A block's weights are gathered before it computes and given back behind it, in forward and again in backward; in
backward its gradients then go, summed, to the owners of their rows. What belongs to no block (the head, the last norm,
an embedding that is the head, learned positions that are not cut) is gathered from the start of forward to the end of
backward; an embedding of its own is given back once it is read.

Gradients are *summed*, where FSDP2 averages unless told otherwise: each rank has divided by the global count already.
They are summed in float32 where they are of half precision. Training in bfloat16 stays under autocast with float32
weights, as on one process: FSDP2's own casting would round norms, the residual stream and the weights' gradients too.

Collectives of a micro-batch, in elements, slices filled up to even ones: gathers of all parameters once and of those blocks
that have given theirs back a second time, in backward; reduce-scatters of all gradients, once. They are issued by
`lss.comm`, which counts them: ("all_gather", "parameters") and ("reduce_scatter", "gradients").

The model is whole on every rank when it is made; it is sharded before there are gradients and optimizer state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lss.comm import Communicator
from lss.comm.shards import GatherParameters, ScatterGradients
from lss.config.errors import refuse
from lss.mesh import flat_mesh
from lss.model import Transformer
from lss.model.transformer import ModelOutput
from lss.parallel.local import check_reshard, local_part
from lss.segment import Piece


class Shares:
    """A model whose parameters are sharded, in place; their names stay, and the parameters become DTensors.

    Args:
        model: with the same weights on every rank.
        mesh, comm: the ranks to shard over, all of dp x cp, as mesh and as group.
        blocks: modules that are gathered one after another; the rest is gathered at once.
        reshard: whether blocks give their weights back between forward and backward: True, False (each is gathered once a
            step, and all weights are whole in between), or "auto": all but the last, which backward needs at once.
        ignored: parameters that are left as they are.
        once: a module that forward alone reads, if there is one.

    Raises:
        Refused: another `reshard`, or parameters of several dtypes.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        comm: Communicator,
        blocks: Sequence[nn.Module],
        *,
        reshard: bool | str,
        ignored: Collection[nn.Parameter] = (),
        once: nn.Module | None = None,
    ) -> None:
        check_reshard(reshard)
        dtypes = {p.dtype for p in model.parameters()}
        if len(dtypes) > 1:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise refuse("fsdp", True, f"the model's parameters are of several dtypes ({names}); make them one")
        self.mesh, self.comm, self._model = flat_mesh(mesh, ("dp", "cp")), comm, model
        policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtypes.pop(), torch.float32))
        shard = _Shard(self.mesh, policy, set(ignored))
        if once is not None:
            shard(once, True).set_unshard_in_backward(False)
        for block in blocks:
            shard(block, block is not blocks[-1] if reshard == "auto" else bool(reshard))
        shard(model, False)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]

    # -- parts of tensors --------------------------------------------------------------------------------------------

    def rows(self, length: int) -> tuple[int, int]:
        """First row of this rank's slice of a parameter of `length` rows, and their number, which may be 0."""
        each = -(-length // self.comm.size)
        first = min(self.comm.rank * each, length)
        return first, min(each, length - first)

    def pieces(self, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """This rank's slice of a parameter of this shape as a box of it; none where it is empty."""
        first, length = self.rows(shape[0])
        origin = (0,) * len(shape)
        return (Piece((first, *origin[1:]), (length, *shape[1:]), origin),) if length else ()

    def part(self, whole: torch.Tensor) -> DTensor:
        """A whole tensor as a sharded one, of which this rank keeps its slice."""
        # from_local moves it to the mesh's device
        mine = whole.narrow(0, *self.rows(whole.shape[0])).clone()
        shape, stride = whole.shape, whole.contiguous().stride()
        return DTensor.from_local(mine, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """The inverse of `part`, on every rank. Collectives: one all-gather, of slices filled up to the largest."""
        if not isinstance(part, DTensor):
            return part
        mine, length = local_part(part), part.shape[0]
        filled = mine.new_zeros(-(-length // self.comm.size), *part.shape[1:])
        filled[: len(mine)] = mine
        return self.comm.all_gather(filled, 0, "parameters").wait()[:length].contiguous()

    # -- around passes -----------------------------------------------------------------------------------------------

    def give_back(self) -> None:
        """Give back what a forward pass without a backward left gathered; the model's parameters are sharded again.

        What stays gathered would be found again by the next pass, though the parameters may have changed.
        """
        for module in self._modules:
            module.reshard()


class Sharding(Shares):
    """The sharding of an `lss.model.Transformer`."""

    def __init__(
        self,
        model: Transformer,
        mesh: DeviceMesh,
        comm: Communicator,
        *,
        reshard: bool | str,
        ignored: Collection[nn.Parameter],
    ) -> None:
        # the gradient of an embedding that is not the head needs its rows' numbers, not its rows
        once = None if model.lm_head is None else model.embedding
        blocks = [*(model.source_blocks or ()), *model.blocks]
        super().__init__(model, mesh, comm, blocks, reshard=reshard, ignored=ignored, once=once)
        head = model.embedding if model.lm_head is None else model.lm_head
        self._head, self._final_norm = cast(DTensor, head.weight), model.final_norm
        model.register_forward_hook(self._after_forward)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The parameters of no block are whole inside. Collectives: one all-gather, if they are not already."""
        root = cast(FSDPModule, self._model)
        sharded = any(isinstance(p, DTensor) for p in self._final_norm.parameters())
        if sharded:
            root.unshard()
        try:
            yield
        finally:
            if sharded:
                root.reshard()

    def version(self) -> int:
        """Another value once the head's weights have changed, as far as torch counts: fused updates it does not."""
        return self._head._version

    def _after_forward(self, _module: nn.Module, _args: tuple, output: ModelOutput) -> ModelOutput:
        if torch.is_grad_enabled():
            if output.hidden.requires_grad:
                # between, another pass may have given back what is not a block's
                output.hidden.register_hook(self._before_backward)
        else:
            self.give_back()
        values = {f.name: getattr(output, f.name) for f in fields(output)}
        return ShardedOutput(**values, sharding=self, sharded_version=self.version())

    def _before_backward(self, grad: torch.Tensor) -> torch.Tensor:
        cast(FSDPModule, self._model).unshard()
        return grad


@dataclass(frozen=True)
class ShardedOutput(ModelOutput):
    """A sharded model's output. After backward, or without gradients, the first look at `logits` is a collective."""

    sharding: Sharding
    sharded_version: int

    @cached_property
    def logits(self) -> torch.Tensor:
        """hidden W^T; without a gradient where the head has been given back, as it has after backward.

        Collectives: there, one all-gather, so that every rank has to ask.
        """
        if self.sharding.version() != self.sharded_version:
            raise RuntimeError("logits: the weights have changed since the forward pass; ask for logits before the update.")
        if self.weight.untyped_storage().size():
            return super().logits
        with torch.no_grad(), self.sharding.gathered():
            return super().logits


class _Shard:
    """`fully_shard` with what all modules have in common."""

    def __init__(self, mesh: DeviceMesh, policy: MixedPrecisionPolicy, ignored: set[nn.Parameter]) -> None:
        self._mesh, self._policy, self._ignored = mesh, policy, ignored
        self._gather, self._scatter = GatherParameters(), ScatterGradients()

    def __call__(self, module: nn.Module, reshard: bool) -> FSDPModule:
        fully_shard(
            module, mesh=self._mesh, reshard_after_forward=reshard, mp_policy=self._policy, ignored_params=self._ignored
        )
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)
        # dividing by another number than that of the ranks is otherwise an operation that only NCCL has
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_custom_all_gather(self._gather)  # type: ignore[arg-type]
        sharded.set_custom_reduce_scatter(self._scatter)  # type: ignore[arg-type]
        return sharded
