"""The gather by writing into peers' memory: parity in every cut, exact bytes, and delays on any rank at any step."""

from __future__ import annotations

import random
import time
from itertools import product

import pytest
import torch

import lss
from lss.comm import cp_communicator, symmetric
from lss.segment import make_mask, make_segment, plan_all, plan_push
from tests.distributed.accesses import Recorded, races
from tests.distributed.cases import attention_case, make_qkv, oracle, relative, visible
from tests.distributed.pool import mesh, pool

SYMMETRIC = {"transport": "symmetric", "H": 4}


@pytest.mark.parametrize(
    "cp, order, S, heads, chunks, regather",
    [*product([2, 3, 4], ["head_tail", "contiguous"], [24, 13, 2], [(4, 2), (6, 3)], [1, 2], [True])]
    + [(4, "head_tail", 13, (4, 4), 3, regather) for regather in (True, False)],
)
def test_attention_is_exact(cp, order, S, heads, chunks, regather):
    options = {"S": S, "N": heads[0], "K": heads[1], "order": order, "head_chunks": chunks, "regather": regather}
    for errors, *_ in pool(cp).run(attention_case, cp, **options, **SYMMETRIC):
        assert max(errors) <= 1e-13
    # each call's gradients in a room of its own
    outcomes = pool(cp).run(staged_case, cp, dkv_dtype="inputs", **options, **SYMMETRIC)
    for rank, (errors, *_, staged) in enumerate(outcomes):
        assert max(errors) <= 1e-13
        if order == "contiguous":
            assert not staged  # one call a rank: nothing to travel beside
        elif S == 24:  # without padding; the last rank's two chunks are neighbours, and one call
            assert staged == ({"kv", "dkv"} if rank < cp - 1 else {"kv"})


def staged_case(cp, **options):
    """`attention_case` with gathers in two stages, what is read first first, and gradients leaving call by call.

    Returns what went so, too. Rooms for gradients hold NaN until a call writes them.
    """
    peers, staged = cp_communicator(mesh(cp)).peers(torch.device("cpu")), set()
    before, peers.staged_bytes = peers.staged_bytes, 0
    way, rooms = symmetric.Way, symmetric.SymmetricTransport.new_dkv

    def spied(peers, name, *args, **kwargs):
        staged.add(name.rstrip("0123456789"))
        return way(peers, name, *args, **kwargs)

    symmetric.Way = spied
    symmetric.SymmetricTransport.new_dkv = lambda *args: [room.fill_(float("nan")) for room in rooms(*args)]
    try:
        return *attention_case(cp, **options), staged
    finally:
        peers.staged_bytes, symmetric.Way, symmetric.SymmetricTransport.new_dkv = before, way, rooms


def pair_case(cp, **options):
    """`attention_case`, and how many calls of two blocks there were."""
    from lss.kernels.table import KERNELS

    plain, calls = KERNELS["reference"], []
    counted = [lambda *args, f=f: (calls.append(f), f(*args)) for f in plain.pair]
    KERNELS["reference"] = plain._replace(pair=type(plain.pair)(*counted))
    try:
        return attention_case(cp, kernel="reference", dkv_dtype="inputs", **options)[0], len(calls)
    finally:
        KERNELS["reference"] = plain


@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize("S, chunks", [(24, 1), (24, 2), (72, 1)])
def test_two_prefixes_are_one_call(cp, S, chunks):
    for rank, (errors, calls) in enumerate(pool(cp).run(pair_case, cp, S=S, N=4, K=2, B=1, head_chunks=chunks, **SYMMETRIC)):
        assert max(errors) <= 1e-13
        # the last rank's two chunks are neighbours, and one block
        assert calls == (2 * chunks if rank < cp - 1 else 0)


@pytest.mark.parametrize("order", ["head_tail", "contiguous", "balanced"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_windows_and_encoders(order, window, causal):
    options = {"cu_seqlens": [0, 1, 2, 3, 19, 23], "window": window, "causal": causal, "order": order}
    for case in (attention_case, staged_case):
        for errors, *_ in pool(4).run(case, 4, S=23, N=4, K=2, B=1, **options, **SYMMETRIC):
            assert max(errors) <= 1e-13


def test_gradients_leave_after_the_last_call_that_writes_among_them():
    """Rank 0's last queries are of two documents: three calls in two rooms, the first and the last in one."""
    options = {"S": 24, "N": 4, "K": 2, "B": 1, "cu_seqlens": [0, 20, 24], "dkv_dtype": "inputs"}
    for rank, (errors, *_, staged) in enumerate(pool(2).run(staged_case, 2, **options, **SYMMETRIC)):
        assert max(errors) <= 1e-13
        assert rank == 1 or "dkv" in staged


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
def test_across_groups_that_share_out_heads(inner, order):
    options = {"S": 26, "N": 6, "K": 3, "order": order, "strategy": "lss_2d", "inner": inner, "dkv_dtype": "inputs"}
    for errors, *_ in pool(4).run(attention_case, 4, **options, **SYMMETRIC):
        assert max(errors) <= 1e-13


@pytest.mark.parametrize(
    "dtype, dkv, bound",
    # the CPU's kernel rounds gradients once, at the end: with "inputs" each call's share is rounded besides
    [(torch.bfloat16, "float32", 1.25), (torch.bfloat16, "auto", 1.25), (torch.bfloat16, "inputs", 1.5),
     (torch.float32, "auto", 1.25)],
)  # fmt: skip
def test_dtypes_that_gradients_travel_in(dtype, dkv, bound):
    options = {"S": 64, "N": 4, "K": 2, "dtype": dtype, "dkv_dtype": dkv, "H": 16}
    ((own, *_),) = pool(1).run(attention_case, 1, S=64, N=4, K=2, dtype=dtype, H=16)
    for errors, *_ in pool(4).run(attention_case, 4, transport="symmetric", **options):
        assert all(found <= bound * one + 1e-6 for found, one in zip(errors, own, strict=True)), (errors, own)


def test_bytes_are_those_of_the_keys_that_are_seen():
    """Causal and contiguous, rank r sees r + 1 of 4 segments: that much it holds after the gather, and returns."""
    options = {"S": 32, "N": 4, "K": 2, "B": 1, "order": "contiguous"}
    for rank, (_, forward, backward, *_) in enumerate(pool(4).run(attention_case, 4, **options, **SYMMETRIC)):
        size = 2 * 8 * (rank + 1) * 2 * 4 * 8
        assert forward == [("all_gather", "kv", 1, size)]
        assert backward == [("all_gather", "kv", 1, size), ("reduce_scatter", "dkv", 1, size)]


@pytest.mark.parametrize("apart", [False, True])
def test_a_plan_brings_every_gradient_home_once(apart):
    for cp, order, window in product([1, 2, 5], ["head_tail", "contiguous", "balanced"], [None, 7]):
        edges = (0, 3, 40, 61)
        mask = make_mask(edges, causal=True, window=window)
        segments = [make_segment(61, cp=cp, rank=rank, order=order, cu_seqlens=edges) for rank in range(cp)]
        plans = [plan_push(segment, segment, (mask,), True, apart) for segment in segments]
        for rank, plan in enumerate(plans):
            filled = sorted((at, at + b - a) for pieces in (p.sends[rank] for p in plans) for a, b, at in pieces)
            assert [a for a, _ in filled] == [0, *(b for _, b in filled[:-1])]
            assert filled[-1][1] == plan.length == plans[0].lengths[rank]
            # what is returned to a rank, from all rooms, covers just what it sent, and lies in slots of its own
            for owner, theirs in enumerate(plans):
                back = {at + i for room in plan.returns for at, a, b in room[owner] for i in range(b - a)}
                assert back == {at + i for a, b, at in theirs.sends[rank] for i in range(b - a)}
            taken = [slot for p in plans for slot in p.slots]
            assert len(set(taken)) == len(taken)
            for a, b, first, end in plan.sums or ():
                senders = [
                    slot for p in plans for room, slot in enumerate(p.slots)
                    if any(c <= a and b <= d for _, c, d in p.returns[room][rank])
                ]  # fmt: skip
                assert sorted(senders) == list(range(first, end))


def test_calls_of_head_tail_write_apart_and_are_summed_by_the_owner():
    """Two prefixes a rank: each in a room of its own, all in half precision, summed in float32 at home."""
    for cp in (2, 3, 8):
        segments = [make_segment(64 * cp, cp=cp, rank=rank) for rank in range(cp)]
        mask = make_mask((0, 64 * cp), causal=True)
        assert plan_all(segments[0], segments[0], (mask,)).apart
        for rank, segment in enumerate(segments):
            plan = plan_push(segment, segment, (mask,), True, True)
            assert plan.sums is not None
            slots = [(first, end) for _, _, first, end in plan.sums]
            if rank == cp - 1:  # its two chunks are neighbours, and one call's
                assert slots == [(0, cp)]
            else:  # the first chunk is seen by the second queries of all, and the first ones from this rank on
                assert slots == [(0, 2 * cp - 1 - rank), (0, rank + 1)]


def late_case(cp, seed, rounds, order="head_tail", **options):
    """Worst error of several attentions in a row, each on other numbers, with this rank late at any step of a transfer."""
    the_mesh = mesh(cp)
    device = torch.device(the_mesh.device_type)
    peers = cp_communicator(the_mesh).peers(device)
    dice = random.Random(seed * 100 + the_mesh["cp"].get_local_rank())

    def pause(_step):
        late = dice.random() < 0.3
        time.sleep(0.03 * dice.random() if late else 0.0)
        if device.type == "cuda" and dice.random() < 0.3:  # the stream at hand stands still, some 10 ms
            torch.cuda._sleep(int(20_000_000 * dice.random()))

    before = peers.staged_bytes
    peers.pause, peers.staged_bytes = pause, 0 if seed % 2 else None
    worst = 0.0
    try:
        for turn in range(rounds):
            whole = [x.to(device) for x in make_qkv(1, 13, 4, 4, 8, torch.float64, seed=seed * 50 + turn)]
            expected = oracle(whole, visible(13, True))
            q, k, v, dout = (lss.shard(x, the_mesh, order=order) for x in whole)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = lss.attention(*leaves, mesh=the_mesh, seq_len=13, order=order, transport="symmetric", **options)
            grads = torch.autograd.grad(out, leaves, dout)
            for found, true in zip((out.detach(), *grads), expected, strict=True):
                worst = max(worst, relative(found, lss.shard(true.detach(), the_mesh, order=order)))
    finally:
        peers.pause, peers.staged_bytes = None, before
    return worst


@pytest.mark.parametrize("chunks", [1, 3])  # three chunks use a buffer twice in one pass
@pytest.mark.parametrize("seed", range(2))
def test_parity_holds_when_ranks_are_late(chunks, seed):
    assert max(pool(3).run(late_case, 3, seed, 4, head_chunks=chunks)) <= 1e-13


def recorded_case(cp, staged, rounds, **options):
    """This rank's accesses to all buffers in several attentions in a row, without and with stages."""
    peers = cp_communicator(mesh(cp)).peers(torch.device("cpu"))
    case = staged_case if staged else attention_case
    case(cp, **options)  # opens the buffers
    with Recorded(peers) as recorded:
        for _ in range(rounds):
            case(cp, **options)
    return recorded.accesses


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("order, dkv_dtype", [("head_tail", "inputs"), ("head_tail", "float32"), ("contiguous", "inputs")])
def test_no_rank_writes_what_another_may_be_at(order, dkv_dtype, staged, chunks):
    """Whatever the delays: what two ranks do to the same bytes, one of them writing, has a barrier in between."""
    options = {"S": 12, "N": 4, "K": 4, "order": order, "head_chunks": chunks, "dkv_dtype": dkv_dtype}
    ranks = pool(3).run(recorded_case, 3, staged, 2, **options, **SYMMETRIC)
    assert races(ranks) == []
    # each rank reads all of its own buffers, and writes the others' at least
    for rank, accesses in enumerate(ranks):
        names = {(name.rstrip("0123456789"), owner == rank, written) for _, name, owner, written in accesses}
        assert {("kv", True, False), ("dkv", True, False)} <= names
        assert ("kv", False, True) in names or (order == "contiguous" and rank == 2)
        assert ("dkv", False, True) in names or (order == "contiguous" and rank == 0)


@pytest.mark.parametrize("staged", [False, True])
def test_no_rank_clears_what_another_may_be_writing(staged):
    """Slots that are not all filled are cleared: rank 0's, of many documents in balanced order."""
    options = {"S": 23, "N": 4, "K": 2, "B": 1, "cu_seqlens": [0, 1, 2, 3, 19, 23], "order": "balanced"}
    assert races(pool(4).run(recorded_case, 4, staged, 2, **options, **SYMMETRIC)) == []


def many_plans_case(cp):
    """Routes and errors after more plans than are kept, each used twice."""
    from lss.comm.symmetric import MOST_ROUTES

    worst = 0.0
    for turn in range(MOST_ROUTES + 4):
        # the longest first: a buffer that grows takes its routes with it
        errors, *_ = attention_case(cp, S=120 - turn // 2, N=2, K=1, B=1, transport="symmetric", H=2)
        worst = max(worst, *errors)
    return len(cp_communicator(mesh(cp)).peers(torch.device("cpu")).routes) <= MOST_ROUTES, worst


def test_routes_of_past_batches_are_forgotten():
    for bounded, worst in pool(2).run(many_plans_case, 2):
        assert bounded
        assert worst <= 1e-13


def _unknown():
    x = torch.randn(1, 4, 2, 8)
    lss.attention(x, x, x, mesh=mesh(2), transport="telepathy")


def test_an_unknown_transport_is_refused():
    for ok, what in pool(2).outcomes(_unknown):
        assert not ok
        assert what[0] == "Refused"
        assert "symmetric" in what[1]
