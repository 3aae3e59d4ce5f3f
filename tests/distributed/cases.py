"""What rank processes compute in the attention tests."""

from __future__ import annotations

import torch

import lss
from lss.comm import count_collectives
from tests.distributed.pool import mesh


def make_qkv(B, S, N, K, H, dtype, seed=0):
    """Random q, k, v and an output gradient, equal on every rank; drawn in float64 and rounded."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, S, N, H), (B, S, K, H), (B, S, K, H), (B, S, N, H))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(q, k, v, dout, causal):
    """Attention and its gradients on one process, in float64, by autograd through plain softmax."""
    q, k, v, dout = (x.double().detach().requires_grad_() for x in (q, k, v, dout))
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        S = q.shape[1]
        scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    out = (scores.softmax(-1) @ values).transpose(1, 2)
    return (out, *torch.autograd.grad(out, (q, k, v), dout))


def relative(a, b, floor=0.0):
    """||a - b|| / ||b||."""
    return float((a - b).detach().double().norm()) / max(float(b.detach().double().norm()), floor, 1e-300)


def attention_case(cp, *, S, N, K, H=8, B=2, dtype=torch.float64, causal=True, dp=1, **options):
    """Relative errors of out, dq, dk, dv against the oracle on this rank, and the collectives counted."""
    the_mesh = mesh(cp, dp)
    order = options.get("order", "head_tail")
    whole = [x.to(the_mesh.device_type) for x in make_qkv(B, S, N, K, H, dtype)]
    expected = oracle(*whole, causal)
    q, k, v, dout = (lss.shard(x, the_mesh, order=order) for x in whole)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with count_collectives() as forward:
        out = lss.attention(*leaves, mesh=the_mesh, causal=causal, seq_len=S, **options)
    with count_collectives() as backward:
        grads = torch.autograd.grad(out, leaves, dout)
    found = [lss.unshard(x, the_mesh, order=order, length=S) for x in (out.detach(), *grads)]
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    return errors, forward.rows(), backward.rows(), forward.elements(), backward.elements()




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

    dice = random.Random(seed * 100 + mesh(cp)["cp"].get_local_rank())
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
