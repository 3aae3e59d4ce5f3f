"""Running a segment's blocks through a kernel: what one device and every strategy do alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lss.kernels.merge import merge
from lss.kernels.rules import Rules, Scores
from lss.kernels.table import Kernel
from lss.segment import Block, LocalRun, Mask, Segment, make_blocks


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
        """Write the outputs and lse of the queries in place; with `merging`, merge them with what stands there already."""
        for rows, b, scores, overlapping in self.calls(keys):
            t, s = slice(b.q_start, b.q_stop), slice(b.k_start, b.k_stop)
            part = self.kernel.forward(q_BTNH[rows, t], k_BSKH[rows, s], v_BSKH[rows, s], **self._how(b, scores))
            if merging or overlapping:
                part = merge(out_BTNH[rows, t], lse_BNT[rows, :, t], *part)
            out_BTNH[rows, t], lse_BNT[rows, :, t] = part

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
    ) -> None:
        """Add the gradients to dq, dk and dv in place; out and lse are those of all keys that a query sees."""
        for rows, b, scores, _ in self.calls(keys):
            t, s = slice(b.q_start, b.q_stop), slice(b.k_start, b.k_stop)
            dq, dk, dv = self.kernel.backward(
                dout_BTNH[rows, t], q_BTNH[rows, t], k_BSKH[rows, s], v_BSKH[rows, s], out_BTNH[rows, t],
                lse_BNT[rows, :, t], **self._how(b, scores),
            )  # fmt: skip
            dq_BTNH[rows, t] += dq
            dk_BSKH[rows, s] += dk
            dv_BSKH[rows, s] += dv


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
