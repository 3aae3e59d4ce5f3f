"""Every allocation of a training step, by class and in order: what is live when, and what the peak is made of."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lss.hosts import out_of_memory
from lss.planner.fused import is_outside, makes_fused, reads_fused

# in the order in which they are shown
CLASSES = {
    "weights": "parameters and buffers of the model",
    "gradients": "gradients of parameters, and the buffers in which ranks sum them",
    "optimizer": "what the optimizer keeps of each parameter",
    "activations": "what forward keeps for backward",
    "gathered keys": "keys and values of other ranks' tokens, and their gradients",
    "logits": "tensors of tokens by vocabulary",
    "temporary": "what an operation makes and the next ones use up",
    "host": "host memory that activations and optimizer state are kept in; no memory of the device",
}
_DEVICE = torch.ops.prim.device.default  # which fake tensors are asked as if it were an operation
_PURPOSES = {"kv": "gathered keys", "dkv": "gathered keys", "gradients": "gradients"}


@dataclass(frozen=True)
class Peak:
    """The moment of most bytes on the device.

    Attributes:
        bytes: all that is live.
        phase: "forward", "backward" or "update".
        operation: the operator that made the last of it; "" of a step that was drawn out from those of few blocks.
        classes: bytes by class of `CLASSES`, the largest first, "host" apart.
        host: most bytes of host memory at any time.
    """

    bytes: int
    phase: str
    operation: str
    classes: dict[str, int]
    host: int


@dataclass(frozen=True)
class Shortage:
    """The moment at which an operation found no memory.

    Attributes:
        label: the class of what it was to make, as far as its operands tell; "" where they do not.
        phase, operation: as of a `Peak`.
        classes: bytes that were live, by class, the largest first.
    """

    label: str
    phase: str
    operation: str
    classes: dict[str, int]


@dataclass
class _Piece:
    bytes: int
    label: str
    phase: str
    fused: bool = False  # as far as is known, never written


@dataclass
class Ledger(TorchDispatchMode):
    """Notes every storage that operations make, from its making to its end. Works on real tensors and on fake ones.

    Use as a context manager around a step; tell it of what is there before by `own`, and of the step's parts by `enter`. It
    is a listener of `lss.comm`, which tells it whose buffers are a collective's.

    Args:
        granularity: bytes that each allocation is rounded up to: 512 as CUDA's caching allocator has it.
        vocabulary: V, by which logits are known; 0 where there are none.
        limit: bytes that may be live at once, the host's included, as if there were no more: what goes beyond raises
            MemoryError; 0 for any number.
        most_logits: bytes of logits that count at most at any time, 0 for all: a compiled softmax makes no more than the
            product and its gradient, however many tensors the same makes that is not compiled.
        fuses: leave out what `torch.compile` would not write (`lss.planner.fused`), of what forward and backward make.
        on_operation: called with each operation, its arguments and its outputs.
    """

    granularity: int = 1
    vocabulary: int = 0
    limit: int = 0
    most_logits: int = 0
    fuses: bool = False
    phase: str = "before"
    shortage: Shortage | None = None
    on_operation: Callable[[Any, Any, Any, Any], None] | None = None
    closed: bool = False  # what ends from here on is no part of the step
    _pieces: dict[int, _Piece] = field(default_factory=dict)
    _live: int = 0
    _alive: dict[int, int] = field(default_factory=dict)  # storage -> piece
    # (piece, or its complement when freed; phase; by what)
    _events: list[tuple[int, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs compiled: as it stands it would round otherwise, and FlexAttention make whole scores."""
        return True

    # -- what is noted ---------------------------------------------------------------------------------------------------

    def own(self, label: str, tensors: Iterable[torch.Tensor]) -> None:
        """These belong to a class, now and for as long as they live."""
        for tensor in tensors:
            self._note(tensor, "own", label)

    def enter(self, phase: str) -> None:
        """The next part of the step begins. What forward has made and is still there, it keeps for backward."""
        if self.phase == "forward" and phase == "backward":
            for number in self._alive.values():
                piece = self._pieces[number]
                if piece.phase == "forward" and piece.label == "temporary":
                    piece.label = "activations"
        self.phase = phase
        self._written(self._alive)

    def add(self, kind: str, purpose: str, payload: torch.Tensor, link: str | None = None) -> None:
        """A collective's buffer, by its purpose; as a listener of `lss.comm`."""
        if purpose in _PURPOSES:
            self._note(payload, "collective", _PURPOSES[purpose])

    def issued(self, pending: Any) -> None:
        """A ledger does not ask how calls end."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            out = func(*args, **(kwargs or {}))
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):  # noted here: on the way up what is live is freed
                self.shortage = self._shortage(str(func), args)
            raise
        if func is _DEVICE:
            return out
        if self.fuses and not reads_fused(func):
            self._written(self._alive if is_outside(func) else map(_key, _tensors((args, kwargs))))
        for x in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._note(x, func, None)
        if self.on_operation is not None:
            self.on_operation(func, args, kwargs or {}, out)
        return out

    def _note(self, tensor: torch.Tensor, operation: object, label: str | None) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)  # a distributed tensor's own part
        if not isinstance(tensor, torch._subclasses.FakeTensor) and tensor.device.type == "meta":
            return
        storage, key = tensor.untyped_storage(), _key(tensor)
        number = self._alive.get(key)
        if number is None:
            number = len(self._pieces)
            size = -(-storage.nbytes() // self.granularity) * self.granularity
            fused = self.fuses and label is None and self.phase in ("forward", "backward") and makes_fused(operation)
            label = label or self._guess(tensor)
            self._pieces[number] = _Piece(size, label, self.phase, fused and label == "temporary")
            self._alive[key] = number
            self._events.append((number, self.phase, str(operation)))
            weakref.finalize(storage, self._gone, key, number)
            self._live += size
            if self._live > self.limit > 0:
                raise MemoryError(f"out of memory: {self._live:,} bytes are live and {self.limit:,} may be")
        elif label is not None:
            self._pieces[number].label = label
            self._written([key])

    def _written(self, keys: Iterable[int]) -> None:
        """What has these storages is in memory."""
        for key in list(keys):
            if key in self._alive:
                self._pieces[self._alive[key]].fused = False

    def _guess(self, tensor: torch.Tensor) -> str:
        if not self.vocabulary or tensor.dim() != 2:
            return "temporary"
        # or turned over, as the gradient by the head's weight reads them; the weight itself lies the other way
        turned = tensor.shape[0] == self.vocabulary and tensor.stride(0) == 1
        return "logits" if turned or tensor.shape[1] == self.vocabulary else "temporary"

    def shrink(self, label: str, part: float) -> None:
        """Everything of a class takes this part of what it was noted as."""
        for piece in self._pieces.values():
            if piece.label == label:
                piece.bytes = round(part * piece.bytes)

    def _shortage(self, operation: str, args: Any) -> Shortage:
        shapes = [x.shape for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim() == 2]
        logits = self.vocabulary and "mm" in operation and any(self.vocabulary in shape for shape in shapes)
        live: Counter[str] = Counter()
        for number in self._alive.values():
            piece = self._pieces[number]
            kept = self.phase == piece.phase == "forward" and piece.label == "temporary"
            live["activations" if kept else piece.label] += piece.bytes
        label = "logits" if logits else "optimizer" if self.phase == "update" else ""
        return Shortage(label, self.phase, operation, {name: n for name, n in live.most_common() if n and name != "host"})

    def _gone(self, key: int, number: int) -> None:
        if self._alive.get(key) == number and not self.closed:
            del self._alive[key]
            self._live -= self._pieces[number].bytes
            self._events.append((~number, self.phase, ""))

    def forget(self) -> None:
        """Leave what only a step under way needs: what remains can be sent to another process."""
        self.closed, self.on_operation = True, None
        self._alive.clear()

    # -- what comes of it ------------------------------------------------------------------------------------------------

    def changes(self) -> Iterator[tuple[str, str, str, int]]:
        """(phase, operation, class, bytes) of all that is made; of all that ends, with its bytes below 0.

        An end has no operation: in its place is the phase in which what ends was made.
        """
        for number, phase, operation in self._events:
            piece = self._pieces[number if number >= 0 else ~number]
            if piece.fused:
                continue
            if number >= 0:
                yield phase, operation, piece.label, piece.bytes
            else:
                yield phase, piece.phase, piece.label, -piece.bytes

    def timeline(self) -> list[tuple[str, int]]:
        """(phase, bytes live on the device) after each change."""
        total, line = 0, []
        for phase, _, label, size in self.changes():
            if label == "host":
                continue
            total += size
            line.append((phase, total))
        return line

    def peak(self) -> Peak:
        """The moment of most bytes."""
        live: Counter[str] = Counter()
        best, moment, total, host = 0, (Counter(), "before", ""), 0, 0
        for phase, operation, label, size in self.changes():
            live[label] += size
            if label == "host":
                host = max(host, live["host"])
                continue
            total += size
            over = max(0, live["logits"] - self.most_logits) if self.most_logits else 0
            if total - over > best:
                best, moment = total - over, (live.copy(), phase, operation)
                moment[0]["logits"] -= over
        classes, phase, operation = moment
        ordered = {name: n for name, n in classes.most_common() if n and name != "host"}
        return Peak(best, phase, operation, ordered, host)


def _key(tensor: torch.Tensor) -> int:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata


def _tensors(of: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(of) if isinstance(x, torch.Tensor)]


def stretch(short: Ledger, long: Ledger, factor: float, logits: int) -> Ledger:
    """The ledger of a step of another length, from those of two that make the same allocations in the same order.

    Every allocation is taken to grow linearly with the length.

    Args:
        factor: how far to go: 0 is the short one's length, 1 the long one's.
        logits: bytes that no single allocation of logits exceeds, however long.

    Raises:
        ValueError: the two do not make the same allocations.
    """
    events = short._events
    if not _alike(events, long._events):
        # what was there before the step may outlive one of the two in a cache: it then stays in both
        events, others = ([event for event in ledger._events if event[0] >= 0 or ledger._pieces[~event[0]].phase != "before"]
                          for ledger in (short, long))  # fmt: skip
        if not _alike(events, others):
            raise ValueError("the two steps do not make the same allocations")
    found = Ledger(short.granularity, short.vocabulary, most_logits=long.most_logits)
    for number, piece in short._pieces.items():
        size = round(piece.bytes + factor * (long._pieces[number].bytes - piece.bytes))
        size = min(size, logits) if piece.label == "logits" else size
        found._pieces[number] = replace(piece, bytes=size)
    found._events = list(events)
    return found


def _alike(some: list[tuple[int, str, str]], others: list[tuple[int, str, str]]) -> bool:
    return [event[:2] for event in some] == [event[:2] for event in others]
