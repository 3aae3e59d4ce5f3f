"""Tensors without data, made quickly: torch's fake tensors, whose operations are looked up once for each set of shapes.

A trace of a step is mostly the same operations over and over, a tile or a layer after another. Torch's own cache asks
seventeen things of each operand, which takes a third of a millisecond an operation; here a few are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_DEVICE = torch.ops.prim.device.default
# Arguments that are alike where they are equal and of one type.
_VALUES = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))
# How an output comes about: the number of the operand that it is, or (the number of the operand whose storage it has, None
# where its storage is new; dtype, shape, stride, offset, device).
_Made = tuple[int | None, torch.dtype, tuple[int, ...], tuple[int, ...], int, torch.device]
_How = tuple[Callable[[list[Any]], Any] | None, list[int | _Made]]


class QuickFakes(FakeTensorMode):
    """A `FakeTensorMode` that repeats itself: an operation on fake tensors of dtypes, shapes, strides and offsets that it
    had before, with otherwise equal arguments, has outputs like those it had.

    Repeated are operations whose outputs are operands, views of operands, or new and nobody else's. All others, and those
    on tensors with data, are torch's each time. Tensors with data are let in.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._seen: dict[Any, _How | None] = {}
        self._alike: dict[str, Any] | None = None  # what torch gives its fake tensors as attributes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here: torch need not keep its compiler away, which takes a while each time."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As torch calls it, for each operation."""
        if func is _DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        try:
            key = func, torch.get_default_dtype(), self._key(args), self._key(kwargs), self._key(kwargs.values())
        except _Unlike:
            return super().__torch_dispatch__(func, types, args, kwargs)
        operands = (*args, *kwargs.values()) if kwargs else args
        if key not in self._seen:
            before = self._key(operands)
            out = super().__torch_dispatch__(func, types, args, kwargs)
            self._seen[key] = self._how(operands, out) if before == self._key(operands) else None
            return out
        how = self._seen[key]
        if how is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        several, outputs = how
        found = [operands[made] if isinstance(made, int) else self._make(operands, *made) for made in outputs]
        return found[0] if several is None else several(found)

    def _key(self, args: Iterable[Any]) -> tuple[Any, ...]:
        """What tells arguments apart.

        Raises:
            _Unlike: one has data, or is of a kind that is not known.
        """
        parts: list[Any] = []
        for x in args:
            kind = type(x)
            if kind is FakeTensor:
                if x.constant is not None or x.fake_mode is not self:
                    raise _Unlike
                parts.append((x.dtype, x.shape, x.stride(), x.storage_offset(), x.fake_device))
            elif kind in _VALUES:
                parts.append((kind, x))
            elif kind is tuple or kind is list:
                parts.append((kind, self._key(x)))
            else:
                raise _Unlike
        return tuple(parts)

    def _how(self, operands: Sequence[Any], out: Any) -> _How | None:
        """How the outputs came about; None where they cannot be repeated."""
        several = type(out) if type(out) in (tuple, list) else None
        outputs, storages = out if several else [out], [_storage(x) for x in operands]
        made: list[int | _Made] = []
        for x in outputs:
            own = [number for number, operand in enumerate(operands) if operand is x]
            if own and type(x) is FakeTensor:
                made.append(own[0])
                continue
            if type(x) is not FakeTensor or x.constant is not None or x.requires_grad:
                return None
            storage, shape, stride = _storage(x), tuple(x.shape), x.stride()
            source = storages.index(storage) if storage in storages else None
            if source is None:
                last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
                alone = [_storage(y) for y in outputs].count(storage) == 1
                whole = x.untyped_storage().nbytes() == (last + 1 if x.numel() else 0) * x.element_size()
                if x.storage_offset() or not alone or not whole:
                    return None
            offset = x.storage_offset()
            if not isinstance(offset, int):
                return None
            made.append((source, x.dtype, shape, stride, offset, x.fake_device))
        return several, made

    def _make(
        self, operands: Sequence[Any], source: int | None, dtype: torch.dtype, shape: tuple[int, ...],
        stride: tuple[int, ...], offset: int, device: torch.device,
    ) -> FakeTensor:  # fmt: skip
        # without a storage, where it is to have another's
        empty = torch.empty_strided(shape if source is None else (0,), stride if source is None else (1,), dtype=dtype,
                                    device="meta")  # fmt: skip
        if source is not None:
            empty.set_(operands[source].untyped_storage(), offset, shape, stride)
        if self._alike is None:
            self._alike = dict(vars(FakeTensor(self, empty, device)))
        # as FakeTensor makes itself, in a third of the time
        fake = torch.Tensor._make_subclass(FakeTensor, empty, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self._alike, fake_device=device)
        return fake


class _Unlike(Exception):
    """These arguments tell nothing of others."""


def _storage(x: Any) -> int | None:
    """Which storage it has; None for what is no fake tensor."""
    return x.untyped_storage()._cdata if type(x) is FakeTensor else None
