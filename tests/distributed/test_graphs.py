"""torch.compile around attention: one break of the graph, at its call; and operators that traces pass over."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lss
from lss.kernels import KERNELS
from tests.distributed.pool import mesh, pool


def compiled_layer(cp, transport):
    """(worst difference of gradients from those of the layer as it is, graphs that were made)."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    the_mesh, generator = mesh(cp), torch.Generator().manual_seed(0)
    weights = [torch.randn(32, 32, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    x = lss.shard(torch.randn(1, 24, 32, dtype=torch.float64, generator=generator), the_mesh)

    def layer(x):
        q = (x @ weights[0]).unflatten(-1, (4, 8))
        out = lss.attention(q, q.sin(), q * 0.5, mesh=the_mesh, transport=transport)
        return (out.flatten(-2) @ weights[1]).relu().sum()

    expected = torch.autograd.grad(layer(x), weights)
    found = torch.autograd.grad(torch.compile(layer, backend="aot_eager")(x), weights)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("cp, transport", [(1, "auto"), (2, "collective"), (2, "symmetric")])
def test_a_graph_breaks_at_attention_and_nowhere_else(cp, transport):
    for difference, graphs in pool(cp).run(compiled_layer, cp, transport):
        assert difference == 0.0
        assert graphs == 2


def test_flash_attn_4_is_an_operator_with_a_fake():
    """Where it is not installed too: a trace needs neither it nor a GPU."""
    with FakeTensorMode():
        q, k = (torch.empty(2, 64, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (8, 2))
        out, lse = KERNELS["flash4"].run(q, k, k, causal=True, scale=0.1)
        grads = KERNELS["flash4"].grad(out, q, k, k, out, lse, causal=True, scale=0.1)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((2, 8, 64), torch.float32)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
