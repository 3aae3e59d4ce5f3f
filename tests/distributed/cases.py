"""What rank processes compute in the attention tests."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import create_mask

import lss
from lss.comm import Communicator, count_collectives
from lss.kernels.dropout import keyed_keep
from lss.mesh import axis_group
from tests.distributed.pool import mesh


def make_qkv(B, S, N, K, H, dtype, seed=0, k_len=None):
    """Random q, k, v and an output gradient, equal on every rank; drawn in float64 and rounded."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, S, N, H), (B, k_len or S, K, H), (B, k_len or S, K, H), (B, S, N, H))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def visible(S, causal, window=None, cu_seqlens=None, prefix=0, k_len=None, kv_cu_seqlens=None):
    """Which key (column) each query (row) of a sequence sees, straight from the definition."""
    i, j = torch.arange(S)[:, None], torch.arange(k_len or S)[None, :]
    document = torch.bucketize(i, torch.tensor(cu_seqlens or [0, S])[1:], right=True)
    k_edges = kv_cu_seqlens or ([0, k_len] if k_len else cu_seqlens or [0, S])
    k_document = torch.bucketize(j, torch.tensor(k_edges)[1:], right=True)
    allowed = document == k_document
    if causal:
        starts = torch.tensor(cu_seqlens or [0, S])[:-1]
        length = torch.tensor(prefix) if not isinstance(prefix, int) else torch.full_like(starts, prefix)
        in_prefix = j < (starts + length)[k_document]
        allowed &= (i >= j) | (in_prefix & (i < (starts + length)[document]))
    if window is not None:
        allowed &= (i - j).abs() < window
    return allowed


def oracle(whole, allowed, *, softcap=0.0, alibi_slopes=None, sinks=None, dropout_p=0.0, seed=0, first_sample=0, scale=None):
    """Attention and its gradients on one process, in float64, by autograd through plain softmax.

    `allowed` is (Tq, Tk) or (B, N, Tq, Tk). Returns out, dq, dk, dv and, with sinks, their gradient.
    """
    q, k, v, dout = (x.double().detach().requires_grad_() for x in whole)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ keys.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    i, j = torch.arange(scores.shape[2], device=q.device), torch.arange(scores.shape[3], device=q.device)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = torch.tensor(alibi_slopes, dtype=torch.float64, device=q.device)
        scores = scores - slopes[:, None, None] * (i[:, None] - j).abs()
    scores = scores.masked_fill(~allowed.to(q.device), float("-inf"))
    leaves = [q, k, v]
    if sinks is not None:
        leaves.append(torch.tensor(sinks, dtype=torch.float64, device=q.device, requires_grad=True))
        scores = torch.cat((scores, leaves[3][:, None, None].expand(*scores.shape[:3], 1)), -1)
    p = scores.softmax(-1)
    p = p.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)  # of a query that sees nothing
    p = p[..., : len(j)]
    if dropout_p:
        samples = first_sample + torch.arange(len(q), device=q.device)
        heads = torch.arange(q.shape[2], device=q.device)
        p = p * keyed_keep(dropout_p, seed=seed, samples_B=samples, heads_N=heads, i=i, j=j) / (1 - dropout_p)
    out = (p @ values).transpose(1, 2)
    return (out, *torch.autograd.grad(out, leaves, dout))


def relative(a, b, floor=0.0):
    """||a - b|| / ||b||; infinite where it is no number, since `max` passes over NaN."""
    error = float((a - b).detach().double().norm()) / max(float(b.detach().double().norm()), floor, 1e-300)
    return error if error == error else float("inf")


def checkerboard(b, h, i, j):
    """A mask_mod that is no window, document or prefix, and other in each row and head."""
    return ((i // 3 + j // 2 + h + b) % 3 != 0) | (i == j)


def blocks_of_eight(b, h, i, j):
    """A mask_mod that some queries see nothing under: every other block of 8 queries."""
    return (i // 8 == j // 8) & (i // 8 % 2 == 0)


MASK_MODS = {"checkerboard": checkerboard, "blocks_of_eight": blocks_of_eight}


def _sides(S, options, the_mesh, causal):
    """(queries' segment, keys' segment or None) of this rank, and their length."""
    edges, kv = options.get("cu_seqlens"), options.get("kv")
    as_tensor = None if edges is None else torch.tensor(edges, dtype=torch.int32 if isinstance(edges[0], int) else None)
    order, window = options.get("order", "head_tail"), options.get("window")
    seg = lss.make_segment(S, the_mesh, order, as_tensor, causal=causal, window=window)
    if kv is None:
        return seg, None
    # kv: (length, "cut" or "whole", whether the queries are cut, borders of the keys' documents)
    length, how, queries, k_edges = kv
    borders = None if k_edges is None else torch.tensor(k_edges, dtype=torch.int32)
    if queries == "whole":
        seg = lss.make_segment(S, None, cu_seqlens=as_tensor)
    k_order = "contiguous" if order == "balanced" else order
    return seg, lss.make_segment(length, None if how == "whole" else the_mesh, k_order, borders)


def attention_case(cp, *, S, N, K, H=8, B=2, dtype=torch.float64, causal=True, dp=1, per_node=None, **options):
    """Relative errors of out, dq, dk, dv (and dsinks) against the oracle on this rank, and the collectives counted.

    Besides those of `lss.attention` takes `keep` (rows of runs), `mask_mod` by name, `sinks` and slopes as lists, `kv` for
    cross-attention (see `_sides`), and `per_node`, ranks per node, as if there were several.
    """
    the_mesh = mesh(cp, dp, per_node)
    seg, kv_seg = _sides(S, options, the_mesh, causal)
    kv, k_len = options.pop("kv", None), S if kv_seg is None else kv_seg.seq_len
    whole = [x.to(the_mesh.device_type) for x in make_qkv(B, S, N, K, H, dtype, k_len=k_len)]
    window, edges, prefix = (options.get(name) for name in ("window", "cu_seqlens", "prefix"))
    keep, mod = options.pop("keep", None), options.pop("mask_mod", None)
    allowed = visible(S, causal, window, edges, prefix or 0, k_len if kv else None, kv[3] if kv else None)
    if keep is not None:
        mask = torch.zeros(B, k_len, dtype=torch.bool)
        for row, runs in enumerate(keep):
            for a, b in runs:
                mask[row, a:b] = True
        options["attention_mask"] = mask
        allowed = allowed & mask[:, None, None, :]
        if kv is None:
            allowed = allowed & mask[:, None, :, None]
    if mod is not None:
        options["mask_mod"] = MASK_MODS[mod]
        allowed = allowed & create_mask(MASK_MODS[mod], B, N, S, k_len, device="cpu")
    scored = {name: options[name] for name in ("softcap", "alibi_slopes", "sinks", "dropout_p", "seed") if name in options}
    expected = oracle(whole, allowed, **scored)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(edges, dtype=torch.int32 if isinstance(edges[0], int) else None)
    if options.get("order") == "balanced" or kv is not None:  # given as a segment, that holds the documents
        options = {key: value for key, value in options.items() if key not in ("order", "cu_seqlens")} | {"seg": seg}
    if kv_seg is not None:
        options["kv_seg"] = kv_seg
    if not isinstance(prefix, int | None):
        options["prefix"] = torch.tensor(prefix)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor(options["alibi_slopes"], dtype=torch.float64)
    segs = (seg, kv_seg or seg, kv_seg or seg, seg)
    q, k, v, dout = (lss.shard(x, the_mesh, seg=s) for x, s in zip(whole, segs, strict=True))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    if "sinks" in options:
        leaves.append(torch.tensor(options["sinks"], dtype=torch.float64, device=q.device, requires_grad=True))
        options["sinks"] = leaves[3]
    with count_collectives() as forward:
        out = lss.attention(*leaves[:3], mesh=the_mesh, causal=causal, seq_len=S, **options)
    with count_collectives() as backward:
        grads = torch.autograd.grad(out, leaves, dout)
    found = [_put_back(x, s, the_mesh) for x, s in zip((out.detach(), *grads[:3]), (seg, *segs[:3]), strict=True)]
    comm = Communicator(axis_group(the_mesh, ("cp",)))
    if kv is not None:  # what is whole on every rank has a share of its gradient on each
        found = [x / share if share else comm.all_reduce(x.clone(), "test").wait()
                 for x, share in zip(found, _shares(kv[1], kv[2], cp), strict=True)]  # fmt: skip
    if "sinks" in options:
        found.append(comm.all_reduce(grads[3].clone(), "test").wait())
    # with a single visible key dq and dk are 0, and what stands there is the rounding of numbers as large as the output
    floor = float(expected[0].detach().norm())
    errors = [relative(a, b, 0.1 * floor) for a, b in zip(found, expected, strict=True)]
    return errors, forward.rows(), backward.rows(), forward.elements(), backward.elements()


def _shares(keys, queries, cp):
    """What out, dq, dk and dv are to be divided by to be the whole gradient; 0: summed over ranks."""
    if queries == "cut":
        return (1, 1, 1, 1) if keys == "cut" else (1, 1, 0, 0)
    # the same outputs on every rank, so the sum over ranks of their losses counts each cp times
    return (1, 1, cp, cp) if keys == "cut" else (1, 1, 1, 1)


def _put_back(x, seg, the_mesh):
    return x if seg.cp == 1 and the_mesh["cp"].size() > 1 else lss.unshard(x, the_mesh, seg=seg)


def counted_case(cp, *, S, N, K, H=8, B=1, dp=1, per_node=None, **options):
    """What one forward and backward count: {(kind, purpose, link): (calls, bytes)} of each, and the counters."""
    the_mesh = mesh(cp, dp, per_node)
    whole = (x.to(the_mesh.device_type) for x in make_qkv(B, S, N, K, H, torch.float64))
    q, k, v, dout = (lss.shard(x, the_mesh) for x in whole)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with count_collectives() as forward:
        out = lss.attention(*leaves, mesh=the_mesh, **options)
    with count_collectives() as backward:
        out.backward(dout)
    found = [{key: (t.calls, t.bytes) for key, t in counter.tallies.items()} for counter in (forward, backward)]
    return *found, forward, backward


def order_of_events(cp, chunks):
    """What one forward and backward of LSS attention does, in order, on this rank."""
    from lss.comm import Communicator, Pending
    from lss.kernels import Kernel

    events, originals = [], (Communicator.all_gather_kv, Communicator.reduce_scatter_dkv, Kernel.forward, Kernel.backward)

    def spied(name, original):
        def call(*args, **kwargs):
            events.append(name)
            result = original(*args, **kwargs)
            if isinstance(result, Pending):
                wait = result.wait
                result.wait = lambda: (events.append(f"{name} done"), wait())[1]
            return result

        return call

    names = ("gather", "scatter", "attend", "attend back")
    places = [(Communicator, "all_gather_kv"), (Communicator, "reduce_scatter_dkv")]
    places += [(Kernel, "forward"), (Kernel, "backward")]
    for (owner, attribute), name, original in zip(places, names, originals, strict=True):
        setattr(owner, attribute, spied(name, original))
    try:
        attention_case(cp, S=16, N=4, K=4, head_chunks=chunks, order="contiguous")
    finally:
        for (owner, attribute), original in zip(places, originals, strict=True):
            setattr(owner, attribute, original)
    return events


def delayed_case(cp, strategy, seed, **options):
    """`attention_case` with a random pause of this rank before every collective is issued and after each is done."""
    import random
    import time

    from lss.comm import Communicator, Pending

    dice = random.Random(seed * 100 + mesh(cp, 1, options.get("per_node"))["cp"].get_local_rank())
    names = ["all_gather_kv", "reduce_scatter_dkv", "shift", "all_to_all"]
    originals = {name: getattr(Communicator, name) for name in names}
    wait = Pending.wait

    def paused(original):
        def call(*args, **kwargs):
            time.sleep(dice.random() * 0.02)
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(Communicator, name, paused(original))
    Pending.wait = paused(wait)
    try:
        return attention_case(cp, strategy=strategy, **options)
    finally:
        Pending.wait = wait
        for name, original in originals.items():
            setattr(Communicator, name, original)
