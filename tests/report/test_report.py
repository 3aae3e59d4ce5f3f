"""The page: self-contained, escaped, small, and refused in words where there is nothing to show."""

from __future__ import annotations

import html
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lss.config import Refused
from lss.report import build_report
from lss.report.plots import Curve, line_plot, thin
from lss.report.runs import flatten, number


def run(folder, steps=30, name="run"):
    folder = folder / name
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "loss": 5 / step, "grad_norm": 1.0, "lr": 0.1, "tokens_counted": 8,
                   "tokens_per_s": 1000.0 + step, "peak_memory_bytes": 2**30, "step_time_s": 0.1, "mfu": None}  # fmt: skip
            if step % 10 == 0:
                row["eval_loss"] = math.log(2) * 3
            file.write(json.dumps(row) + "\n")
    data = {"path": "<script>alert(1)</script>", "seq_len": 512 + len(name)}
    (folder / "run.json").write_text(json.dumps({"config": {"data": data}}))
    return folder


class Page(HTMLParser):
    """Collects tags and what they would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]


def test_the_peak_by_class_is_shown_where_it_was_measured(tmp_path):
    folder = run(tmp_path)
    assert "Peak memory<" not in build_report([folder]).read_text()
    classes = {"weights": 3 << 20, "<b>": 1 << 20, "broken": 10**4000, "text": "much"}
    (folder / "run.json").write_text(json.dumps({"results": {"memory": {"classes": classes}}}))
    text = build_report([folder]).read_text()
    shown = text[text.index("<h2>Peak memory</h2>") : text.index("<h2>Facts</h2>")]
    assert "<td>weights</td><td>3.00 MiB</td>" in shown
    assert "<td>&lt;b&gt;</td>" in shown
    assert "broken" not in shown
    assert "much" not in shown


def test_page_has_the_numbers_and_loads_nothing(tmp_path):
    path = build_report([run(tmp_path)])
    assert path == tmp_path / "run" / "report.html"
    text = path.read_text()
    page = Page(text)
    assert page.loads == []
    assert page.tags.count("svg") == 4
    assert page.tags.count("script") == 1
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text
    for words in ("3.000 bits per byte", "1,016 tokens/s", "1.00 GiB", "prefers-color-scheme: dark", "viewport"):
        assert words in text
    # and the browser is told to hold it to that
    assert "default-src 'none'" in text
    # urls only as names of XML vocabularies, never to fetch
    assert set(re.findall(r"https?://[^\"' <)]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_several_runs_share_the_plots(tmp_path):
    folders = [run(tmp_path, name="one"), run(tmp_path, name="other/two")]
    text = build_report(folders, tmp_path / "deep" / "page.html").read_text()
    for words in ("one: training", "two: held-out", ">two</text>", "What differs"):
        assert words in text
    # the settings that are the same are not in the table of those that differ
    differences = re.search(r"What differs</h2>(.*?)</table>", text, re.DOTALL)[1]
    assert "data.seq_len" in differences
    assert "data.path" not in differences


def test_a_hundred_thousand_steps_stay_small(tmp_path):
    assert build_report([run(tmp_path, steps=100_000)]).stat().st_size < 300_000


def test_thinning_keeps_the_extremes_and_the_ends():
    y = [math.sin(i / 100) for i in range(50_000)]
    y[31_111], y[44_444] = 9.0, -9.0
    # so that neither end is the extreme of its bucket
    y[5], y[6], y[-5], y[-6] = 2.0, -2.0, 2.0, -2.0
    x, thinned = thin(range(50_000), y, 400)
    assert len(x) <= 400
    assert {9.0, -9.0} <= set(thinned)
    assert x == sorted(x)
    assert (x[0], x[-1]) == (0, 49_999)
    assert all(y[a] == b for a, b in zip(x, thinned, strict=True))
    assert thin([1, 2, 3], [1.0, math.nan, None]) == ([1], [1.0])


def test_plots_take_the_pages_colour_and_shrink():
    svg = line_plot([Curve("a", [1, 2], [3.0, 4.0])], "nats")
    assert "currentColor" in svg
    assert not re.search(r"<svg[^>]* width=", svg)
    assert svg == line_plot([Curve("a", [1, 2], [3.0, 4.0])], "nats")


# mathematics and hidden names to matplotlib, a placeholder to a template, markup to a browser, no text at all to UTF-8
NAMES = ["a$b$", "$\\frac$", "_hidden", "$body", "@BODY@", "--><script>x</script>", "a&b", "名前", os.fsdecode(b"\xff")]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_folder_may_have_any_name(tmp_path, name):
    name_dir = tmp_path / name.replace("/", "\u2215")
    text = build_report([run(tmp_path, name="plain"), run(tmp_path, name=name_dir.name)], tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 4
    assert page.tags.count("script") == 1
    words = html.escape(name_dir.name.encode("utf-8", "replace").decode(), quote=False)
    assert f"{words}: training</text>" in text
    assert f"<td>{words}</td>" in text


def test_two_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch):
    run(tmp_path, name="a/run")
    run(tmp_path, name="b/run")
    monkeypatch.chdir(tmp_path)
    text = build_report([Path("a/run"), Path("b/run")]).read_text()
    assert "a/run: training" in text
    assert "b/run: training" in text


def test_strange_numbers_and_facts_are_shown_or_left_out(tmp_path):
    folder = run(tmp_path)
    rows = ['{"step": 31, "loss": NaN, "tokens_per_s": Infinity, "lr": null, "grad_norm": "x"}',
            '{"step": 32, "loss": 1%s, "mfu": true, "note": "\\ud800", "deep": {"a": [1]}}' % ("0" * 400),
            '{"step": 33, "loss": 1.25}']  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join(rows) + "\n")
    (folder / "run.json").write_text('{"hosts": [{"name": "n1"}], "sizes": [1, 2.5], "on": true, "none": null}')
    text = build_report([folder]).read_text(encoding="utf-8")
    for words in ("1.2500 nats", "3.000 bits per byte", "<summary>hosts[0]</summary>", "1, 2.5", "<td>yes</td>", "(nested)"):
        assert words in text
    # true is no utilisation of 100 %
    assert "utilisation" not in text


def test_numbers_are_finite_and_no_truths():
    assert [number(x) for x in (1, 2.5, True, math.nan, -math.inf, 10**400, "1", None)] == [1.0, 2.5] + [None] * 6


def test_run_json_is_flattened_in_its_order_and_bounded():
    assert flatten({"a": {"b": [{"c": 1}, [2, 3]]}, "d": []}) == {"a.b[0].c": 1, "a.b[1]": "2, 3", "d": ""}
    assert list(flatten({"z": 1, "a": {"y": 2, "b": 3}, "m": 4})) == ["z", "a.y", "a.b", "m"]
    deep = {}
    for _ in range(50_000):
        deep = {"x": deep}
    assert flatten(deep) == {}
    many = flatten({str(i): i for i in range(1500)})
    assert len(many) == 1001
    assert many["..."] == "500 more"


def test_one_row_and_no_facts_make_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    text = build_report([tmp_path]).read_text()
    assert Page(text).tags.count("svg") == 1
    assert "Facts" not in text


def test_missing_matplotlib_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Refused, match=r"pip install lss-transformer\[report\]"):
        build_report([run(tmp_path)])


def test_folders_and_targets_that_do_not_fit_are_refused(tmp_path):
    folder = run(tmp_path)
    with pytest.raises(Refused, match="no folder"):
        build_report([])
    with pytest.raises(Refused, match="twice"):
        build_report([folder, folder / ".." / "run"])
    with pytest.raises(Refused, match=r"-o=.*cannot be written"):
        build_report([folder], tmp_path)


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_run_json_is_refused(tmp_path, data):
    folder = run(tmp_path)
    (folder / "run.json").write_bytes(data)
    with pytest.raises(Refused, match=r"run\.json: (damaged|not a JSON object)"):
        build_report([folder])


DAMAGE = [
    (None, "no metrics.jsonl"),
    ("", "is empty"),
    ("{\n", "line 1"),
    ("[]\n", "not a JSON"),
    ("{}\n", "no step"),
    ('{"step": true}\n', "no step"),
    ('{"step": 1}\n\n{"step": 2}\n', "line 2"),
    ('{"step": 1}\n{"st', "line 2"),
]


@pytest.mark.parametrize("text, words", DAMAGE)
def test_nothing_to_show_is_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(Refused, match=words):
        build_report([tmp_path])
