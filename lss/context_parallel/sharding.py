"""Cutting tensors along the sequence and putting them back."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator
from lss.config.errors import Refused, refuse
from lss.mesh import axis_group
from lss.segment import Segment
from lss.segment import make_segment as _make_segment
from lss.segment.documents import document_edges

IGNORE_INDEX = -100


def make_segment(
    seq_len: int,
    mesh: DeviceMesh | None,
    order: str = "head_tail",
    cu_seqlens: torch.Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Segment:
    """This rank's segment of a sequence of `seq_len` tokens: global positions, index maps and attention blocks.

    Args:
        seq_len: S, any length >= 1; it is padded inside so that all ranks hold equally many tokens.
        mesh: from `init_mesh`; its "cp" axis shares the sequence. None: every rank holds it whole (cross-attention).
        order: "head_tail" (equal work under a causal mask), "contiguous", or "balanced" (equal work for packed documents).
        cu_seqlens: int32, borders of packed documents: 0, the end of each, last `seq_len`; tokens of one document do
            not see another's.
        causal, window: the mask that "balanced" counts work by.

    Raises:
        Refused: an unknown order, a length below 1, borders that do not fit.
    """
    comm = Communicator(None if mesh is None else axis_group(mesh, ("cp",)))
    return _make_segment(
        seq_len, cp=comm.size, rank=comm.rank, order=order, cu_seqlens=cu_seqlens, causal=causal, window=window
    )


def shard(
    x: torch.Tensor,
    mesh: DeviceMesh,
    dim: int = 1,
    order: str = "head_tail",
    *,
    seg: Segment | None = None,
    pad_value: float | None = None,
) -> torch.Tensor:
    """Cut `x`, whole and equal on every rank of the cp group, along `dim`; returns this rank's tokens.

    The sequence is padded at its end so that every rank gets T = padded_len / cp tokens. Padding is 0 in floating
    point tensors and False in boolean ones. In integer tensors it is -100, which no loss counts; that no label is
    counted by mistake matters more than that token ids can be embedded, so give `pad_value=0` for token ids.

    Args:
        x: any tensor; size S along `dim`.
        seg: the segment to cut by, instead of `order`.
        pad_value: what stands at padding, instead of the above.

    Collectives: none. Differentiable: the gradient of `x` is this rank's part of it, 0 elsewhere.
    """
    seg = seg or _segment_of_order(x.shape[dim], Communicator(axis_group(mesh, ("cp",))), order)
    if x.shape[dim] != seg.seq_len:
        raise refuse("x", tuple(x.shape), f"its size along dim {dim} is not the segment's seq_len {seg.seq_len}")
    if pad_value is None:
        pad_value = IGNORE_INDEX if not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool) else 0
    parts = []
    for start, stop in seg.spans:
        true_stop = min(stop, seg.seq_len)
        if true_stop > start:
            parts.append(x.narrow(dim, start, true_stop - start))
        padding = stop - max(start, true_stop)
        if padding:
            shape = list(x.shape)
            shape[dim] = padding
            parts.append(x.new_full(shape, pad_value))
    return torch.cat(parts, dim)


def unshard(
    x_local: torch.Tensor,
    mesh: DeviceMesh,
    dim: int = 1,
    order: str = "head_tail",
    *,
    length: int | None = None,
    seg: Segment | None = None,
) -> torch.Tensor:
    """Put the ranks' parts back together: the whole tensor in sequence order, on every rank.

    Args:
        x_local: (..., T, ...) on every rank, equal shapes.
        length: the true S where `shard` had to pad; the padding is cut off. Without it the padded length is returned.
        seg: the segment that was cut by, instead of `order` and `length`.

    Collectives: one all-gather of cp * x_local.numel() elements; in backward one reduce-scatter of as many: the
    gradient is that of the *sum* of the ranks' losses, so a loss that every rank computes alike on the whole tensor
    must be divided by cp.
    """
    comm = Communicator(axis_group(mesh, ("cp",)))
    if seg is None:
        padded = x_local.shape[dim] * comm.size
        seg = _segment_of_order(length if length is not None else padded, comm, order)
        if seg.padded_len != padded:
            raise refuse(
                "length", length, f"{comm.size} ranks hold {x_local.shape[dim]} tokens each, which is no cut of it in "
                f"{order!r} order; a cut of it would give {seg.local_len} each"
            )  # fmt: skip
    elif x_local.shape[dim] != seg.local_len:
        raise refuse("x_local", tuple(x_local.shape), f"dim {dim} is not the segment's {seg.local_len} tokens")
    if seg.cp == 1:
        return x_local  # whole on every rank
    gathered = _Unshard.apply(x_local, dim, comm)
    return seg.reorder(gathered, dim % x_local.dim(), seg.chunk_order).narrow(dim, 0, seg.seq_len)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim: int, comm: Communicator):
        ctx.dim, ctx.comm = dim, comm
        # autograd must not see an input returned as it is
        return comm.all_gather(x, dim, "unshard").wait() if comm.size > 1 else x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.comm.reduce_scatter(grad, ctx.dim, "unshard").wait(), None, None


def _segment_of_order(
    seq_len: int, comm: Communicator, order: str, cu_seqlens: torch.Tensor | None = None
) -> Segment:
    if order == "balanced":
        raise refuse("order", order, "it deals out tokens by their documents; make a segment with lss.make_segment and give "
                     "it as seg")  # fmt: skip
    return _make_segment(seq_len, cp=comm.size, rank=comm.rank, order=order, cu_seqlens=cu_seqlens)


def segment_for(
    q: torch.Tensor,
    comm: Communicator,
    order: str,
    seq_len: int | None,
    seg: Segment | None,
    cu_seqlens: torch.Tensor | None = None,
) -> Segment:
    """The segment that local tensors of q's length were cut by; refuses a length that does not fit them."""
    T = q.shape[1]
    if seg is None:
        if seq_len is None:
            seq_len = T * comm.size if cu_seqlens is None else int(cu_seqlens[-1])
        seg = _segment_of_order(seq_len, comm, order, cu_seqlens)
    elif cu_seqlens is not None and document_edges(cu_seqlens, seg.seq_len) != seg.documents:
        raise refuse("cu_seqlens", "a tensor", "the segment given was made with other documents; give them to make_segment")
    elif seq_len not in (None, seg.seq_len):
        raise refuse("seq_len", seq_len, f"the segment given is of a sequence of {seg.seq_len}")
    else:
        _check_place("seg", seg, comm)
    if seg.local_len != T:
        raise refuse(
            "seq_len", seg.seq_len, f"cut over cp={seg.cp} in {seg.order!r} order it gives {seg.local_len} tokens a "
            f"rank, but q has {T}; cut with lss.shard and pass the true length as seq_len"
        )  # fmt: skip
    refuse_packed_rows(seg, q.shape[0])
    return seg


def refuse_packed_rows(seg: Segment, rows: int) -> None:
    """Refuse a batch of several rows whose sequence is packed: documents are given by one cu_seqlens."""
    if seg.edges and rows != 1:
        fit = f"packed sequences come one at a time, but the batch has {rows} rows"
        raise refuse("cu_seqlens", f"{len(seg.edges) - 1} documents", fit)


def kv_segment_for(
    k: torch.Tensor, comm: Communicator, queries: Segment, order: str, kv_seg: Segment | None, kv_seq_len: int | None
) -> Segment | None:
    """The segment of the keys in cross-attention; None in self-attention, where it is that of the queries."""
    T = k.shape[1]
    if kv_seg is None and kv_seq_len is None:
        if queries.local_len != T:
            fit = f"q has {queries.local_len} tokens a rank; for keys of another sequence give kv_seg or kv_seq_len"
            raise refuse("k", tuple(k.shape), fit)
        if queries.cp != comm.size:
            fit = f"queries that are whole on cp={comm.size} ranks need a kv_seg"
            raise refuse("seg", f"a segment of cp={queries.cp}", fit)
        return None
    if kv_seg is None:
        assert kv_seq_len is not None
        kv_seg = _segment_of_order(kv_seq_len, comm, order)
    elif kv_seq_len not in (None, kv_seg.seq_len):
        raise refuse("kv_seq_len", kv_seq_len, f"the kv_seg given is of a sequence of {kv_seg.seq_len}")
    _check_place("kv_seg", kv_seg, comm)
    if kv_seg.local_len != T:
        fit = f"over cp={kv_seg.cp} it gives {kv_seg.local_len} tokens a rank, but k has {T}"
        raise refuse("kv_seq_len", kv_seg.seq_len, fit)
    if len(kv_seg.documents) != len(queries.documents):
        fit = f"the queries have {len(queries.documents) - 1}; document d of the queries sees document d of the keys"
        raise refuse("kv_seg", f"{len(kv_seg.documents) - 1} documents", fit)
    return kv_seg


def _check_place(name: str, seg: Segment, comm: Communicator) -> None:
    if seg.cp > 1 and (seg.cp, seg.rank) != (comm.size, comm.rank):
        raise Refused(f"{name} is rank {seg.rank} of {seg.cp}, but this is rank {comm.rank} of cp={comm.size}.")
