"""What ranks agree on from host to host."""

from __future__ import annotations

import pytest

from lss.comm import control, count_collectives
from tests.distributed.pool import mesh, pool


def _agree(world, texts):
    import torch.distributed as dist

    with count_collectives() as counter:
        one, rank = control(mesh(world), "a test"), dist.get_rank()
        return one.largest(rank, 5 - rank), one.gather(texts[rank]), counter.calls(purpose="control")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_agree(world):
    texts = ["", "ein wörtlein", "x" * 1000, "é"][:world]
    for largest, gathered, calls in pool(world).run(_agree, world, texts):
        assert largest == (world - 1, 5)
        assert gathered == texts
        assert calls == (0 if world == 1 else 3)


def test_texts_may_all_be_empty():
    assert pool(2).run(_agree, 2, ["", ""])[0][1] == ["", ""]
