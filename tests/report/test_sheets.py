"""Pages of benches' and plans' rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lss.cli.main import main
from lss.config import Refused
from lss.report import build_report
from lss.report.sheets import Sheet, read_sheets
from lss.report.tabled import label, section
from tests.report.test_report import Page, run

ROOT = Path(__file__).resolve().parents[2]


def bench_rows():
    for tokens in (1024, 2048):
        for strategy, ms in (("lss", tokens / 100), ("<b>ring</b>", tokens / 50)):
            yield {"bench": "attention", "strategy": strategy, "kernel": "flash", "rival": None, "order": "head_tail",
                   "options": {"head_chunks": 8} if strategy == "lss" else {}, "model": None, "layers": None,
                   "tokens": tokens, "heads": "4/2x16", "dtype": "float32", "world_size": 2, "ms": ms, "ideal_ms": ms / 2,
                   "peak_bytes": tokens << 20, "payload_bytes": 3 << 20, "calls": 3, "status": "ok", "commit": "0123456789",
                   "mfu": None}  # fmt: skip


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def body_cells(text, heading):
    """The cells of the first table under a heading: {head: [cell of every row]}."""
    text = text[text.index(f"<h2>{heading}</h2>") :]
    text = text[text.index("<table") : text.index("</table>")]
    heads = re.findall(r"<th><button>(.*?)</button>", text)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in text.split("<tbody>")[1].split("</tr>") if "<td>" in row]
    return {head: [row[i] for row in rows] for i, head in enumerate(heads)}


def test_a_bench_is_a_table_and_curves_over_lengths(tmp_path):
    written(tmp_path / "out" / "attention.jsonl", bench_rows())
    path = build_report([tmp_path / "out"])
    assert path == tmp_path / "out" / "report.html"
    text = path.read_text()
    cells = body_cells(text, "bench attention")
    assert cells["ms"] == ["10.24", "20.48", "20.48", "40.96"]
    assert cells["of ideal"] == ["0.5"] * 4
    assert cells["peak GiB"] == ["1", "1", "2", "2"]
    assert cells["tokens"] == ["1,024", "1,024", "2,048", "2,048"]
    assert cells["what"][0] == "lss flash head_tail (head_chunks=8)"
    assert "MFU" not in cells  # which no row has
    assert "<b>ring" not in text
    assert Page(text).tags.count("svg") == 2
    assert Page(text).loads == []


def test_runs_benches_and_other_rows_share_a_page(tmp_path):
    folder = run(tmp_path)
    file = written(tmp_path / "rows" / "mine.jsonl", [{"a": 1, "b": {"c": 2.5}}, {"a": 3}])
    attention = written(tmp_path / "attention.jsonl", bench_rows())
    text = build_report([folder, file, attention]).read_text()
    assert text.index("Last steps") < text.index("<h2>mine</h2>") < text.index("<h2>bench attention</h2>")
    assert body_cells(text, "mine") == {"a": ["1", "3"], "b.c": ["2.5", ""]}
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("words", [[], ["--search", "model.n_layers=2"]])
def test_a_plan_is_written_and_reported(tmp_path, words, capsys):
    args = [str(ROOT / "configs" / "tiny.toml"), "--gpus", "2", *words, "--out", str(tmp_path / "plans")]
    assert main(["plan", *args]) == 0
    rows = [json.loads(line) for line in (tmp_path / "plans" / "plans.jsonl").read_text().splitlines()]
    assert rows[0]["fits"]
    assert rows[0]["step_s"] == pytest.approx(sum(rows[0]["seconds"].values()))
    assert main(["report", str(tmp_path / "plans")]) == 0
    text = (tmp_path / "plans" / "report.html").read_text()
    cells = body_cells(text, "plans")
    assert len(cells["what"]) == len(rows)
    assert cells["fits"][0] == "yes"
    assert "<h3>Seconds of a step</h3>" in text
    if not words:
        curve = rows[0]["curve"]
        assert [name for name, _ in curve["parts"]] == ["forward", "loss", "backward", "update"]
        highest = max(map(sum, zip(*curve["gib"].values(), strict=True)))
        assert highest * 2**30 == pytest.approx(rows[0]["peak_bytes"], rel=0.05, abs=2**20)
        assert "<figcaption>Memory, tiny" in text
        # another plan stands below it
        assert main(["plan", *args]) == 0
        assert len((tmp_path / "plans" / "plans.jsonl").read_text().splitlines()) == 2


def test_compared_strategies_are_drawn_over_ranks():
    rows = [{"strategy": s, "ranks": n, "tokens": 4096 * n, "status": "ok", "seconds": n * t}
            for s, t in (("lss", 1.0), ("ring", 2.0)) for n in (1, 2, 4)]  # fmt: skip
    text = section(Sheet("strategies, planned", rows))
    assert text.count("<figcaption>Step, 4,096 tokens a rank") == 1
    assert text.count("<svg") == 1  # no length has several numbers of ranks
    assert text.count("<tr>") == 7


@pytest.mark.parametrize("row", [
    {"bench": "attention", "tokens": "many", "ms": [], "world_size": {}, "options": 3, "rival": None},
    {"plan": "x", "curve": {"gib": {"a": [1, "b"]}, "parts": 3}, "room_bytes": 5, "seconds": {"a": "b"}},
    {"plan": "x", "curve": {"gib": {str(n): [1, 2] for n in range(99)}, "parts": [["a", 0]]}, "room_bytes": 5},
    {"strategy": [], "ranks": "a", "tokens": None, "status": 1},
])  # fmt: skip
def test_strange_rows_are_shown_as_they_are(tmp_path, row):
    text = build_report([written(tmp_path / "strange.jsonl", [row])]).read_text()
    assert "<table" in text
    assert "<svg" not in text


def test_a_rival_is_called_by_its_name():
    assert label({"rival": "yunchang", "strategy": "ring", "kernel": "k", "order": "o"}) == "yunchang ring"


def test_what_holds_no_rows_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="no rows of a bench or a plan"):
        build_report([tmp_path / "empty"])
    with pytest.raises(Refused, match="holds no row yet"):
        build_report([written(tmp_path / "none.jsonl", [])])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(Refused, match=r"bad\.jsonl, line 2: damaged"):
        build_report([bad])
    good = written(tmp_path / "good.jsonl", [{"a": 1}])
    with pytest.raises(Refused, match="given twice"):
        read_sheets([good, good])
