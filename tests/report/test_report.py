"""The page: self-contained, escaped, small, and refused in words where there is nothing to show."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from lss.config import Refused
from lss.report import build_report
from lss.report.plots import line_plot, thin


def run(folder, steps=30, name="run"):
    folder = folder / name
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "loss": 5 / step, "grad_norm": 1.0, "lr": 0.1, "tokens_counted": 8,
                   "tokens_per_s": 1000.0 + step, "peak_memory_bytes": 2**30, "step_time_s": 0.1, "mfu": None}  # fmt: skip
            if step % 10 == 0:
                row["eval_loss"] = math.log(2) * 3
            file.write(json.dumps(row) + "\n")
    (folder / "run.json").write_text(json.dumps({"config": {"data": {"path": "<script>alert(1)</script>"}}}))
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
    # urls only as names of XML vocabularies, never to fetch
    assert set(re.findall(r"https?://[^\"' <)]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_several_runs_share_the_plots(tmp_path):
    text = build_report([run(tmp_path, name="one"), run(tmp_path, name="two")], tmp_path / "deep" / "page.html").read_text()
    assert "one: training" in text
    assert "two: held-out" in text


def test_a_hundred_thousand_steps_stay_small(tmp_path):
    assert build_report([run(tmp_path, steps=100_000)]).stat().st_size < 300_000


def test_thinning_keeps_the_extremes():
    y = [math.sin(i / 100) for i in range(50_000)]
    y[31_111], y[44_444] = 9.0, -9.0
    x, thinned = thin(range(50_000), y, 400)
    assert len(x) <= 400
    assert {9.0, -9.0} <= set(thinned)
    assert x == sorted(x)
    assert thin([1, 2, 3], [1.0, math.nan, None]) == ([1], [1.0])


def test_plots_take_the_pages_colour_and_shrink():
    svg = line_plot([("a", [1, 2], [3.0, 4.0])], "nats")
    assert "currentColor" in svg
    assert not re.search(r"<svg[^>]* width=", svg)
    assert svg == line_plot([("a", [1, 2], [3.0, 4.0])], "nats")


DAMAGE = [(None, "no metrics.jsonl"), ("", "is empty"), ("{\n", "line 1"), ("[]\n", "not a JSON"), ("{}\n", "no step")]


@pytest.mark.parametrize("text, words", DAMAGE)
def test_nothing_to_show_is_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(Refused, match=words):
        build_report([tmp_path])
