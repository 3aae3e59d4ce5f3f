"""Attention over a sequence that is cut over ranks: the table of algorithms and the one call in front of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator
from lss.config.errors import refuse
from lss.context_parallel.loss import cross_entropy
from lss.context_parallel.lss import lss_attention
from lss.context_parallel.ring import ring_attention
from lss.context_parallel.sharding import make_segment, segment_for, shard, unshard
from lss.context_parallel.spec import AttentionSpec
from lss.context_parallel.ulysses import ulysses_attention
from lss.kernels import pick_kernel
from lss.mesh import axis_group
from lss.segment import Segment

__all__ = [
    "STRATEGIES",
    "AttentionOptions",
    "AttentionSpec",
    "attend",
    "attention",
    "cross_entropy",
    "make_segment",
    "shard",
    "unshard",
]

# The one table of algorithms. All take (q, k, v, spec) and return this rank's outputs.
STRATEGIES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec], torch.Tensor]] = {
    "lss": lss_attention,
    "ring": ring_attention,
    "ulysses": ulysses_attention,
}

# A gather of this many bytes keeps a link busy; smaller head chunks pay latency instead.
_BYTES_PER_HEAD_CHUNK = 1 << 30


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mesh: DeviceMesh,
    order: str = "head_tail",
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    head_chunks: int | str = "auto",
    regather: bool = True,
    strategy: str = "lss",
    kernel: str = "auto",
    seq_len: int | None = None,
    seg: Segment | None = None,
) -> torch.Tensor:
    """Exact attention over a sequence that is cut over the mesh's "cp" axis; differentiable.

        out = softmax(scale Q K^T + mask) V,  Q: this rank's tokens,  K, V: all tokens

    Args:
        q: (B, T, N, H), this rank's queries, cut by `lss.shard`; float64, float32, bfloat16 or float16.
        k, v: (B, T, K, H), N a multiple of K.
        mesh: from `lss.init_mesh`.
        order: the order the tensors were cut in.
        causal: a query sees keys at its own position and before.
        scale: factor on the scores; 1 / sqrt(H) by default.
        head_chunks: how many groups of key heads are gathered one after another ("lss" only); "auto" keeps a
            gather near 1 GiB. More chunks, less memory.
        regather: backward gathers K and V again instead of keeping them from forward.
        strategy: "lss", "ring" or "ulysses".
        kernel: "auto", "reference", "sdpa" (see `lss.kernels`).
        seq_len: the true S where `lss.shard` had to pad.
        seg: the segment to compute by, instead of `order` and `seq_len`.
        window, cu_seqlens, dropout_p, seed: sliding windows, packed documents and attention dropout are refused in
            this version, never ignored.

    Returns:
        (B, T, N, H) in q's dtype: the outputs of this rank's queries; 0 at padding.

    Collectives: see the strategy's own function; "lss" issues one all-gather of K and V in forward and one
    reduce-scatter of dK and dV in backward, 2*B*S*K*H elements each, and one more all-gather with `regather`.

    Raises:
        Refused: anything that would not be computed exactly, in a sentence that names it.
    """
    _refuse_unsupported(window, cu_seqlens, dropout_p, seed)
    _check_shapes(q, k, v)
    comm = Communicator(axis_group(mesh, ("cp",)))
    options = AttentionOptions(strategy, causal, scale, head_chunks, regather, kernel)
    return attend(q, k, v, segment_for(q, comm, order, seq_len, seg), comm, options)


@dataclass(frozen=True)
class AttentionOptions:
    """The user's choices for `attend`, by the names and with the meanings of `attention`."""

    strategy: str = "lss"
    causal: bool = True
    scale: float | None = None
    head_chunks: int | str = "auto"
    regather: bool = True
    kernel: str = "auto"


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: Segment, comm: Communicator, options: AttentionOptions
) -> torch.Tensor:
    """`attention` where segment and group are known: decide what is left open and run the strategy."""
    spec = AttentionSpec(
        segment=segment,
        comm=comm,
        kernel=pick_kernel(options.kernel, q),
        causal=options.causal,
        scale=q.shape[-1] ** -0.5 if options.scale is None else options.scale,
        head_chunks=count_head_chunks(options.head_chunks, options.strategy, k, comm.size),
        regather=options.regather,
    )
    return pick_strategy(options.strategy)(q, k, v, spec)


def pick_strategy(name: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec], torch.Tensor]:
    """The algorithm of this name, or a refusal that says what there is."""
    if name == "tp":
        fit = "tensor parallelism cuts a whole model; use lss.parallelize(model, mesh, strategy='tp')"
        raise refuse("strategy", name, fit)
    if name not in STRATEGIES:
        raise refuse("strategy", name, f"unknown; use one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def count_head_chunks(wanted: int | str, strategy: str, k_BTKH: torch.Tensor, cp: int) -> int:
    """Resolve `head_chunks`: "auto" or a whole number from 1 to K."""
    B, T, K, H = k_BTKH.shape
    if wanted == "auto":
        gathered = 2 * B * T * cp * K * H * k_BTKH.element_size()
        return min(K, max(1, gathered // _BYTES_PER_HEAD_CHUNK)) if strategy == "lss" and cp > 1 else 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= K:
        raise refuse("head_chunks", wanted, f"there are {K} key heads; use 'auto' or 1 to {K}")
    if strategy != "lss" and wanted != 1:
        fit = f"only strategy 'lss' gathers by head chunks; with {strategy!r} use 'auto' or 1"
        raise refuse("head_chunks", wanted, fit)
    return wanted


def _refuse_unsupported(window: int | None, cu_seqlens: torch.Tensor | None, dropout_p: float, seed: int | None) -> None:
    if window is not None:
        raise refuse("window", window, "sliding windows are not supported in this version; use None")
    if cu_seqlens is not None:
        raise refuse("cu_seqlens", "a tensor", "packed documents are not supported in this version; give one")
    if dropout_p != 0.0:
        fit = "no kernel of this version has attention dropout keyed by position; use 0.0"
        raise refuse("dropout_p", dropout_p, fit)
    if seed is not None:
        raise refuse("seed", seed, "it keys attention dropout, which this version does not have; use None")


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise refuse(name, tuple(x.shape), "give four dimensions (batch, tokens, heads, head size)")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise refuse(name, x.dtype, f"q, k and v must have one floating point dtype; q has {q.dtype}")
    if k.shape != v.shape:
        raise refuse("v", tuple(v.shape), f"k and v must have one shape; k has {tuple(k.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise refuse("k", tuple(k.shape), f"batch, tokens and head size must be those of q, {tuple(q.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise refuse("q", tuple(q.shape), f"its heads must be a multiple of the {k.shape[2]} key heads")
