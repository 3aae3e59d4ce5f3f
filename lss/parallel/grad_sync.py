"""Summing gradients over ranks while backward still runs.

Every rank's backward gives the gradient of the global loss by its own tokens; the parameter's gradient is their *sum*
(see `lss.context_parallel.loss`). A parameter that all ranks hold is summed over dp x cp; one that is cut over the cp
axis (position rows, tensor-parallel weights) only over dp.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator, Pending
from lss.mesh import axis_group
from lss.parallel.local import local_part

# Large enough to keep a link busy, small enough that the first leaves long before backward ends.
BUCKET_BYTES = 25 << 20


@dataclass(eq=False)
class _Bucket:
    """Parameters whose gradients travel together.

    They are not held: torch holds a parameter's hooks where Python's garbage collector does not look, so that a hook which
    leads back to its parameter would keep the model's weights and gradients for good.
    """

    comm: Communicator
    held: list[weakref.ref[nn.Parameter]] = field(default_factory=list)
    arrived: set[int] = field(default_factory=set)
    pending: Pending[torch.Tensor] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for ref in self.held if (p := ref()) is not None]

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.parameters[0].dtype, torch.float32)


class GradSync:
    """Reduces gradients in buckets, each as soon as its last gradient of the backward pass has arrived.

    Args:
        groups: (parameters, group to sum over), the parameters in the order of the model. Buckets are filled from the
            last parameter to the first, which is the order gradients arrive in, and leave in that order on every rank.
        bucket_bytes: size from which on a bucket is closed.

    Collectives: one all-reduce per bucket and backward pass of its elements plus one flag per parameter; in float32
    for half precision gradients. A group of one rank costs nothing.
    Memory: gradients become views of the buffer that they are summed in, where their dtype is its, so they are held once.
    """

    def __init__(
        self, groups: Sequence[tuple[Sequence[nn.Parameter], Communicator]], bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._buckets = [
            bucket for parameters, comm in groups if comm.size > 1 for bucket in _fill(parameters, comm, bucket_bytes)
        ]
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._paused = False
        self._next = 0
        self._scheduled = False
        self._synced: dict[int, tuple[weakref.ref, int]] = {}
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate locally: for every micro-batch of a step but the last."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._paused:
            return
        self._refuse_second_sum(parameter)
        if not self._scheduled:
            self._scheduled = True
            # runs when this backward pass ends, as torch's own data parallel wrappers have it
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._bucket_of[id(parameter)].arrived.add(id(parameter))
        self._launch(only_full=True)

    def _refuse_second_sum(self, parameter: nn.Parameter) -> None:
        """A summed gradient that was added to would be summed again: cp*dp times too large, and nothing would show it."""
        grad_ref, version = self._synced.get(id(parameter), (None, -1))
        grad = parameter.grad
        if grad is not None and grad_ref is not None and grad_ref() is grad and grad._version == version + 1:
            raise RuntimeError(
                "backward() ran twice without zero_grad() between, so gradients already summed over ranks would be "
                "summed again: run every micro-batch but the last under `with model.no_sync():`."
            )

    def _launch(self, *, only_full: bool) -> None:
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if only_full and len(bucket.arrived) < len(bucket.held):
                return
            bucket.pending = bucket.comm.all_reduce(_pack(bucket), "gradients")
            self._next += 1

    def _finish(self) -> None:
        self._launch(only_full=False)
        self._next, self._scheduled = 0, False
        for bucket in self._buckets:
            assert bucket.pending is not None
            _unpack(bucket, bucket.pending.wait())
            bucket.pending = None
            bucket.arrived.clear()
            for p in bucket.parameters:
                if p.grad is not None:
                    self._synced[id(p)] = (weakref.ref(p.grad), p.grad._version)


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Sum every parameter's gradient over all ranks of the mesh, in place, after backward.

    For a model of one's own that calls `lss.attention` and `lss.cross_entropy`; `lss.parallelize` does it by itself,
    and while backward runs. Torch's DistributedDataParallel would divide by the number of ranks, which is wrong here:
    `lss.cross_entropy` has divided by the global count already.

    Collectives: all-reduces over dp x cp, in buckets; float32 for half precision gradients.
    """
    comm = Communicator(axis_group(mesh, ("dp", "cp")))
    if comm.size == 1:
        return
    buckets = _fill(list(parameters), comm, BUCKET_BYTES)
    for bucket in buckets:
        bucket.pending = comm.all_reduce(_pack(bucket), "gradients")
    for bucket in buckets:
        assert bucket.pending is not None
        _unpack(bucket, bucket.pending.wait())


def _fill(parameters: Sequence[nn.Parameter], comm: Communicator, bucket_bytes: int) -> list[_Bucket]:
    """Buckets of one dtype and device each, from the last parameter to the first."""
    buckets: list[_Bucket] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[_Bucket, int]] = {}
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        key = (parameter.dtype, parameter.device)
        size = parameter.numel() * parameter.element_size()
        bucket, filled = open_buckets.get(key, (None, 0))
        if bucket is None or filled + size > bucket_bytes:
            bucket, filled = _Bucket(comm), 0
            buckets.append(bucket)
        bucket.held.append(weakref.ref(parameter))
        open_buckets[key] = (bucket, filled + size)
    return buckets


def _pack(bucket: _Bucket) -> torch.Tensor:
    """All gradients of a bucket in one buffer, then one flag each: 1 where this rank has a gradient."""
    flags = torch.ones(len(bucket.parameters), dtype=bucket.dtype, device=bucket.parameters[0].device)
    for number, parameter in enumerate(bucket.parameters):
        if parameter.grad is None:
            flags[number : number + 1].zero_()  # filled there: a copy from the host would wait for the device
    parts = [
        torch.zeros(p.numel(), dtype=bucket.dtype, device=p.device) if p.grad is None else p.grad.flatten().to(bucket.dtype)
        for p in bucket.parameters
    ]
    packed = torch.cat((*parts, flags))
    for parameter, part in zip(bucket.parameters, _parts(bucket, packed), strict=False):
        if parameter.grad is not None and parameter.dtype == bucket.dtype:
            # `.data`: a version of its own, by which a second sum over ranks is noticed
            parameter.grad = part.view_as(parameter).data
    return packed


def _parts(bucket: _Bucket, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each parameter's part of a bucket's buffer, then the flags."""
    sizes = [p.numel() for p in bucket.parameters]
    return packed.split((*sizes, len(sizes)))


def _unpack(bucket: _Bucket, summed: torch.Tensor) -> None:
    *parts, flags = _parts(bucket, summed)
    # a parameter that no rank used keeps no gradient, so that the optimizer passes over it as on one process
    used = [True] * len(parts) if all(p.grad is not None for p in bucket.parameters) else (flags > 0).tolist()
    for parameter, part, has_gradient in zip(bucket.parameters, parts, used, strict=True):
        if not has_gradient:
            continue
        if parameter.dtype == bucket.dtype:
            parameter.grad = part.view_as(parameter).data
        else:
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def global_grad_norm(groups: Sequence[tuple[Sequence[nn.Parameter], Communicator]]) -> torch.Tensor:
    """Euclidean norm of all gradients, each element of the model counted once: float64, equal on every rank.

    Args:
        groups: (parameters, group that the parameters are *cut* over; a group of one rank for those held whole).

    Collectives: one all-reduce of one number per cut group.
    """
    device = next((p.device for parameters, _ in groups for p in parameters), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameters, comm in groups:
        grads = [local_part(p.grad.detach()) for p in parameters if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=device)
        if grads:
            squares = torch.stack([norm.double() for norm in torch._foreach_norm(grads)]).square().sum()
        total = total + comm.all_reduce(squares, "gradient norm").wait()
    return total.sqrt()
