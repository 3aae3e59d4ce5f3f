"""`lss bench scan` on CPU ranks: whole rows, checked results, bytes that do not grow, resuming, tables and pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lss.bench import Heads, Results, ScanPlan, Sizes, bench_scan, read_rows
from lss.bench.rows import KEYS
from lss.bench.tables import tables_of
from lss.cli import main
from lss.config.errors import Refused
from lss.kernels import scan_blocks
from tests.bench.test_bench import clock_of, first

SIZES = Sizes(4, 2, 3, 5)
PLAN = ScanPlan([48, 96], SIZES, Heads(4, 2, 5), window=8, attention_upto=48, dtype="float64", repeat=2)


def measure(plan: ScanPlan, ranks: int, out: Path | None = None) -> list[dict]:
    """Runs on every rank of a pool."""
    clock = clock_of(ranks)
    return bench_scan(plan, clock, Results(out, writes=clock.comm.rank == 0), "lss bench scan --some")


def measure_faulty(plan: ScanPlan, ranks: int) -> list[dict]:
    """As `measure`, where states enter no chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_blocks.ScanWork, "entered", lambda self, states, entering: states.flatten(1, 2))
        return measure(plan, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_are_whole_and_results_are_checked(ranks):
    rows = first(ranks, measure, PLAN, ranks)
    assert all(tuple(row) == KEYS for row in rows)
    assert all(row["status"] == "ok" and row["error"] <= 1e-12 and row["ms"] > 0 for row in rows)
    found = {(row["model"], row["tokens"], row["world_size"]) for row in rows}
    layers = [("scan", 48), ("scan", 96), ("attention", 48), ("attention, window 8", 48), ("attention, window 8", 96)]
    assert found == {(*layer, n) for layer in layers for n in {1, ranks}}
    assert {row["heads"] for row in rows if row["model"] == "scan"} == {"4/2x3x5"}


def test_bytes_are_those_of_states_at_any_length():
    rows = first(2, measure, PLAN, 2)
    cut = [row for row in rows if row["model"] == "scan" and row["world_size"] == 2]
    # two chunks a rank: 4 states of 4 x 3 x 5 numbers, with a decay a head in forward
    assert [(row["payload_bytes"], row["calls"]) for row in cut] == [(8 * 4 * 4 * (15 + 1 + 15), 2)] * 2


def test_long_sequences_are_checked_at_a_shorter_one():
    plan = ScanPlan(**vars(PLAN) | {"check_upto": 40, "lengths": [96], "only": ["scan lss"]})
    (row,) = [row for row in first(2, measure, plan, 2) if row["world_size"] == 2]
    assert row["status"] == "ok"
    assert 0 < row["error"] <= 1e-12


@pytest.mark.parametrize("check_upto", [96, 40])
def test_wrong_results_get_no_time(check_upto):
    plan = ScanPlan(**vars(PLAN) | {"check_upto": check_upto, "lengths": [96], "only": ["scan lss"]})
    (row,) = [row for row in first(2, measure_faulty, plan, 2) if row["world_size"] == 2]
    assert row["status"].startswith("failed: error of")
    assert row["ms"] is None


def test_resuming_skips_what_is_there_and_only_picks(tmp_path):
    out = tmp_path / "rows.jsonl"
    plan = ScanPlan(**vars(PLAN) | {"only": ["scan one device blocks 48"]})
    assert len(first(1, measure, plan, 1, out)) == 1
    assert first(1, measure, plan, 1, out) == []
    plan = ScanPlan(**vars(PLAN) | {"only": ["scan"]})
    assert [row["tokens"] for row in first(1, measure, plan, 1, out)] == [96]
    assert len(read_rows([out])) == 2


def test_the_command_writes_rows_a_table_and_pictures(tmp_path, capsys):
    out = tmp_path / "scan.jsonl"
    how = ["--lengths", "64,128", "--sizes", "2/1x4x4", "--heads", "2/1x8", "--attention-window", "16", "--repeat", "2"]
    assert main(["bench", "scan", *how, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "ns a token" in printed
    assert "6 measured" in printed
    assert {path.name.split("-")[1] for path in (tmp_path / "scan-plots").iterdir()} == {"token"}
    table = tables_of(read_rows([out]))
    assert "| scan one device blocks | 1 | 64 |" in table
    assert " | 1.000 |" in table


@pytest.mark.parametrize("arguments, words", [
    (["--sizes", "4/3x2x2"], "--sizes=4/3x2x2: write heads/groups"),
    (["--kernels", "flash"], "--kernels=flash: unknown"),
    (["--orders", "balanced"], "--orders=balanced: unknown"),
    (["--attention-window", "-1"], "--attention-window=-1: give a number from 0"),
    (["--lengths", "0"], "--lengths"),
    (["--lengths", "4000000000", "--sizes", "32/1x128x64"], "values and outputs alone"),
])  # fmt: skip
def test_refusals_are_one_sentence_and_status_2(arguments, words, capsys):
    assert main(["bench", "scan", *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert words in told
    assert "\n" not in told


def test_fewer_tokens_than_ranks_are_refused():
    with pytest.raises(Refused, match="fewer tokens than the 64 ranks"):
        PLAN.validate(64)


def test_a_kernel_that_does_not_fit_is_a_row_that_says_why():
    plan = ScanPlan(**vars(PLAN) | {"kernels": ["fla"], "lengths": [48], "only": ["scan"]})
    rows = first(1, measure, plan, 1)
    assert [row["kernel"] for row in rows] == ["fla"]
    assert "it runs on CUDA only" in rows[0]["status"]
    assert torch.cuda.is_available() or rows[0]["ms"] is None
