"""Loss, gradients and evaluation over micro-batches and ranks that count differently many labels."""

from __future__ import annotations

import pytest

from tests.distributed.pool import pool
from tests.train.jobs import no_labels, uneven_accumulation


@pytest.mark.parametrize("cp, dp", [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_uneven_micro_batches_make_one_mean(cp, dp, positions):
    overrides = [f"parallel.cp={cp}", f"parallel.dp={dp}", f"model.positions={positions}", "data.seq_len=47"]
    for result in pool(cp * dp).run(uneven_accumulation, cp * dp, overrides):
        assert result["loss"] <= 1e-12
        assert result["gradient"] <= 1e-12
        assert result["held_out"] <= 1e-12
        assert result["counted"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_without_labels_is_zero(ranks):
    assert pool(ranks).run(no_labels, ranks) == [(0.0, 0, True)] * ranks
