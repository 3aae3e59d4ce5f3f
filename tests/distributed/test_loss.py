"""The global loss where ranks count differently many labels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import lss
from tests.distributed.pool import mesh, pool


def _loss(cp, dp, counted, dtype, explicit_count):
    """Loss and logit gradient on this rank, and what one process has; `counted` labels by global row and position."""
    generator = torch.Generator().manual_seed(0)
    rows, S, V = 2 * dp, 12, 7
    logits = torch.randn(rows, S, V, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (rows, S), generator=generator)
    labels[torch.tensor(counted) == 0] = -100
    whole = logits.clone().requires_grad_()
    count = max(int((labels != -100).sum()), 1)
    expected = F.cross_entropy(whole.flatten(0, 1).to(torch.promote_types(dtype, torch.float32)), labels.flatten(),
                               reduction="sum") / count  # fmt: skip
    expected.backward()
    the_mesh = mesh(cp, dp)
    mine = slice(the_mesh["dp"].get_local_rank() * 2, the_mesh["dp"].get_local_rank() * 2 + 2)
    local = lss.shard(logits[mine], the_mesh).requires_grad_()
    items = count if explicit_count else None
    loss = lss.cross_entropy(local, lss.shard(labels[mine], the_mesh), the_mesh, num_items_in_batch=items)
    loss.backward()
    gradient = lss.unshard(local.grad, the_mesh, length=S)
    error = (gradient.double() - whole.grad[mine].double()).norm() / max(float(whole.grad.double().norm()), 1e-30)
    return float(loss.detach()), float(expected.detach()), float(error)


PATTERNS = {
    "prompts masked": [[0] * 9 + [1] * 3, [0] * 11 + [1], [1] * 12, [0] * 6 + [1] * 6],
    "one label": [[0] * 12, [0] * 5 + [1] + [0] * 6, [0] * 12, [0] * 12],
    "none": [[0] * 12] * 4,
}


@pytest.mark.parametrize("cp, dp", [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("explicit_count", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_loss_and_gradient_with_uneven_labels(cp, dp, pattern, explicit_count, dtype, bound):
    counted = PATTERNS[pattern][: 2 * dp]
    for loss, expected, error in pool(cp * dp).run(_loss, cp, dp, counted, dtype, explicit_count):
        assert loss == pytest.approx(expected, rel=bound, abs=1e-30)
        assert error <= bound


def _shapes():
    lss.cross_entropy(torch.randn(1, 4, 3), torch.zeros(1, 5, dtype=torch.int64), mesh(1))


def test_labels_of_another_shape_are_refused():
    ((ok, what),) = pool(1).outcomes(_shapes)
    assert not ok
    assert what[0] == "Refused"
    assert "labels=(1, 5)" in what[1]
