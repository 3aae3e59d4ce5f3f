"""AdamW whose state lies in host memory: torch's own update of the CPU, between two copies.

torchao's CPUOffloadOptimizer takes gradients as backward makes them, before they are summed over ranks and clipped, and has
neither steps' hooks nor a state by parameter that a checkpoint could hold. FSDP2's CPUOffloadPolicy moves the weights too,
and reads them from the host in every forward and backward. Here the weights stay, and gradients leave when they are whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lss.checkpoint.layout import local_of
from lss.offload import HostTier

# Large enough for full speed on the link, small enough that copies of one hide behind the update of another.
BUCKET_BYTES = 64 << 20
_NO_LIMIT = 1 << 62


@dataclass(eq=False)
class _Bucket:
    """Parameters that are updated together: `homes` are their copies on the host, views of `weights`."""

    parameters: list[nn.Parameter]
    decay: float
    weights: torch.Tensor
    homes: list[torch.Tensor] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)  # versions of the parameters whose values the homes have

    @property
    def elements(self) -> int:
        return sum(local_of(p).numel() for p in self.parameters)


class HostAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` over copies in host memory of what this rank holds of each parameter.

    A step goes bucket by bucket: gradients are copied to the host, the host updates its copies, these are copied to the
    device. Copies run on streams of their own, one for each direction, while another bucket is updated; gradients are read
    where `step` is called, so that they may be summed over ranks and clipped on the device before. Values are those of
    torch's fused update on the CPU.

    Its groups and its `state` are of the copies, which `home` gives for a parameter. A parameter that was changed by others
    in place, as loading does, is copied anew.

    Args:
        groups: {"params", "weight_decay"} of parameters of one floating dtype and device, DTensors among them.
        bucket_bytes: size from which on a bucket is closed.

    Memory: on the host 3 copies of this rank's parameters and gradients of two buckets, pinned where the device is a GPU;
    on the device nothing.

    Raises:
        Failed: host memory that cannot be pinned.
    """

    saved_as = "AdamW"  # in checkpoints, which go on in either place

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], *, lr: float, betas: tuple[float, float], eps: float,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:  # fmt: skip
        groups = list(groups)
        first = next(p for group in groups for p in group["params"])
        self._tier = HostTier(local_of(first).device, _NO_LIMIT)
        self._buckets = [bucket for group in groups for bucket in self._fill(group, bucket_bytes)]
        largest = max(bucket.elements for bucket in self._buckets)
        # gradients on their way: while those of one bucket are used the next one's come
        self._staging = [self._buffer(largest, first.dtype) for _ in self._buckets[:2]]
        self._homes = {p: home for b in self._buckets for p, home in zip(b.parameters, b.homes, strict=True)}
        own = [{"params": bucket.homes, "weight_decay": bucket.decay} for bucket in self._buckets]
        super().__init__(own, lr=lr, betas=betas, eps=eps, fused=True)
        self._each = [torch.optim.AdamW(bucket.homes, fused=True) for bucket in self._buckets]
        for one, group in zip(self._each, self.param_groups, strict=True):
            one.param_groups, one.state = [group], self.state

    def home(self, parameter: torch.Tensor) -> torch.Tensor:
        """The copy on the host of what this rank holds of a parameter, by which its state is kept."""
        return self._homes[parameter]  # type: ignore[index]

    def buffers(self) -> list[torch.Tensor]:
        """All host memory that it takes."""
        states = [x for entry in self.state.values() for x in entry.values() if isinstance(x, torch.Tensor)]
        return [*(bucket.weights for bucket in self._buckets), *self._staging, *states]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. The current stream waits for the new values; the host does not."""
        assert closure is None, "a closure would compute gradients that have not been summed"
        coming = [self._fetch(number) for number in (0, 1)]
        sent = None
        for number, one in enumerate(self._each):
            if coming[number] is not None:
                coming[number].synchronize()
            one.step()
            sent = self._send(self._buckets[number]) or sent
            coming.append(self._fetch(number + 2))
        self._tier.wait_here(sent)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let the gradients of the parameters go, or make them 0."""
        for parameter in self._homes:
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()

    def _fill(self, group: Mapping[str, Any], bucket_bytes: int) -> list[_Bucket]:
        runs: list[list[nn.Parameter]] = []
        room = 0
        for p in group["params"]:
            size = local_of(p).numel() * p.element_size()
            if not runs or size > room:
                runs, room = [*runs, []], bucket_bytes
            runs[-1].append(p)
            room -= size
        buckets = []
        for run in runs:
            parts = [local_of(p) for p in run]
            weights = self._buffer(sum(part.numel() for part in parts), run[0].dtype)
            bucket = _Bucket(run, group["weight_decay"], weights, _views(weights, parts), [-1] * len(run))
            self._refresh(bucket)
            buckets.append(bucket)
        return buckets

    def _buffer(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        if not elements:
            return torch.empty(0, dtype=dtype)
        found = self._tier.buffer(elements * dtype.itemsize)
        assert found is not None, "without a limit there is room"
        return found[0].view(dtype)

    def _refresh(self, bucket: _Bucket) -> Any:
        """Copy parameters that have changed since they were sent; returns the event of the end, None where none is."""
        event = None
        for number, (p, home) in enumerate(zip(bucket.parameters, bucket.homes, strict=True)):
            part = local_of(p)
            if part._version != bucket.seen[number]:
                event = self._tier.copy(home, part, (self._tier.now(),))
                bucket.seen[number] = part._version
        return event

    def _fetch(self, number: int) -> Any:
        """Begin to copy a bucket's gradients to the host; returns the event of their end."""
        if number >= len(self._buckets):
            return None
        bucket = self._buckets[number]
        event, now = self._refresh(bucket), self._tier.now()
        for p, home, place in zip(bucket.parameters, bucket.homes, self._places(number), strict=True):
            home.grad = None
            if p.grad is not None:
                event = self._tier.copy(place, local_of(p.grad), (now,))
                home.grad = place
        return event

    def _places(self, number: int) -> list[torch.Tensor]:
        return _views(self._staging[number % 2], self._buckets[number].homes)

    def _send(self, bucket: _Bucket) -> Any:
        """Begin to copy what was updated to the device; returns the event of the end."""
        event = None
        for number, (p, home) in enumerate(zip(bucket.parameters, bucket.homes, strict=True)):
            if home.grad is not None:
                part = local_of(p)
                event = self._tier.copy(part, home, ())
                bucket.seen[number] = part._version
        return event


def _views(flat: torch.Tensor, like: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Parts of a buffer, one after another, in the shapes of these tensors."""
    found, start = [], 0
    for x in like:
        found.append(flat[start : start + x.numel()].view(x.shape))
        start += x.numel()
    return found
