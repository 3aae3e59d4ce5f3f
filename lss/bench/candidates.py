"""What `lss bench attention` can measure: our variants, one-device kernels, and the rivals' entries."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from lss.bench.rival import Rival
from lss.bench.timing import Clock
from lss.comm import Communicator
from lss.config.errors import Refused, refuse
from lss.context_parallel import STRATEGIES, AttentionOptions, attend, make_spec
from lss.context_parallel.lss import open_transport
from lss.kernels import KERNELS, Rules, pick_kernel, single_attention
from lss.kernels.merge import empty_lse
from lss.segment import Segment, make_segment

ONE_DEVICE = "one device"
# Kernels for what no fused one can do: as a yardstick they would be slow, or not fit in memory. Measured where named.
_PLAIN = ("tiled", "reference", "flex")
# Overrides that round more than the one-device kernel does: their error is a result, and bounded by the dtype's cap.
_ROUNDING = ("dkv_dtype",)

StepResults = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Step = Callable[[], StepResults]


@dataclass(frozen=True)
class Inputs:
    """What a candidate computes on: q, k, v and dout of some tokens, and the tokens' global positions (T,)."""

    seq_len: int
    q_BTNH: torch.Tensor
    k_BTKH: torch.Tensor
    v_BTKH: torch.Tensor
    dout_BTNH: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True)
class Candidate:
    """One thing to measure.

    Attributes:
        order: in which order its tokens lie; "whole": every rank computes the whole sequence on its own device.
        prepare: makes the step, forward and backward on this rank's tokens, which returns (out, dq, dk, dv).
        without_comm: makes the step of the same local calls on keys and values that are there already, or None.
        missing: why it cannot run at all.
    """

    strategy: str | None
    kernel: str | None
    order: str
    prepare: Callable[[Inputs], Step] | None
    rival: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    without_comm: Callable[[Inputs], Step] | None = None
    missing: str | None = None

    @property
    def name(self) -> str:
        """What it is called in progress lines and picked by with `--only`."""
        own = json.dumps(self.options)[1:-1].replace('"', "").replace(": ", "=") if self.options else ""
        order = "" if self.order == "whole" else self.order
        return " ".join(word for word in (self.rival, self.strategy, self.kernel, order, own) if word)

    @property
    def strict(self) -> bool:
        """Whether it is held to a one-device kernel's own error: LSS is, where it was not asked to round more.

        Our twins of the rivals' algorithms are not: a ring rounds wherever it merges, which is its nature.
        """
        lss = self.rival is None and str(self.strategy).startswith("lss")
        return lss and not any(name in self.options for name in _ROUNDING)


# -- ours --------------------------------------------------------------------------------------------------------------


def parse_options(text: str) -> dict[str, Any]:
    """"head_chunks=8;regather=false" as values of `AttentionOptions`.

    Raises:
        Refused: a name that it does not have, or a word for `regather` that is none of its values.
    """
    known = {f.name: f.default for f in dataclasses.fields(AttentionOptions)}
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, word = (piece.strip() for piece in part.partition("="))
        if not equals or name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise refuse("--options", part, f"write name=value with one of {', '.join(known)}; nearest is {near}")
        found[name] = _value(word)
        if name == "regather" and found[name] != "auto" and not isinstance(found[name], bool):
            raise refuse("--options", part, "use true, false or auto")
    return found


def _value(word: str) -> Any:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if word.lower() in ("none", "null"):
        return None
    try:
        return int(word)
    except ValueError:
        return word


def our_candidates(
    strategies: Sequence[str], kernels: Sequence[str], orders: Sequence[str], options: Iterable[dict[str, Any]],
    shape_BTNH: torch.Tensor, comm: Communicator,
) -> list[Candidate]:  # fmt: skip
    """Every strategy with every kernel and order, and each set of options on those of them that are ours proper.

    "auto" becomes the kernel that is chosen, so that a row says what ran.

    Args:
        shape_BTNH: a tensor like the queries (it may be expanded from one element), for the choice of kernels.
    """
    found: dict[str, Candidate] = {}
    variants: list[tuple[str, dict[str, Any]]] = [(strategy, {}) for strategy in strategies]
    for extra in options:
        # the rivals' algorithms have none of these; a set may name its strategy itself
        chosen = [extra["strategy"]] if "strategy" in extra else [s for s in strategies if s.startswith("lss")]
        variants += [(strategy, extra) for strategy in chosen]
    for strategy, extra in variants:
        if strategy not in STRATEGIES:
            raise refuse("strategy", strategy, f"unknown; use one of {', '.join(STRATEGIES)}")
        for kernel in [extra["kernel"]] if "kernel" in extra else kernels:
            name, missing = _resolve(kernel, shape_BTNH)
            for order in orders:
                own = {key: value for key, value in extra.items() if key not in ("strategy", "kernel")}
                chosen_options = AttentionOptions(**{"strategy": strategy, "kernel": name, **own})
                ours = partial(_prepare_ours, options=chosen_options, order=order, comm=comm)
                local = partial(_prepare_local, options=chosen_options, order=order, comm=comm)
                alone = strategy == "lss" and comm.size > 1
                candidate = Candidate(
                    strategy, name, order, ours, options=own, missing=missing, without_comm=local if alone else None,
                )  # fmt: skip
                found.setdefault(candidate.name, candidate)
    return list(found.values())


def _resolve(kernel: str, shape_BTNH: torch.Tensor) -> tuple[str, str | None]:
    """(the kernel that this choice means, None), or (the choice, why it does not fit)."""
    try:
        return pick_kernel(kernel, shape_BTNH).name, None
    except Refused as refusal:
        return kernel, str(refusal)


def _segment(inputs: Inputs, order: str, comm: Communicator) -> Segment:
    return make_segment(inputs.seq_len, cp=comm.size, rank=comm.rank, order=order)


def _prepare_ours(inputs: Inputs, *, options: AttentionOptions, order: str, comm: Communicator) -> Step:
    segment = _segment(inputs, order, comm)

    def call(q, k, v):
        return attend(q, k, v, Rules(causal=True), segment=segment, comm=comm, options=options)

    return _differentiated(call, inputs)


def _prepare_local(inputs: Inputs, *, options: AttentionOptions, order: str, comm: Communicator) -> Step:
    """LSS attention with its communication left out: the same kernel calls, on keys and values that are there already.

    Nothing is gathered or scattered in a step; dK and dV stay those of the fetched keys, unsummed. This is the one place
    that repeats what `lss.context_parallel.lss` does between its collectives.
    """
    q, k, v, dout = (x.detach() for x in (inputs.q_BTNH, inputs.k_BTKH, inputs.v_BTKH, inputs.dout_BTNH))
    segment = _segment(inputs, order, comm)
    spec = make_spec(q, k, Rules(causal=True), segment=segment, comm=comm, options=options)
    groups, transport = spec.head_groups(q.shape[2], k.shape[2]), open_transport(spec, k)
    fetched = []
    for _, heads in groups:
        keys, values = transport.gather(k[:, :, heads], v[:, :, heads]).wait()
        fetched.append((keys.clone(), values.clone()))
        transport.release()
    summed = spec.work.schedule(transport.runs, q.shape[1], transport.length).dq_summed

    def step() -> StepResults:
        out, lse = torch.empty_like(q), empty_lse(q)
        for (heads, _), (keys, values) in zip(groups, fetched, strict=True):
            places, work = (out[:, :, heads], lse[:, heads]), spec.work.of_heads(heads)
            work.forward(*places, q[:, :, heads], keys, values, transport.runs, together=transport.together(keys))
        dq = torch.empty_like(q, dtype=lse.dtype if summed else q.dtype)
        for (heads, _), (keys, values) in zip(groups, fetched, strict=True):
            (dk, dv), *more = [transport.split(room) for room in transport.new_dkv(keys)]
            given = dout[:, :, heads], q[:, :, heads], keys, values, out[:, :, heads], lse[:, heads]
            how = {"more": more, "together": transport.together(keys)}
            spec.work.of_heads(heads).backward(dq[:, :, heads], dk, dv, *given, transport.runs, **how)
        return out, dq.to(q.dtype), dk, dv

    return step


# -- one device --------------------------------------------------------------------------------------------------------


def one_device_candidates(
    kernels: Sequence[str], shape_BTNH: torch.Tensor, yardsticks: Sequence[str] = ()
) -> list[Candidate]:
    """Every fused kernel that takes these queries, or the yardsticks alone, and those named among `kernels`.

    The fastest is what `ideal_ms` comes from.
    """
    named = {_resolve(kernel, shape_BTNH)[0] for kernel in (*kernels, *yardsticks)}
    wanted = [name for name in KERNELS if name in named or (name not in _PLAIN and not yardsticks)]
    fitting = [name for name in wanted if _resolve(name, shape_BTNH)[1] is None]
    return [Candidate(ONE_DEVICE, name, "whole", partial(_prepare_whole, kernel=name)) for name in fitting]


def _prepare_whole(inputs: Inputs, *, kernel: str) -> Step:
    return _differentiated(partial(single_attention, rules=Rules(causal=True), kernel=kernel), inputs)


# -- rivals ------------------------------------------------------------------------------------------------------------


def rival_candidates(rivals: Sequence[Rival], clock: Clock) -> list[Candidate]:
    """The rivals' entries; one candidate that says why for a rival without any. Every rank must call."""
    found, comm = [], clock.comm
    for rival in rivals:
        if not rival.offers("attention"):
            continue
        entries: list[tuple] = []
        failure = f"failed: {rival.missing}" if rival.missing else None
        if failure is None:
            made, failure = clock.attempt(partial(rival.entries, "attention", comm.group, comm.rank, comm.size))
            entries = made if isinstance(made, list) else []
        if failure is not None:
            found.append(Candidate(None, None, "", None, rival=rival.label, missing=failure.removeprefix("failed: ")))
        for variant, order, function in entries:
            found.append(Candidate(variant, None, order, partial(_differentiated, function), rival=rival.label))
    return found


def _differentiated(call: Callable[..., torch.Tensor], inputs: Inputs) -> Step:
    leaves = inputs.q_BTNH, inputs.k_BTKH, inputs.v_BTKH

    def step() -> StepResults:
        out = call(*leaves)
        dq, dk, dv = torch.autograd.grad(out, leaves, inputs.dout_BTNH)
        return out.detach(), dq, dk, dv

    return step
