"""Running a segment's blocks through a kernel: what one device and every strategy do alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from lss.kernels.merge import merge
from lss.kernels.pair import Lengths, halves, pair_of, stacked
from lss.kernels.rules import Rules, Scores
from lss.kernels.table import Kernel
from lss.kernels.varlen import Wave, plan_waves
from lss.segment import Block, LocalRun, Mask, Run, Segment, make_blocks
from lss.segment.blocks import MOST_APART, backward_order, rooms_of
from lss.segment.mask import merged

# Queries of a block, on average, up to which launches cost more than scores; longer ones fill a GPU by themselves.
SHORT_BLOCK = 1024
Ready = Callable[[int], None]
Piece = tuple[int, int, bool]  # (start, stop, whether something stands there already)


@dataclass(frozen=True)
class Call:
    """One kernel call: some rows of the batch, a block, and where its results go.

    Attributes:
        overlapping: the outputs are merged with those of other calls.
        dq, dk: pieces of the gradients of queries and keys; None where nothing stands there yet, and the kernel may write.
        room: which of several rooms for dK and dV this call has to itself, where it is given them.
        closes: whether no later call of backward's order writes into that room.
    """

    rows: slice
    block: Block
    overlapping: bool
    dq: tuple[Piece, ...] | None
    dk: tuple[Piece, ...] | None
    room: int = 0
    closes: bool = True


@dataclass(frozen=True)
class Schedule:
    """The calls of one rank on some keys, forward and backward, and the places that no call writes.

    Backward's order: the call that sees most keys first, so that of two prefixes one is written and the other added.
    `waves` hold the same blocks where there are many, short documents for one, to be computed together; `pair` says what
    two of them that are one call, each half of the queries under a causal mask, see of the keys.
    """

    forward: tuple[Call, ...]
    backward: tuple[Call, ...]
    unseeing: tuple[tuple[slice, slice], ...]
    dq_gaps: tuple[tuple[slice, slice], ...]
    dk_gaps: tuple[tuple[slice, slice], ...]
    waves: tuple[Wave, ...] = ()
    pair: Lengths | None = None

    @property
    def dq_summed(self) -> bool:
        """Whether some query gets its gradient from several calls, which are added up."""
        return any(call.dq is not None for call in self.backward)

    @property
    def rooms(self) -> int:
        """How many rooms there are for dK and dV, so that no call need add to what another wrote."""
        return 1 + max((call.room for call in self.backward), default=0)

    @property
    def dk_summed(self) -> bool:
        """Whether some key does, in one room."""
        return any(call.dk is not None for call in self.backward)


@lru_cache(maxsize=256)
def _schedule(
    queries: tuple[LocalRun, ...],
    keys: tuple[LocalRun, ...],
    masks: tuple[tuple[int, int, Mask], ...],
    lengths: tuple[int, int],
    placed: bool,
    varlen: bool,
) -> Schedule:
    """Planned once for all layers and steps of one cut: on short sequences planning would cost more than attention."""
    forward, groups = [], [slice(start, stop) for start, stop, _ in masks]
    answered = _Covered(lengths[0], groups)
    for start, stop, mask in masks:
        for block in make_blocks(queries, keys, mask, placed):
            forward.append(Call(slice(start, stop), block, mask.merging, None, None))
            if not mask.merging:  # what is merged starts from nothing, 0 and -inf
                answered.add(forward[-1].rows, block.q_start, block.q_stop)
    dq, dk = _Covered(lengths[0], groups), _Covered(lengths[1], groups)
    blocks = [call.block for call in forward]
    rooms = rooms_of(blocks) if len(masks) == 1 else None
    backward, order = [], backward_order(blocks)
    for number in order:
        call, b = forward[number], blocks[number]
        pieces = dq.pieces(call.rows, b.q_start, b.q_stop), dk.pieces(call.rows, b.k_start, b.k_stop)
        written = [p if any(old for *_, old in p) else None for p in pieces]
        room, later = 0 if rooms is None else rooms[number], () if rooms is None else order[order.index(number) + 1 :]
        closes = all(rooms is None or rooms[other] != room for other in later)
        backward.append(replace(call, dq=written[0], dk=written[1], room=room, closes=closes))
        dq.add(call.rows, b.q_start, b.q_stop)
        dk.add(call.rows, b.k_start, b.k_stop)
    one_row = len(masks) == 1 and masks[0][1] - masks[0][0] == 1 and not masks[0][2].merging
    short = sum(b.q_stop - b.q_start for b in blocks) <= SHORT_BLOCK * len(blocks)
    together = varlen and one_row and short and len(forward) > MOST_APART
    waves = plan_waves(tuple(call.block for call in forward)) if together else ()
    pair = pair_of(blocks, lengths[0]) if one_row else None
    return Schedule(tuple(forward), tuple(backward), answered.gaps(), dq.gaps(), dk.gaps(), waves, pair)


class _Covered:
    """Which places along the tokens have been written, for each group of rows of the batch."""

    def __init__(self, length: int, groups: Sequence[slice]) -> None:
        self._length, self._groups = length, groups
        self._runs: dict[int, list[Run]] = {rows.start: [] for rows in groups}

    def add(self, rows: slice, start: int, stop: int) -> None:
        """Mark a run of places as written."""
        self._runs[rows.start] = list(merged([*self._runs[rows.start], (start, stop)]))

    def pieces(self, rows: slice, start: int, stop: int) -> tuple[Piece, ...]:
        """The run in pieces that have been written and that have not."""
        found, at = [], start
        for a, b in self._runs[rows.start]:
            a, b = max(a, start), min(b, stop)
            if a < b:
                found += [(at, a, False)] * (at < a) + [(a, b, True)]
                at = b
        return (*found, (at, stop, False)) if at < stop else tuple(found)

    def gaps(self) -> tuple[tuple[slice, slice], ...]:
        """(rows, run) of everything that has not been written."""
        return tuple(
            (rows, slice(a, b))
            for rows in self._groups
            for a, b, written in self.pieces(rows, 0, self._length)
            if not written
        )


def _put(target: torch.Tensor, part: torch.Tensor, rows: slice, pieces: tuple[Piece, ...]) -> None:
    """Add a call's gradient where something stands already, and write it elsewhere."""
    first = pieces[0][0]
    for a, b, written in pieces:
        place, piece = target[rows, a:b], part[:, a - first : b - first]
        if written:
            place.add_(piece)
        else:
            place.copy_(piece)


@dataclass(frozen=True)
class Work:
    """What some heads of a rank's queries have to compute, whichever keys are at hand.

    Attributes:
        queries: the runs of the rank's tokens that are queries.
        masks: (rows of the batch, their mask), from `Rules.masks`.
        scores: what becomes of the scores of these heads; None where nothing does.
    """

    kernel: Kernel
    scale: float
    queries: tuple[LocalRun, ...]
    masks: tuple[tuple[slice, Mask], ...]
    scores: Scores | None

    def of_heads(self, heads: slice) -> Work:
        """The same for some of these heads."""
        return self if self.scores is None else replace(self, scores=self.scores.of(heads=heads))

    def of_queries(self, queries: tuple[LocalRun, ...]) -> Work:
        """The same for other queries."""
        return replace(self, queries=queries)

    def schedule(self, keys: Sequence[LocalRun], T: int = 0, S: int = 0) -> Schedule:
        """All calls on these runs of keys; T and S are the lengths that gaps are told of."""
        masks = tuple((rows.start, rows.stop, mask) for rows, mask in self.masks)
        varlen = self.kernel.varlen is not None and self.scores is None
        return _schedule(self.queries, tuple(keys), masks, (T, S), self.scores is not None, varlen)

    def _how(self, call: Call) -> dict:
        block = call.block
        scores = None if self.scores is None else self.scores.of(call.rows)
        return {"causal": block.causal, "scale": self.scale, "window": block.window, "scores": scores,
                "places": (block.q_place, block.k_place)}  # fmt: skip

    def forward(
        self,
        out_BTNH: torch.Tensor,
        lse_BNT: torch.Tensor,
        q_BTNH: torch.Tensor,
        k_BSKH: torch.Tensor,
        v_BSKH: torch.Tensor,
        keys: Sequence[LocalRun],
        *,
        merging: bool = False,
        ready: Ready | None = None,
        together: bool = False,
    ) -> None:
        """Write the outputs and lse of the queries in place; with `merging`, merge them with what stands there already.

        Without it nothing need stand there: a query that sees nothing gets out 0 and lse -inf. `ready` is called before
        each kernel with how many of the first keys it reads, and waits for them. `together`: two calls may be one, which
        waits for the keys of both.
        """
        schedule = self.schedule(keys, q_BTNH.shape[1], k_BSKH.shape[1])
        for rows, t in () if merging else schedule.unseeing:
            out_BTNH[rows, t].zero_()
            lse_BNT[rows, :, t].fill_(float("-inf"))
        # a rank of Ulysses may hold no heads, which the calls one by one pass over and the operators for many refuse
        if schedule.waves and not merging and out_BTNH.dtype == q_BTNH.dtype and q_BTNH.shape[2]:
            self._forward_waves(schedule, (out_BTNH, lse_BNT, q_BTNH, k_BSKH, v_BSKH), ready)
            return
        if together and not merging and self._pairs(schedule):
            self._forward_pair(schedule, (out_BTNH, lse_BNT, q_BTNH), (k_BSKH, v_BSKH), ready)
            return
        for call in schedule.forward:
            rows, b = call.rows, call.block
            t, s = slice(b.q_start, b.q_stop), slice(b.k_start, b.k_stop)
            if ready is not None:
                ready(b.k_stop)
            tensors, place = (q_BTNH[rows, t], k_BSKH[rows, s], v_BSKH[rows, s]), (out_BTNH[rows, t], lse_BNT[rows, :, t])
            if merging or call.overlapping:
                part = merge(*place, *self.kernel.forward(*tensors, **self._how(call)))
                place[0].copy_(part[0])
                place[1].copy_(part[1])
            else:
                self.kernel.forward(*tensors, **self._how(call), into=place)

    def backward(
        self,
        dq_BTNH: torch.Tensor,
        dk_BSKH: torch.Tensor,
        dv_BSKH: torch.Tensor,
        dout_BTNH: torch.Tensor,
        q_BTNH: torch.Tensor,
        k_BSKH: torch.Tensor,
        v_BSKH: torch.Tensor,
        out_BTNH: torch.Tensor,
        lse_BNT: torch.Tensor,
        keys: Sequence[LocalRun],
        *,
        add_dq: bool = False,
        ready: Ready | None = None,
        more: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
        together: bool = False,
        done: Callable[[int], None] | None = None,
    ) -> None:
        """Write the gradients to dq, dk and dv in place, where nothing need stand; with `add_dq` dq is added to.

        out and lse are those of all keys that a query sees. What several calls give is summed in the dtype of its place.
        With `more` rooms for dk and dv, as many as `Schedule.rooms` has, nothing is added: each call writes into its own,
        and what no call writes there is left as it is; `done` is told of each room after its last call. `together` is as
        in `forward`, where the rooms lie in one buffer.
        """
        schedule = self.schedule(keys, q_BTNH.shape[1], k_BSKH.shape[1])
        if schedule.waves and q_BTNH.shape[2]:
            grads, given = (dq_BTNH, dk_BSKH, dv_BSKH), (dout_BTNH, q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT)
            self._backward_waves(schedule, grads, given, add_dq, ready)
            return
        rooms = [(dk_BSKH, dv_BSKH), *more]
        assert len(rooms) in (1, schedule.rooms)
        if together and more and not add_dq and self._pairs(schedule):
            self._backward_pair(schedule, dq_BTNH, rooms, (dout_BTNH, q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT), ready)
            return
        for rows, t in () if add_dq else schedule.dq_gaps:
            dq_BTNH[rows, t].zero_()
        for rows, s in () if more else schedule.dk_gaps:
            dk_BSKH[rows, s].zero_()
            dv_BSKH[rows, s].zero_()
        for call in schedule.backward:
            rows, b = call.rows, call.block
            t, s = slice(b.q_start, b.q_stop), slice(b.k_start, b.k_stop)
            if ready is not None:
                ready(b.k_stop)
            dq, dk = ((t.start, t.stop, True),) if add_dq else call.dq, None if more else call.dk
            room = [x[rows, s] for x in rooms[call.room if more else 0]]
            dks, dvs = room if dk is None else (None, None)
            grads = self.kernel.backward(
                dout_BTNH[rows, t], q_BTNH[rows, t], k_BSKH[rows, s], v_BSKH[rows, s], out_BTNH[rows, t],
                lse_BNT[rows, :, t], **self._how(call),
                into=(dq_BTNH[rows, t] if dq is None else None, dks, dvs),
            )  # fmt: skip
            if dq is not None:
                _put(dq_BTNH, grads[0], rows, dq)
            if dk is not None:
                _put(dk_BSKH, grads[1], rows, dk)
                _put(dv_BSKH, grads[2], rows, dk)
            if more and call.closes and done is not None:
                done(call.room)

    # -- two blocks in one call ----------------------------------------------------------------------------------------

    def _pairs(self, schedule: Schedule) -> bool:
        return schedule.pair is not None and self.kernel.pair is not None and self.scores is None

    def _forward_pair(self, schedule: Schedule, own, keys, ready: Ready | None) -> None:
        """As the two calls of `schedule.forward`, out and lse written in place."""
        assert schedule.pair is not None
        assert self.kernel.pair is not None
        if ready is not None:
            ready(max(schedule.pair))
        self.kernel.pair.forward(*halves(*own), *keys, schedule.pair, self.scale)

    def _backward_pair(self, schedule: Schedule, dq_BTNH, rooms, given, ready: Ready | None) -> None:
        """As the two calls of `schedule.backward`, each half's dk and dv written to its own room."""
        assert schedule.pair is not None
        assert self.kernel.pair is not None
        if ready is not None:
            ready(max(schedule.pair))
        # rooms are numbered as backward's order gives them out, halves as the queries stand
        number = {call.block.q_start: call.room for call in schedule.backward}
        first, second = (rooms[number[start]] for start in sorted(number))
        dk, dv = (stacked(a, b) for a, b in zip(first, second, strict=True))
        dq, dout, q, out, lse = halves(dq_BTNH, given[0], given[1], *given[4:])
        self.kernel.pair.backward(dq, dk, dv, dout, q, *given[2:4], out, lse, schedule.pair, self.scale)

    # -- many blocks in one call ---------------------------------------------------------------------------------------

    def _forward_waves(self, schedule: Schedule, tensors: tuple[torch.Tensor, ...], ready: Ready | None) -> None:
        """As the calls of `schedule.forward` one by one."""
        assert self.kernel.varlen is not None
        for wave in schedule.waves:
            if ready is not None:
                ready(wave.k_runs[-1][1])
            self.kernel.varlen.forward(*(x[0] for x in tensors), wave, self.scale)

    def _backward_waves(
        self,
        schedule: Schedule,
        grads: tuple[torch.Tensor, ...],
        given: tuple[torch.Tensor, ...],
        add_dq: bool,
        ready: Ready | None,
    ) -> None:
        """As the calls of `schedule.backward` one by one, but that all are added to zeros."""
        assert self.kernel.varlen is not None
        for grad in grads[add_dq:]:
            grad.zero_()
        for wave in schedule.waves:
            if ready is not None:
                ready(wave.k_runs[-1][1])
            self.kernel.varlen.backward(*(x[0] for x in (*grads, *given)), wave, self.scale)


def make_work(kernel: Kernel, rules: Rules, queries: Segment, keys: Segment, q_BTNH: torch.Tensor, cross: bool) -> Work:
    """The work of the queries of a segment; `cross`: the keys are another sequence's."""
    masks = rules.masks(queries.documents, q_BTNH.shape[0], keys.documents if cross else None)
    scale = q_BTNH.shape[-1] ** -0.5 if rules.scale is None else rules.scale
    return Work(kernel, scale, queries.local_runs, masks, rules.scores())


def add_sinks_(out_BTNH: torch.Tensor, lse_BNT: torch.Tensor, sinks_N: torch.Tensor | None) -> None:
    """Let each head's sink take its share of the softmax, in place: lse' = logaddexp(lse, sink), out' = out e^(lse - lse').

    Backward with out' and lse' then is that of every kernel: a sink is a key whose value is 0.
    """
    if sinks_N is None:
        return
    with_sink = torch.logaddexp(lse_BNT, sinks_N.to(lse_BNT)[:, None])
    out_BTNH.mul_((lse_BNT - with_sink).exp().transpose(1, 2).unsqueeze(-1).to(out_BTNH.dtype))
    lse_BNT.copy_(with_sink)


def sinks_gradient(
    dout_BTNH: torch.Tensor, out_BTNH: torch.Tensor, lse_BNT: torch.Tensor, sinks_N: torch.Tensor | None
) -> torch.Tensor | None:
    """-sum over rows and queries of P_sink * rowsum(dO * O): the gradient of each head's sink by these queries."""
    if sinks_N is None:
        return None
    delta_BNT = (dout_BTNH.to(lse_BNT.dtype) * out_BTNH.to(lse_BNT.dtype)).sum(-1).transpose(1, 2)
    # a query that sees nothing at all has out 0, and padding has no gradient: both give 0
    p = (sinks_N.to(lse_BNT)[:, None] - lse_BNT).exp()
    return -(p.where(lse_BNT != float("-inf"), 0.0) * delta_BNT).sum((0, 2)).to(sinks_N.dtype)
