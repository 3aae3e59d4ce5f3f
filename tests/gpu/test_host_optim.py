"""AdamW's state on the host of a GPU: copies beside the computation bring what copies that are waited for bring."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lss.train.host_optim import HostAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def build(device):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).to(device)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    return model, HostAdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8, bucket_bytes=8 << 20)


def test_a_gpus_weights_are_those_of_the_same_updates_on_the_cpu():
    (gpu, on_host), (cpu, plain) = build("cuda"), build("cpu")
    assert len(on_host.param_groups) == 8
    assert all(p.is_pinned() for p in (on_host.home(q) for q in gpu.parameters()))
    before = torch.cuda.memory_allocated()
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(gpu.parameters(), cpu.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            # made on the device just before: the copies must wait for it
            p.grad = q.grad.cuda() * 2.0 / 2.0
        on_host.step()
        plain.step()
        # read right after: the stream must wait for the new weights
        found = [p.detach() + 0.0 for p in gpu.parameters()]
        on_host.zero_grad()
        assert all(torch.equal(x.cpu(), q.detach()) for x, q in zip(found, cpu.parameters(), strict=True))
    del found
    assert torch.cuda.memory_allocated() == before
