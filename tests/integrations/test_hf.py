"""Models of transformers on a cut sequence: loss and every gradient of one process, by class and by kind of batch."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", minversion="5.0")

from tests.distributed.pool import pool
from tests.integrations import hf_cases as cases

DECODERS = [name for name, case in cases.CASES.items() if "MaskedLM" not in case.model]
S = 37  # odd, and no multiple of a number of ranks


def hold(results, bound):
    for loss_error, error, name in results:
        assert loss_error <= min(bound, 1e-12)
        assert error <= bound, name


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("name", cases.CASES)
def test_every_class_equals_one_process(name, cp):
    kinds = ["plain", "padded"]
    for results in zip(*pool(cp).run(cases.parities, name, cp, kinds), strict=True):
        hold(results, cases.CASES[name].bound)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_four_ranks_and_a_window_smaller_than_the_segment(name):
    options = {"order": "contiguous"} if name == "gemma3" else {}
    hold(pool(4).run(cases.parity, name, 4, "plain", 61, options=options), cases.CASES[name].bound)
