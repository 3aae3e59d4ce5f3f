"""What recurrences and short convolutions remember of a sequence: one state a head, and the last W - 1 tokens.

They do not grow, and every rank holds them whole: a new token is computed by every rank. Of a prompt that is cut they are
sums over its tokens, to which each rank adds its own:

    S = sum_t exp(g_{t+1} + ... + g_last) k_t v_t^T
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lss.comm import Communicator
from lss.context_parallel import cut_conv, cut_scan
from lss.segment import Segment, chunk_places

PURPOSE = "state"


class StateCache:
    """States and last tokens of every layer that scans.

    Args:
        segment: of the prompt, on this rank.
        kernel: what computes the prompt's recurrences.

    Memory: for each layer B N P H numbers in float32 (float64), and B (W - 1) C in the inputs' dtype.
    """

    def __init__(self, segment: Segment, comm: Communicator, kernel: str = "auto") -> None:
        self._segment, self._comm, self._kernel = segment, comm, kernel
        self._states: dict[int, torch.Tensor] = {}
        self._tails: dict[int, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """What all of it takes on this rank."""
        return sum(x.numel() * x.element_size() for x in (*self._states.values(), *self._tails.values()))

    def read_scan(self, q, k, v, log_decay, layer: int) -> torch.Tensor:
        """The recurrence over the prompt, whose last state is kept.

        Collectives: those of `lss.scan`, an all-gather of a number a head and chunk, and an all-reduce of B N P H.
        """
        self._states[layer] = last_state(k, v, log_decay, self._segment, self._comm)
        return cut_scan(q, k, v, log_decay, segment=self._segment, comm=self._comm, kernel=self._kernel)

    def read_conv(self, x_BTC: torch.Tensor, weight_CW: torch.Tensor, layer: int) -> torch.Tensor:
        """The convolution over the prompt, whose last W - 1 tokens are kept.

        Collectives: those of `lss.causal_conv`, and an all-reduce of B (W - 1) C.
        """
        self._tails[layer] = last_tokens(x_BTC, weight_CW.shape[1] - 1, self._segment, self._comm)
        return cut_conv(x_BTC, weight_CW, segment=self._segment, comm=self._comm)

    def step_scan(self, q, k, v, log_decay, layer: int) -> torch.Tensor:
        """The recurrence's next token (B, 1, N, H). Collectives: none."""
        state = self._states[layer]
        share = v.shape[2] // q.shape[2]
        q, k = (x[:, 0].repeat_interleave(share, 1).to(state.dtype) for x in (q, k))
        state = log_decay[:, 0, :, None, None].to(state.dtype).exp() * state + k[..., None] * v[:, 0, :, None]
        self._states[layer] = state
        return (q[:, :, None] @ state).transpose(1, 2).to(v.dtype)

    def step_conv(self, x_B1C: torch.Tensor, weight_CW: torch.Tensor, layer: int) -> torch.Tensor:
        """The convolution's next token (B, 1, C). Collectives: none."""
        seen, wide = torch.cat((self._tails[layer], x_B1C), 1), torch.promote_types(x_B1C.dtype, torch.float32)
        self._tails[layer] = seen[:, 1:]
        return (seen.to(wide) * weight_CW.T.to(wide)).sum(1, keepdim=True).to(x_B1C.dtype)


def last_state(k_BTKP, v_BTNH, log_decay_BTN, segment: Segment, comm: Communicator) -> torch.Tensor:
    """The state behind a sequence's last true token, (B, N, P, H), float32 (float64), the same on every rank."""
    wide = torch.promote_types(v_BTNH.dtype, torch.float32)
    M = len(segment.chunks)
    true = (segment.positions < segment.seq_len).to(v_BTNH.device)[:, None]
    g_BMLN = (log_decay_BTN.to(wide) * true).unflatten(1, (M, -1))
    sums_BCN = g_BMLN.sum(2)
    if segment.cp > 1:
        gathered = comm.all_gather(sums_BCN.contiguous(), 1, PURPOSE).wait()
        sums_BCN = gathered[:, list(chunk_places(segment))]
    behind = F.pad(g_BMLN.flip(2).cumsum(2).flip(2)[:, :, 1:], (0, 0, 0, 1))
    later = torch.stack([sums_BCN[:, chunk + 1 :].sum(1) for chunk in segment.chunks], 1)
    weights_BTN = (behind + later[:, :, None]).flatten(1, 2).exp() * true
    v_BTKRH = (v_BTNH * weights_BTN[..., None]).unflatten(2, (k_BTKP.shape[2], -1))
    state = torch.einsum("btkp,btkrh->bkrph", k_BTKP.to(wide), v_BTKRH.to(wide)).flatten(1, 2)
    return state if segment.cp == 1 else comm.all_reduce(state.contiguous(), PURPOSE).wait()


def last_tokens(x_BTC: torch.Tensor, count: int, segment: Segment, comm: Communicator) -> torch.Tensor:
    """The last true tokens of a sequence (B, count, C), 0 where there are not so many, the same on every rank."""
    tail = x_BTC.new_zeros(x_BTC.shape[0], count, x_BTC.shape[2])
    for start, stop, place, end in segment.local_runs:
        skipped = max(0, segment.seq_len - count - place)
        if place + skipped < end:
            at = place + skipped - (segment.seq_len - count)
            tail[:, at : at + stop - start - skipped] = x_BTC[:, start + skipped : stop]
    return tail if segment.cp == 1 else comm.all_reduce(tail, PURPOSE).wait()
