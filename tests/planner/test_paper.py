"""benchmarks/paper.py: its formulas, and that docs/paper.md shows its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from lss.planner import HARDWARE, Plan
from lss.planner.ledger import Peak
from tests.test_house import ROOT


@pytest.fixture(scope="module")
def paper():
    spec = spec_from_file_location("paper_bench", ROOT / "benchmarks/paper.py")
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "paper_bench", module)
        spec.loader.exec_module(module)
        yield module


HARD = replace(HARDWARE["v100"], bandwidth=1e3, matrices=1e6)


def test_scores_that_are_written_down(paper):
    sizes = paper.Sizes(layers=2, width=8, heads=4, tokens=10, ranks=5, number=2)
    scores = 2 * 4 * 10 * 10 / 5
    seconds, kept = paper.unfused(sizes, 1 / 5, HARD)
    assert kept == 5 * scores
    assert seconds == pytest.approx(40 * scores / 1e3 + 3 * 4 * scores * 2 / 1e6)
    assert paper.unfused(replace(sizes, number=4), 1 / 5, HARD)[1] == 9 * scores


def test_attention_left_whole(paper):
    sizes = paper.Sizes(layers=2, width=8, heads=4, tokens=10, ranks=5, number=2)
    seconds, more = paper.left_whole(sizes, HARD)
    weights = 2 * 4 * 8 * 8 * 4 / 5
    assert seconds == pytest.approx(6 * weights * 10 / 1e6)
    assert more == round(4 * 10 * 8 * 2 * 2 * 4 / 5 + 16 * weights)
    assert paper.left_whole(replace(sizes, ranks=1), HARD) == (0.0, 0)


def test_rows_of_a_plan(paper):
    sizes = paper.Sizes(layers=2, width=8, heads=4, tokens=10, ranks=5, number=2)
    parts = {"attention": 1.5, "bubbles": 0.5, "matrices": 1.0, "exchange": 3.0, "gradients": 1.0}
    plan = Plan(Peak(1 << 30, "forward", "", {}, 0), 2 << 30, parts, {}, 7e15, 10, 10, HARD)
    flash, unfused = paper.rows_of(plan, "lss", sizes, "half", 10)
    scores, _ = paper.unfused(sizes, 1 / 5, paper.PRECISIONS["half"][2])
    assert unfused["seconds"] == pytest.approx(7 - 2 + scores, rel=1e-3)  # of all scores no rank has more than another
    assert (flash["seconds"], flash["gib"], flash["pflops"], flash["fits"]) == (7.0, 1.0, 1.0, True)
    assert flash["hidden_pflops"] == pytest.approx(7 / 3, rel=1e-3)
    whole, _ = paper.rows_of(plan, "whole", sizes, "half", 10)
    assert whole["seconds"] == pytest.approx(7 - 2 + 2 * 5, rel=1e-3)


def test_every_run_can_be_made(paper):
    for way, gpus in (("lss", 6), ("tp", 36), ("lss", 3456), ("tp", 3456)):
        config = paper.config_of(way, 6, 1152, "single", gpus)
        assert config.data.seq_len == 348 * config.parallel.cp
        assert config.parallel.cp * config.parallel.dp == gpus


def test_the_page_shows_the_rows(paper):
    rows = [json.loads(line) for line in paper.ROWS.read_text().splitlines()]
    assert len(rows) == len(paper.LAYERS) * len(paper.WIDTHS) * len(paper.PRECISIONS) * len(paper.GPUS) * len(paper.WAYS) * 2
    text = paper.PAGE.read_text()
    assert paper.fill(text, rows) == text, "run: python benchmarks/paper.py --page"
    assert paper.fill(text, [row | {"seconds": 2 * row["seconds"]} for row in rows]) != text
