"""A training step of any rank of any mesh, traced without data: the product's own code under fake tensors.

The process group is torch's fake one, which moves nothing; tensors have shapes and no storage. What is read from the trace
is what the code did: allocations, collectives. There is no second set of formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.flop_counter import flop_registry

from lss.comm import communicator, count_collectives, cp_communicator
from lss.comm.counter import Tally, listening
from lss.config import Config
from lss.config.errors import Refused
from lss.data.reader import Batch
from lss.mesh import init_mesh
from lss.model import Transformer
from lss.parallel import Layout, clip_grad_norm_, layout_of
from lss.planner.fakes import QuickFakes
from lss.planner.ledger import Ledger, Peak
from lss.train.host_optim import HostAdamW
from lss.train.models import lay_out
from lss.train.optim import STATE_PART, build_optimizer
from lss.train.steps import accumulate_gradients, parameter_dtype

# operator -> the one whose formula torch has; gradients of the head's weight are added up in place
# Host memory of a planned run: all that its activations ask for.
ENOUGH_GIB = 1 << 20
_PRODUCTS = {op: op for op in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)}
_PRODUCTS[torch.ops.aten.addmm_] = torch.ops.aten.addmm


@dataclass(frozen=True)
class StepTrace:
    """What one rank does in one training step.

    Attributes:
        peak: the moment of most memory, by class.
        timeline: (phase, bytes live on the device) after each change.
        collectives: calls, elements and bytes by (kind, purpose, link).
        steady: bytes of weights, gradients and optimizer state on the device, which are there at any length.
        products: FLOPs of matrix products, attention's own not among them.
    """

    peak: Peak
    timeline: list[tuple[str, int]]
    collectives: dict[tuple[str, str, str | None], Tally]
    steady: int
    products: int


class Products:
    """Counts the FLOPs of matrix products, by torch's own formulas; attention's operators are not among them."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """As a ledger tells of an operation."""
        product = _PRODUCTS.get(func.overloadpacket)
        if product is not None:
            self.flops += flop_registry[product](*args, **kwargs, out_val=out)


def trace_step(
    config: Config, *, rank: int = 0, ranks_per_node: int | None = None, granularity: int = 1, ledger: Ledger | None = None,
    stands_for: tuple[int, int] | None = None, fakes: QuickFakes | None = None,
) -> StepTrace:  # fmt: skip
    """Trace one step of `rank` in a run of this config, resolved for its number of ranks.

    No process group may be there; a fake one is made and ended. Tensors are those of a CPU. What `torch.compile` would fuse
    is traced as it stands.

    Args:
        ranks_per_node: neighbours that share a host; all by default.
        granularity: bytes that an allocation is rounded up to.
        ledger: takes the notes, where they are wanted beyond what is returned.
        stands_for: `Layout.stand_for` of a longer sequence; by default none.
        fakes: those of earlier traces, which know operations already.

    Raises:
        Refused: packed documents, whose lengths are not known before they are read; or what the layout refuses.
    """
    if config.data.packing:
        raise Refused("data.packing=true: the lengths of documents are not known before they are read; plan with false.")
    config = replace(config, train=replace(config.train, compile=False))
    if config.memory.offload_gib == "auto":  # this machine's memory is not the planned one's
        config = replace(config, memory=replace(config.memory, offload_gib=ENOUGH_GIB))
    with _fake_mesh(config, rank, ranks_per_node) as mesh:
        fake = fakes or QuickFakes()
        # sharding makes an empty tensor for each rank and parameter: on "meta" in a hundredth of the time of a fake one
        made_on = torch.device("meta") if config.parallel.fsdp else fake
        with made_on, torch.random.fork_rng(devices=[]), _default_dtype(parameter_dtype(config.train.dtype)):
            model = lay_out(config, Transformer(config.model, config.data.seq_len), mesh)
        if stands_for is not None:
            layout = layout_of(model)
            assert isinstance(layout, Layout), "models of transformers are not traced"
            layout.stand_for(*stands_for)
        with fake:
            if config.parallel.fsdp:
                model.to_empty(device="cpu")
            return run_step(config, model, granularity=granularity, ledger=ledger)


def run_step(config: Config, model: nn.Module, *, granularity: int = 1, ledger: Ledger | None = None) -> StepTrace:
    """One step of a model that has been laid out, on real tensors or fake ones, under a ledger.

    The optimizer's state is there from the start, as it is from the second step of a run on.
    """
    ledger = ledger or Ledger(granularity, config.model.vocab_size)
    # a trace cannot run what is compiled: AdamW's state stands for that of 8 bits, and is counted as the part that it takes
    low_bit = config.optim.name == "adamw8bit"
    optimizer = build_optimizer(
        model, replace(config.optim, name="adamw") if low_bit else config.optim, config.memory.optimizer
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batches, count = [synthetic_batch(config, model) for _ in range(config.train.accumulate)], torch.ones(())
    ledger.on_operation = products = Products()
    with count_collectives() as counter, noted(ledger, model, optimizer):
        accumulate_gradients(model, batches, config, step=1, count=count)
        ledger.enter("update")
        clip_grad_norm_(model, config.optim.clip)
        optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if low_bit:
        ledger.shrink("optimizer", STATE_PART["adamw8bit"])
    state = 0 if isinstance(optimizer, HostAdamW) else sum(x.numel() * x.element_size() for x in _state(optimizer))
    steady = sum(x.numel() * x.element_size() for x in chain(model.parameters(), gradients))
    steady += round(STATE_PART["adamw8bit"] * state) if low_bit else state
    return StepTrace(ledger.peak(), ledger.timeline(), dict(counter.tallies), steady, products.flops)


@contextmanager
def noted(ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A ledger takes notes of the step inside: it is told of what is there before, of gradients, and of the step's parts.

    Nothing that is computed changes by it. What compiled code makes inside is not noted.
    """
    ledger.own("weights", chain(model.parameters(), model.buffers()))
    _own_state(ledger, optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]  # beside adapters all else is frozen
    hooks: list[Any] = [p.register_post_accumulate_grad_hook(lambda q: ledger.own("gradients", [q.grad])) for p in trained]
    hooks += [model.register_forward_pre_hook(lambda *_: ledger.enter("forward")),
              model.register_forward_hook(lambda *_: ledger.enter("backward")),
              optimizer.register_step_pre_hook(lambda *_: ledger.enter("update"))]  # fmt: skip
    try:
        with listening(ledger), ledger:
            yield
        ledger.closed = True
    finally:
        for handle in hooks:
            handle.remove()
    _own_state(ledger, optimizer)  # which a run's first step makes
    offloader = layout_of(model).offloader
    for tier in offloader.tiers if offloader is not None else ():
        ledger.own("host", tier.buffers())


def _own_state(ledger: Ledger, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, HostAdamW):
        ledger.own("host", optimizer.buffers())
    else:
        ledger.own("optimizer", _state(optimizer))


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All tensors of its state; of those of 8 bits their parts."""
    found: list[torch.Tensor] = []
    for entry in optimizer.state.values():
        for x in entry.values():
            if isinstance(x, torch.Tensor):
                quantized = getattr(x, "_local_tensor", x)
                parts = ("codes", "scale", "qmap")
                found += [getattr(quantized, part) for part in parts] if hasattr(quantized, "codes") else [x]
    return found


def synthetic_batch(config: Config, model: nn.Module) -> Batch:
    """A micro-batch of zeros in the shapes of this rank's."""
    layout = layout_of(model)
    segment = layout.segment(config.data.seq_len)
    rows, T = config.train.batch_size // config.train.accumulate // layout.dp.size, segment.local_len
    zeros, slots = torch.zeros(rows, T, dtype=torch.int64), torch.arange(rows)
    source, source_segment = None, None
    if config.model.kind == "encoder_decoder":
        assert isinstance(layout, Layout), "models of transformers are not traced"
        source_segment = layout.source_segment(-(-config.data.seq_len // config.data.source_every))
        source = torch.zeros(rows, source_segment.local_len, dtype=torch.int64)
    return Batch(zeros, zeros.clone(), segment.positions, slots, slots, None, segment, source, source_segment)


@contextmanager
def _fake_mesh(config: Config, rank: int, ranks_per_node: int | None) -> Iterator[DeviceMesh]:
    # torch's testing module is the only place where its fake process group can be had
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cp, dp = config.parallel.cp, config.parallel.dp
    assert isinstance(cp, int), "resolve the config first"
    assert not dist.is_initialized(), "a trace makes its own process group"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=cp * dp)
    try:
        mesh = init_mesh(cp=cp, dp=dp, device_type="cpu", ranks_per_node=ranks_per_node or cp * dp)
        # groups are made by computing on ranks, which tensors without data cannot do; they are kept with the mesh
        cp_communicator(mesh)
        for axes in (("dp",), ("dp", "cp")):
            communicator(mesh, axes)
        yield mesh
    finally:
        # not `lss.mesh.close`, which looks for garbage that holds groups of gloo: of this one nothing is left running
        dist.destroy_process_group()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
