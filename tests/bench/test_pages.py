"""Tables, plots and the command line of the bench; docs/benchmarks.md shows what the results say."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lss.bench.plots import plot_attention
from lss.bench.rows import KEYS, read_rows
from lss.bench.tables import TABLES, fill_page, tables_of
from lss.cli import main
from lss.config.errors import Refused
from tests.test_house import ROOT

ROW = dict.fromkeys(KEYS) | {
    "bench": "attention", "strategy": "lss", "kernel": "flash4", "order": "head_tail", "options": {}, "tokens": 16384,
    "heads": "32/8x128", "dtype": "bfloat16", "world_size": 2, "gpu": "H", "ms": 8.0, "spread": 0.01, "ideal_ms": 7.2,
    "no_comm_ms": 7.6, "peak_bytes": 2**31, "payload_bytes": 2**20, "calls": 3, "error": 2e-3, "status": "ok", "batch": 1,
}  # fmt: skip
ROWS = [
    ROW | {"strategy": "one device", "order": None, "world_size": 1, "ms": 14.4, "ideal_ms": None, "no_comm_ms": None},
    ROW,
    ROW | {"tokens": 8192, "ms": 4.0, "ideal_ms": 3.6, "no_comm_ms": 3.6},
    ROW | {"rival": "r 1", "strategy": "ring", "kernel": None, "ms": 16.0},
    ROW | {"rival": "r 1", "strategy": "ring", "kernel": None, "tokens": 8192, "ms": None, "status": "oom"},
    ROW | {"rival": "s", "strategy": None, "kernel": None, "ms": None, "status": "failed: not installed: y"},
    ROW | {"bench": "train", "model": "tiny", "layers": 2, "ms": 1500.0, "tokens_per_s": 9000.0, "mfu": 0.431},
]


def test_docs_show_what_the_results_say():
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text()
    assert fill_page(text, ROOT / "benchmarks" / "results") == text, "run: lss bench table --page docs/benchmarks.md"
    assert text.count("<!-- table ") == text.count("<!-- end of table -->") >= len(TABLES)


def test_tables(tmp_path):
    text = tables_of(ROWS)
    for line in (
        "| ms (share of ideal) | 8,192 | 16,384 |",
        "| one device flash4 |  | 14.40 |",
        "| lss flash4 | 4.00 (0.900) | 8.00 (0.900) |",
        "| r 1 ring | out of memory | 16.00 (0.450) |",
        "- s: not installed: y (at 16,384)",
        "| lss flash4 | 1.00 (3) | 1.00 (3) |",
        "| lss flash4 | 8,192 | 4.00 | 0.900 | 0.93 (missed) | 0.900 | 0.75 |",
        "| lss flash4 | tiny, 2 layers | 16,384 | 2 | 1.50 | 9,000 | 43.1 % | 2.00 |",
    ):
        assert line in text.splitlines()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    page = "x\n<!-- table time a*.jsonl world_size=2 -->\nold\n<!-- end of table -->\ny\n"
    filled = fill_page(page, tmp_path)
    assert "| one device flash4 |  | 14.40 |" in filled
    assert "old" not in filled
    assert fill_page(filled, tmp_path) == filled
    assert "Not measured yet." in fill_page(page.replace("world_size=2", "world_size=8 heads=1/1x1"), tmp_path)
    with pytest.raises(Refused, match="table times"):
        fill_page(page.replace("table time", "table times"), tmp_path)


def test_rows_are_read_by_identity_and_damage_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"ms": 9.0}) + "\n")
    assert [row["ms"] for row in read_rows([path])] == [9.0]
    with path.open("a") as file:
        file.write('{"bench": ')
    with pytest.raises(Refused, match="line 3"):
        read_rows([path])


@pytest.mark.parametrize("form", ["svg", "png"])
def test_plots(tmp_path, form):
    written = plot_attention(ROWS, tmp_path / "plots", form)
    assert [path.name for path in written] == [f"{kind}-32-8x128-bfloat16-H.{form}" for kind in ("time", "ideal", "memory")]
    if form == "svg":
        again = plot_attention(ROWS, tmp_path / "again", form)
        assert [a.read_bytes() for a in written] == [b.read_bytes() for b in again]
        assert "r 1 ring, 2 ranks" in written[0].read_text()


def test_the_command_line_measures_on_two_ranks_and_says_what_was_typed(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    typed = ["bench", "attention", "--nproc", "2", "--lengths", "32", "--strategies", "lss", "--repeat", "2"]
    typed += ["--out", "r.jsonl"]
    done = subprocess.run([sys.executable, "-m", "lss", *typed], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=100, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_rows([tmp_path / "r.jsonl"])
    assert [row["strategy"] for row in rows] == ["one device", "lss"]
    assert {row["command"] for row in rows} == {" ".join(["lss", *typed])}
    assert "rows: r.jsonl" in done.stdout
    assert (tmp_path / "r-plots" / "time-4-2x16-float32-cpu-x86-64.svg").is_file() or os.uname().machine != "x86_64"


def test_tables_and_plots_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "page.md").write_text("<!-- table goals *.jsonl -->\n<!-- end of table -->\n")
    assert main(["bench", "table", "a.jsonl"]) == 0
    assert "### goals: 32/8x128 heads, bfloat16, 2 ranks, H" in capsys.readouterr().out
    assert main(["bench", "table", "--page", "page.md", "--results", "."]) == 0
    assert "0.93 (missed)" in (tmp_path / "page.md").read_text()
    assert main(["bench", "plot", "a.jsonl", "--out", "p"]) == 0
    assert len(list((tmp_path / "p").iterdir())) == 3
