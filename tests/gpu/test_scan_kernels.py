"""flash-linear-attention's kernels for recurrences against the plain blocks in float64, states between chunks included."""

from __future__ import annotations

import pytest
import torch

from lss.config.errors import Refused
from lss.kernels import scan_fla
from lss.kernels.scan import scan_reference, single_scan
from lss.kernels.scan_table import SCAN_KERNELS, pick_scan_kernel
from lss.segment import make_segment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_fla = pytest.mark.skipif(scan_fla.why_not() is not None, reason=str(scan_fla.why_not()))
WHAT = ("y", "dq", "dk", "dv", "dg", "decay", "ends", "first")
# products are rounded to bfloat16 once or twice more than results are
BOUND = 1e-2
DOCUMENTS = (0, 1, 2, 66, 67, 150, 600, 601, 1000)


class Given:
    """States from chunk to chunk as a test gives them, and what it is told of them."""

    def __init__(self, entering, leaving):
        self.entering, self.leaving, self.told = entering, leaving, []

    def forward(self, decay, ends):
        self.told += [decay.flatten(2), ends.reshape(self.entering.shape)]
        return lambda: self.entering.to(ends.dtype).reshape(ends.shape)

    def backward(self, first):
        self.told.append(first.reshape(self.leaving.shape))
        return lambda: self.leaving.to(first.dtype).reshape(first.shape)


def drawn(segment, *, N, K, P, H, B=1, decay=0.1, device="cuda", seed=0):
    """q, k, v, g, dy, and states that enter and gradients that arrive: bfloat16, decays and states float32."""
    generator = torch.Generator().manual_seed(seed)
    T, M = segment.local_len, len(segment.chunks)
    shapes = [(B, T, K, P), (B, T, K, P), (B, T, N, H), (B, T, N, H), (B, M, N, P, H), (B, M, N, P, H)]
    q, k, v, dy, entering, leaving = (torch.randn(shape, generator=generator) for shape in shapes)
    # heads from those that remember long to those that forget at once
    g = -torch.rand(B, T, N, generator=generator) * decay * torch.logspace(-2, 1, N)
    true = (segment.positions < segment.seq_len)[:, None, None]
    q, k, v = (x.bfloat16().to(device) for x in (q * P**-0.5, k, v))
    # nothing leaves the last chunk, in which padding lies
    leaving *= (torch.tensor(segment.chunks) < segment.n_chunks - 1)[:, None, None, None]
    return q, k, v, g.to(device), (dy * true).bfloat16().to(device), entering.to(device), leaving.to(device)


def computed(kernel, q, k, v, g, dy, segment, passing):
    """y, its gradients, and what `passing` was told, in float64."""
    y, states = kernel.forward(q, k, v, g, segment, passing)
    grads = kernel.backward(dy, q, k, v, g, states, segment, passing)
    return [x.double() for x in (y, *grads, *(passing.told if passing else ()))]


def errors(segment, **sizes):
    """Relative error of each of WHAT, of fla's kernels."""
    *given, dy, entering, leaving = drawn(segment, **sizes)
    found, true = (
        computed(SCAN_KERNELS[name], *(x.to(dtype or x.dtype) for x in (*given, dy)), segment,
                 None if segment.cp == 1 else Given(entering, leaving))
        for name, dtype in (("fla", None), ("blocks", torch.float64))
    )  # fmt: skip
    assert all(bool(x.isfinite().all()) for x in found)
    return {w: float((a - b).norm() / b.norm().clamp_min(1e-12)) for w, a, b in zip(WHAT, found, true, strict=False)}


@needs_fla
@pytest.mark.parametrize("N, K, P, H", [(8, 1, 128, 64), (4, 4, 64, 64), (6, 2, 64, 64)])
@pytest.mark.parametrize("edges", [None, DOCUMENTS])
def test_a_whole_sequence(N, K, P, H, edges):
    segment = make_segment(1000, cp=1, rank=0, cu_seqlens=edges)
    assert max(errors(segment, N=N, K=K, P=P, H=H).values()) <= BOUND


@needs_fla
@pytest.mark.parametrize("order", ["contiguous", "head_tail"])
@pytest.mark.parametrize("edges", [None, DOCUMENTS])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_ranks_chunks_take_and_give_states(order, edges, rank):
    """1,000 tokens on three ranks: chunks of no whole number of blocks, and padding."""
    segment = make_segment(1000, cp=3, rank=rank, order=order, cu_seqlens=edges)
    found = errors(segment, N=4, K=2, P=64, H=64, B=1 if edges else 2)
    assert found.keys() == set(WHAT)
    assert max(found.values()) <= BOUND, found


@needs_fla
@pytest.mark.parametrize("cp", [1, 2])
def test_sections_pass_their_states_on(cp, monkeypatch):
    segment = make_segment(1000, cp=cp, rank=cp - 1)
    sizes = {"N": 4, "K": 1, "P": 64, "H": 64, "B": 2}
    whole = errors(segment, **sizes)
    monkeypatch.setattr(scan_fla, "SECTION", 4 * 4 * 64 * 64)
    found = errors(segment, **sizes)
    assert max(found.values()) <= BOUND, (found, whole)


@needs_fla
@pytest.mark.parametrize("decay", [1e-3, 10.0])
def test_weak_and_strong_decays(decay):
    segment = make_segment(1000, cp=2, rank=1, cu_seqlens=DOCUMENTS)
    assert max(errors(segment, N=4, K=2, P=64, H=64, decay=decay).values()) <= BOUND


@needs_fla
def test_documents_do_not_see_each_other():
    """Values of one document changed: not a bit of another's results and gradients is."""
    segment = make_segment(1000, cp=1, rank=0, cu_seqlens=DOCUMENTS)
    q, k, v, g, dy, *_ = drawn(segment, N=4, K=2, P=64, H=64)
    changed = [x.clone() for x in (q, k, v, g, dy)]
    for x in changed:
        x[:, 67:150] *= 3.0
    before, after = (computed(SCAN_KERNELS["fla"], *x, segment, None) for x in ((q, k, v, g, dy), changed))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :67], b[:, :67])
        assert torch.equal(a[:, 150:], b[:, 150:])
        assert not torch.equal(a[:, 67:150], b[:, 67:150])


@needs_fla
def test_the_loop_agrees():
    segment = make_segment(200, cp=1, rank=0)
    q, k, v, g, dy, *_ = drawn(segment, N=4, K=2, P=64, H=64)
    leaves = [x.double().requires_grad_() for x in (q, k, v, g)]
    y = scan_reference(*leaves)
    true = [y, *torch.autograd.grad(y, leaves, dy.double())]
    leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
    y = single_scan(*leaves, kernel="fla")
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    for a, b in zip(found, true, strict=True):
        assert float((a.detach().double() - b.detach()).norm() / b.norm()) <= BOUND
    assert [x.dtype for x in found] == [*[torch.bfloat16] * 4, torch.float32]


@needs_fla
@pytest.mark.parametrize("T", [65536, 1048576])
def test_time_and_memory_of_long_sequences(T):
    """Forward and backward of 32 heads of 64 with a state of 128 by 64 each: printed, with `-s`."""
    segment = make_segment(T, cp=1, rank=0)
    q, k, v, g, dy, *_ = drawn(segment, N=32, K=1, P=128, H=64)
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    held = torch.cuda.memory_allocated()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (None, start):
        torch.cuda.reset_peak_memory_stats()
        if event is not None:
            event.record()
        torch.autograd.grad(single_scan(*leaves, kernel="fla"), leaves, dy)
    stop.record()
    stop.synchronize()
    ms, peak = start.elapsed_time(stop), torch.cuda.max_memory_allocated() - held
    print(f"{T} tokens: {ms:.1f} ms, {1e6 * ms / T:.1f} ns a token, {peak / 2**30:.2f} GiB at the peak")
    # y, dq, dk, dv and dg, in the inputs' dtypes, and sections
    assert peak <= T * (3 * 32 * 64 * 2 + 2 * 2 * 128 * 2 + 2 * 32 * 4) + 4 * 2**30


@needs_fla
def test_auto_is_the_fastest_that_fits():
    q, v = (torch.zeros(1, 8, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 4))
    assert pick_scan_kernel("auto", q, v).name == "fla"
    assert pick_scan_kernel("auto", q.float(), v.float()).name == "blocks"
    torch.use_deterministic_algorithms(True)
    try:
        assert pick_scan_kernel("auto", q, v).name == "blocks"
        with pytest.raises(Refused, match="chosen by timing"):
            pick_scan_kernel("fla", q, v)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_does_not_fit_is_said():
    q, v = torch.zeros(1, 8, 1, 64, device="cuda"), torch.zeros(1, 8, 4, 64, device="cuda")
    assert pick_scan_kernel("auto", q, v).name == "blocks"
    with pytest.raises(Refused, match="it takes bfloat16"):
        pick_scan_kernel("fla", q, v)
    with pytest.raises(Refused, match="one decay a head here"):
        pick_scan_kernel("fla", q.bfloat16(), v.bfloat16(), by_channel=True)
    with pytest.raises(Refused, match="multiples of 16 up to 256, not 72 of v"):
        pick_scan_kernel("fla", q.bfloat16(), torch.zeros(1, 8, 4, 72, device="cuda").bfloat16())
