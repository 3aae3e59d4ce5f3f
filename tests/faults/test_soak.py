"""The soak is held to what it says: a small one passes, and one whose run was tampered with does not."""

from __future__ import annotations

import json

import pytest

from tests.faults.soak import Soak


def test_a_short_soak(tmp_path):
    soak = Soak(tmp_path / "soak", steps=40, seconds=0.01, faults=2, kinds=["layout", "kill in a save"], seed=3)
    wall = soak.run()
    assert sorted(fault.kind for fault in soak.faults) == ["kill in a save", "layout"]
    assert not any(fault.hung for fault in soak.faults)
    assert len(soak.layouts) == 2
    assert soak.computed >= 40
    assert "40 steps kept" in soak.table(wall)
    references = soak.references()
    soak.compare(*references)
    # a loss that is off in its last digits is found
    metrics = soak.out / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[20]["loss"] *= 1 + 1e-15
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AssertionError, match="step 21 differs"):
        soak.compare(*references)
