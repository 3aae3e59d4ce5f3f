"""Gradient buckets: summed while backward runs, in one order, unused and frozen parameters left as on one process."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import lss
from lss.comm import Communicator, count_collectives
from lss.model import Transformer
from lss.parallel.grad_sync import GradSync
from tests.distributed.model_cases import model_config
from tests.distributed.pool import mesh, pool


class Net(nn.Module):
    """A chain of layers, one that nothing uses, and one that is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, dtype=torch.float64) for _ in range(6))
        self.unused = nn.Linear(4, 4, dtype=torch.float64)
        self.frozen = nn.Linear(16, 16, dtype=torch.float64).requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.frozen(x).square().sum()


def _inputs(ranks, micro):
    return torch.randn(ranks, micro, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _sync(ranks, bucket_bytes, micro, by_hand):
    """Largest error of the summed gradients, number of all-reduces, and how many left before backward ended."""
    whole, x = Net(), _inputs(ranks, micro)
    whole(x.flatten(0, 2)).backward()
    rank = mesh(ranks)["cp"].get_local_rank()
    net = Net()
    comm = Communicator(mesh(ranks).get_group("cp"))
    before_end = []
    with count_collectives() as counter:
        if by_hand:
            for part in x[rank]:
                net(part).backward()
            lss.sum_gradients(net.parameters(), mesh(ranks))
        else:
            sync = GradSync([(list(net.parameters()), comm)], bucket_bytes)
            # the first layer's weight gets its gradient last: what has left by then left while backward ran
            net.layers[0].weight.register_hook(lambda g: before_end.append(counter.calls("all_reduce")))
            for number, part in enumerate(x[rank]):
                if number + 1 < micro:
                    with sync.no_sync():
                        net(part).backward()
                else:
                    net(part).backward()
    pairs = list(zip(net.parameters(), whole.parameters(), strict=True))
    same_absence = all((a.grad is None) == (b.grad is None) for a, b in pairs)
    error = max(float((a.grad - b.grad).abs().max()) for a, b in pairs if b.grad is not None)
    return error, same_absence, counter.calls("all_reduce"), before_end[-1] if before_end else 0


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("bucket_bytes, calls", [(1 << 20, 1), (2300, 7), (1, 14)])
def test_sums_equal_one_process(ranks, micro, bucket_bytes, calls):
    for error, same_absence, counted, _ in pool(ranks).run(_sync, ranks, bucket_bytes, micro, False):
        assert error <= 1e-13
        assert same_absence
        assert counted == calls


def test_buckets_leave_while_backward_runs():
    """The unused layer's bucket stands first and would hold all others back; with it away, all but the last leave."""
    for *_, calls, early in pool(2).run(_overlap):
        assert calls == 6
        assert early >= 5


def _overlap():
    net = Net()
    del net.unused
    early = []
    with count_collectives() as counter:
        sync = GradSync([(list(net.parameters()), Communicator(mesh(2).get_group("cp")))], 2300)
        net.layers[0].weight.register_hook(lambda g: early.append(counter.calls("all_reduce")))
        net(torch.ones(1, 16, dtype=torch.float64)).backward()
        assert sync is not None
    return counter.calls("all_reduce"), early[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_by_hand_for_a_model_of_ones_own(ranks):
    for error, same_absence, *_ in pool(ranks).run(_sync, ranks, 0, 2, True):
        assert error <= 1e-13
        assert same_absence


def _left_behind(ranks, strategy):
    """Which of a model, its first weight, gradient and optimizer state outlive the last name for them."""
    torch.manual_seed(0)
    model = lss.parallelize(Transformer(model_config(), 24), mesh(ranks), strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 10, (1, 24))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    weight = next(iter(model.parameters()))
    refs = [weakref.ref(x) for x in (model, weight, weight.grad, optimizer.state[weight]["exp_avg"])]
    del model, optimizer, weight
    gc.collect()
    return [ref() is not None for ref in refs]


@pytest.mark.parametrize("strategy", ["lss", "tp"])
def test_a_model_that_is_let_go_leaves_nothing_behind(strategy):
    """In a process that makes one model after another, as benches do, each would keep its weights' and gradients' memory."""
    assert pool(2).run(_left_behind, 2, strategy) == [[False] * 4] * 2
