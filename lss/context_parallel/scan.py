"""Recurrences and short convolutions over a sequence that is cut over ranks: bytes that do not grow with S.

Attention needs every key. A recurrence needs of all that came before a chunk one state, so a rank computes its chunks from
0, and one all-gather brings every chunk's decay and end state to all. Then, for chunk after chunk of the sequence,

    S_{c+1} = D_c S_c + E_c

with D_c = 0 where a document begins in the chunk; a rank needs the S_c of its own chunks. Backward is the mirror: one
all-gather of the gradients of entering states, dE_c = dS_{c+1}, dS_c = (its own chunk's part) + D_c dE_c, from the last
chunk to the first. (A reduce-scatter of every chunk's share in every dE would be as many bytes, and products for them.)

A convolution of width W needs the W - 1 tokens before each chunk: one all-to-all, and one back for their gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator, cp_communicator
from lss.config.errors import refuse
from lss.context_parallel.sharding import segment_for
from lss.kernels.conv import check_conv, run_conv
from lss.kernels.outside import outside_graphs
from lss.kernels.scan import check_scan, run_scan
from lss.kernels.scan_blocks import of_states
from lss.segment import Segment, chunk_places, plan_halo


def scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    mesh: DeviceMesh,
    order: str = "head_tail",
    cu_seqlens: torch.Tensor | None = None,
    seq_len: int | None = None,
    seg: Segment | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Exact linear recurrence with matrix states over a sequence that is cut over the mesh's "cp" axis; differentiable.

        S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T,    y_t = q_t S_t,    t: all tokens,  S = 0 at a document's beginning

    Mamba-2's state-space layer, gated linear attention with a decay a head, retention and plain linear attention are this
    with their own q, k, v and decays.

    Args:
        q, k: (B, T, K, P), this rank's, cut by `lss.shard`; float64, float32, bfloat16 or float16.
        v: (B, T, N, H), N a multiple of K: head n takes q and k of head n // (N / K).
        log_decay: (B, T, N), or (B, T, N, P): a decay for each row of a head's state, diag(exp(log_decay_t)) S_{t-1}, as in
            gated linear attention. Finite; usually 0 or less. May be wider than the others.
        mesh, order, cu_seqlens, seq_len, seg: as in `lss.attention`; every order goes.
        kernel: "fla" is flash-linear-attention's (bfloat16 on CUDA, `pip install 'lss-transformer[fla]'`), "blocks" plain
            torch, "auto" the first of them that fits.

    Returns:
        (B, T, N, H) in v's dtype; 0 at padding. States and sums are float32 (float64 for float64).

    Collectives: one all-gather in forward of every chunk's state and decay, chunks x B N (P H + 1) numbers, (P H + P) with
    a decay a row, and one in backward of the states' gradients, chunks x B N P H; chunks are cp of them, 2 cp in head_tail
    order. S is in none.
    Memory: until backward the inputs and a state a chunk of the rank; while it computes a state for each 64 tokens (16 with
    a decay a row), with kernel "fla" for those of a section of the chunk only.

    Raises:
        Refused: tensors that do not fit together or not their segment; a kernel that does not fit them.
    """
    check_scan(q, k, v, log_decay)
    comm = cp_communicator(mesh)
    segment = segment_for(q, comm, order, seq_len, seg, cu_seqlens)
    return cut_scan(q, k, v, log_decay, segment=segment, comm=comm, kernel=kernel)


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    mesh: DeviceMesh,
    order: str = "head_tail",
    cu_seqlens: torch.Tensor | None = None,
    seq_len: int | None = None,
    seg: Segment | None = None,
) -> torch.Tensor:
    """Exact causal depthwise convolution over a sequence that is cut over the mesh's "cp" axis; differentiable.

        y_t = sum_{d < W} weight[:, W - 1 - d] * x_{t - d},    x = 0 before a document's first token

    Args:
        x: (B, T, C), this rank's tokens.
        weight: (C, W), the token's own filter value last, as in torch's `conv1d`. Its gradient is this rank's share of a
            sum over ranks.
        mesh, order, cu_seqlens, seq_len, seg: as in `lss.attention`.

    Returns:
        (B, T, C) in x's dtype; 0 at padding.

    Collectives: one all-to-all of the W - 1 tokens before each of the rank's chunks in forward, and one back in backward,
    in float32 at least.

    Raises:
        Refused: tensors that do not fit together or not their segment.
    """
    check_conv(x, weight)
    comm = cp_communicator(mesh)
    return cut_conv(x, weight, segment=segment_for(x, comm, order, seq_len, seg, cu_seqlens), comm=comm)


@outside_graphs
def cut_scan(
    q_BTKP, k_BTKP, v_BTNH, log_decay_BTN, *, segment: Segment, comm: Communicator, kernel: str = "auto"
) -> torch.Tensor:
    """`scan` of a segment whose group is known."""
    passing = None if _whole(segment, comm) else _States(segment, comm)
    return run_scan(q_BTKP, k_BTKP, v_BTNH, log_decay_BTN, segment, passing, kernel)


@outside_graphs
def cut_conv(x_BTC: torch.Tensor, weight_CW: torch.Tensor, *, segment: Segment, comm: Communicator) -> torch.Tensor:
    """`causal_conv` of a segment whose group is known."""
    neighbours = None if _whole(segment, comm) else _Neighbours(segment, comm, weight_CW.shape[1] - 1)
    return run_conv(x_BTC, weight_CW, segment, neighbours)


def _whole(segment: Segment, comm: Communicator) -> bool:
    """Whether this rank holds the whole sequence."""
    if segment.cp not in (1, comm.size):
        raise refuse("seg", f"a segment of cp={segment.cp}", f"the group has {comm.size} ranks")
    return segment.cp == 1


class _States:
    """States of one call, from chunk to chunk over all ranks; a `lss.kernels.scan_blocks.Passing`."""

    def __init__(self, segment: Segment, comm: Communicator) -> None:
        self._segment, self._comm = segment, comm
        self._decays: torch.Tensor | None = None

    def forward(self, decay_BMN: torch.Tensor, ends_BMNPH: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Gather decays and end states; then the states that enter this rank's chunks."""
        size = ends_BMNPH.shape[-2:].numel()
        decays = of_states(decay_BMN, ends_BMNPH).flatten(-2)
        packed = torch.cat((ends_BMNPH.flatten(-2), decays), -1)
        pending = self._comm.all_gather(packed, 1, "state")

        def entering() -> torch.Tensor:
            gathered = pending.wait()
            self._decays = gathered[..., size:, None]
            return self._combined(gathered[..., :size].unflatten(-1, ends_BMNPH.shape[-2:]), backward=False)

        return entering

    def backward(self, entering_BMNPH: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Gather the gradients of entering states; then those of the states that leave this rank's chunks."""
        pending = self._comm.all_gather(entering_BMNPH, 1, "dstate")
        return lambda: self._combined(pending.wait(), backward=True)

    def _combined(self, terms: torch.Tensor, *, backward: bool) -> torch.Tensor:
        """state = decay * state + term over the sequence's chunks; the states before this rank's own."""
        places = chunk_places(self._segment)
        mine = {chunk: number for number, chunk in enumerate(self._segment.chunks)}
        assert self._decays is not None
        out, state = torch.empty_like(terms[:, : len(mine)]), torch.zeros_like(terms[:, 0])
        chunks = range(len(places))
        for chunk in reversed(chunks) if backward else chunks:
            if chunk in mine:
                out[:, mine.pop(chunk)] = state
            if not mine:
                break
            at = places[chunk]
            state = torch.addcmul(terms[:, at], self._decays[:, at], state)
        return out


class _Neighbours:
    """The tokens before this rank's chunks; a `lss.kernels.conv.Neighbours`."""

    def __init__(self, segment: Segment, comm: Communicator, reach: int) -> None:
        self._comm, self._plan, self._places = comm, plan_halo(segment, reach), len(segment.chunks) * reach

    def fetch(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """One all-to-all; its payload is what this rank sends."""
        B, _, C = x_BTC.shape
        parts = [_taken(x_BTC, spans) for spans in self._plan.sends]
        counts = [sum(b - a for a, b in spans) for spans in self._plan.rows]
        received = self._comm.all_to_all(parts, [n * B * C for n in counts], "halo").wait()
        halo = x_BTC.new_zeros(B, self._places, C)
        for part, n, spans in zip(received, counts, self._plan.rows, strict=True):
            _added(halo, part.view(B, n, C), spans)
        return halo

    def give(self, dhalo: torch.Tensor, dx_BTC: torch.Tensor) -> None:
        """The adjoint: one all-to-all the other way."""
        B, _, C = dx_BTC.shape
        parts = [_taken(dhalo, spans) for spans in self._plan.rows]
        counts = [sum(b - a for a, b in spans) for spans in self._plan.sends]
        received = self._comm.all_to_all(parts, [n * B * C for n in counts], "dhalo").wait()
        for part, n, spans in zip(received, counts, self._plan.sends, strict=True):
            _added(dx_BTC, part.view(B, n, C), spans)


def _taken(x: torch.Tensor, spans: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """The tokens of some runs, behind one another."""
    return torch.cat([x[:, a:b] for a, b in spans] or [x[:, :0]], 1)


def _added(x: torch.Tensor, part: torch.Tensor, spans: tuple[tuple[int, int], ...]) -> None:
    """Add tokens to those of some runs, run after run: a token may be in several."""
    at = 0
    for a, b in spans:
        x[:, a:b] += part[:, at : at + b - a]
        at += b - a
