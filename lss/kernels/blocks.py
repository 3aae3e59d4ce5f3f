"""Running a segment's blocks through a kernel: what one device and every strategy do alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lss.kernels.merge import merge
from lss.kernels.rules import Rules, Scores
from lss.kernels.table import Kernel
from lss.segment import Block, LocalRun, Mask, Run, Segment, make_blocks
from lss.segment.mask import merged


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
        scores = None if self.scores is None else self.scores.of(heads=heads)
        return Work(self.kernel, self.scale, self.queries, self.masks, scores)

    def of_queries(self, queries: tuple[LocalRun, ...]) -> Work:
        """The same for other queries."""
        return Work(self.kernel, self.scale, queries, self.masks, self.scores)

    def calls(self, keys: Sequence[LocalRun]) -> list[tuple[slice, Block, Scores | None, bool]]:
        """(rows of the batch, block, their scores, whether results are merged) of all calls on these runs of keys."""
        calls = []
        for rows, mask in self.masks:
            scores = None if self.scores is None else self.scores.of(rows)
            for block in make_blocks(self.queries, tuple(keys), mask, scores is not None):
                calls.append((rows, block, scores, mask.merging))
        return calls

    def _how(self, block: Block, scores: Scores | None) -> dict:
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
    ) -> None:
        """Write the outputs and lse of the queries in place; with `merging`, merge them with what stands there already.

        Without it nothing need stand there: a query that sees nothing gets out 0 and lse -inf.
        """
        calls = self.calls(keys)
        if not merging:
            seen = _Covered(q_BTNH.shape[1], self._groups)
            for rows, b, _, overlapping in calls:
                if not overlapping:
                    seen.add(rows, b.q_start, b.q_stop)
            for rows, t in seen.gaps():
                out_BTNH[rows, t].zero_()
                lse_BNT[rows, :, t].fill_(float("-inf"))
        for rows, b, scores, overlapping in calls:
            t, s = slice(b.q_start, b.q_stop), slice(b.k_start, b.k_stop)
            tensors, place = (q_BTNH[rows, t], k_BSKH[rows, s], v_BSKH[rows, s]), (out_BTNH[rows, t], lse_BNT[rows, :, t])
            if merging or overlapping:
                part = merge(*place, *self.kernel.forward(*tensors, **self._how(b, scores)))
                place[0].copy_(part[0])
                place[1].copy_(part[1])
            else:
                self.kernel.forward(*tensors, **self._how(b, scores), into=place)

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
    ) -> None:
        """Write the gradients to dq, dk and dv in place, where nothing need stand; with `add_dq` dq is added to.

        out and lse are those of all keys that a query sees. A key that several calls see is summed in dk's own dtype; the
        call that sees most comes first, so that of two prefixes one is written and only the other added.
        """
        calls = sorted(self.calls(keys), key=lambda call: call[1].k_start - call[1].k_stop)
        queries, seen = _Covered(q_BTNH.shape[1], self._groups), _Covered(k_BSKH.shape[1], self._groups)
        if add_dq:
            queries.add(slice(0, len(q_BTNH)), 0, q_BTNH.shape[1])
        for rows, b, scores, _ in calls:
            t, s = slice(b.q_start, b.q_stop), slice(b.k_start, b.k_stop)
            new_q, new_k = queries.fresh(rows, t), seen.fresh(rows, s)
            place = (
                dq_BTNH[rows, t] if new_q else None,
                dk_BSKH[rows, s] if new_k else None,
                dv_BSKH[rows, s] if new_k else None,
            )
            grads = self.kernel.backward(
                dout_BTNH[rows, t], q_BTNH[rows, t], k_BSKH[rows, s], v_BSKH[rows, s], out_BTNH[rows, t],
                lse_BNT[rows, :, t], **self._how(b, scores), into=place,
            )  # fmt: skip
            if not new_q:
                queries.put(dq_BTNH, grads[0], rows, t)
            if not new_k:
                seen.put(dk_BSKH, grads[1], rows, s)
                seen.put(dv_BSKH, grads[2], rows, s)
            queries.add(rows, t.start, t.stop)
            seen.add(rows, s.start, s.stop)
        for rows, t in queries.gaps():
            dq_BTNH[rows, t].zero_()
        for rows, s in seen.gaps():
            dk_BSKH[rows, s].zero_()
            dv_BSKH[rows, s].zero_()

    def summed(self, keys: Sequence[LocalRun]) -> tuple[bool, bool]:
        """Whether some query, and whether some key, gets its gradient from several calls, which are added up."""
        queries, seen = _Covered(0, self._groups), _Covered(0, self._groups)
        found = [False, False]
        for rows, b, _, _ in self.calls(keys):
            for i, (covered, run) in enumerate(((queries, slice(b.q_start, b.q_stop)), (seen, slice(b.k_start, b.k_stop)))):
                found[i] = found[i] or not covered.fresh(rows, run)
                covered.add(rows, run.start, run.stop)
            if all(found):
                break
        return found[0], found[1]

    @property
    def _groups(self) -> list[slice]:
        """The groups of rows that calls are made for."""
        return [rows for rows, _ in self.masks]


class _Covered:
    """Which places along the tokens have been written, for each group of rows of the batch."""

    def __init__(self, length: int, batch: Sequence[slice]) -> None:
        self._length = length
        self._runs: dict[tuple[int, int], list[Run]] = {(rows.start, rows.stop): [] for rows in batch}

    def add(self, rows: slice, start: int, stop: int) -> None:
        """Mark a run of places as written."""
        for key in self._keys(rows):
            self._runs[key] = list(merged([*self._runs[key], (start, stop)]))

    def fresh(self, rows: slice, run: slice) -> bool:
        """Whether nothing of this run has been written."""
        return all(b <= run.start or run.stop <= a for a, b in self._runs[rows.start, rows.stop])

    def put(self, target: torch.Tensor, part: torch.Tensor, rows: slice, run: slice) -> None:
        """Add `part` where something has been written, and write it elsewhere."""
        for a, b, written in self._pieces(rows, run):
            place, piece = target[rows, a:b], part[:, a - run.start : b - run.start]
            if written:
                place.add_(piece)
            else:
                place.copy_(piece)

    def gaps(self) -> Iterator[tuple[slice, slice]]:
        """(rows, run) of everything that has not been written."""
        for start, stop in self._runs:
            for a, b, written in self._pieces(slice(start, stop), slice(0, self._length)):
                if not written:
                    yield slice(start, stop), slice(a, b)

    def _pieces(self, rows: slice, run: slice) -> Iterator[tuple[int, int, bool]]:
        at = run.start
        for a, b in self._runs[rows.start, rows.stop]:
            a, b = max(a, run.start), min(b, run.stop)
            if a >= b:
                continue
            if at < a:
                yield at, a, False
            yield a, b, True
            at = b
        if at < run.stop:
            yield at, run.stop, False

    def _keys(self, rows: slice) -> list[tuple[int, int]]:
        return [key for key in self._runs if rows.start <= key[0] and key[1] <= rows.stop]


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
