"""The report's page in a browser: Chromium without a window, where one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from lss.report import build_report
from tests.report.test_report import run
from tests.report.test_sheets import bench_rows, written

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
# what the page itself then says: its width, what its first table's column holds before and after clicks, and its colours
PROBE = """<script>
const heads = table => [...table.tHead.rows[0].cells], isTime = head => head.textContent === "ms";
const table = [...document.querySelectorAll("table.sortable")].find(table => heads(table).some(isTime));
const head = heads(table).find(isTime);
const cells = () => [...table.tBodies[0].rows].map(row => row.cells[head.cellIndex].textContent);
const found = {wide: document.documentElement.scrollWidth, window: innerWidth, before: cells(), paper:
  getComputedStyle(document.body).backgroundColor, drawn: document.querySelectorAll("figure svg path").length};
head.firstChild.click(); found.rising = cells();
head.firstChild.click(); found.falling = cells(); found.sort = head.ariaSort;
document.title = "found " + JSON.stringify(found);
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of a run and of a bench, whose column of times is not in order."""
    folder = tmp_path_factory.mktemp("page")
    written(folder / "bench" / "attention.jsonl", bench_rows())
    report = build_report([run(folder), folder / "bench"], folder / "report.html")
    return report.read_text(encoding="utf-8")


def opened(folder, text, *options):
    """(the page after its scripts, what the browser's console said)."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
               f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", file.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probed(folder, text, *options):
    dom, console = opened(folder, text.replace("</body>", PROBE), *options)
    (found,) = re.findall(r"<title>found (.*?)</title>", dom)
    return json.loads(found), console


@pytest.mark.parametrize("size", ["1280,900", "500,900"])  # the narrowest window that it opens
def test_nothing_overflows_tables_sort_and_the_console_is_silent(size, page, tmp_path):
    found, console = probed(tmp_path, page, f"--window-size={size}")
    assert console == []
    assert found["window"] == int(size.split(",")[0])
    assert found["wide"] <= found["window"]
    assert found["drawn"] > 10
    assert sorted(found["before"], key=float) == found["rising"] == found["falling"][::-1]
    assert found["rising"] != found["falling"]
    assert found["sort"] == "descending"


def test_dark_and_light(page, tmp_path):
    (light, _), (dark, console) = (
        probed(tmp_path / name, page, f"--blink-settings=preferredColorScheme={scheme}")
        for name, scheme in (("light", 1), ("dark", 0))
        if (tmp_path / name).mkdir() is None
    )
    assert console == []
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")


def test_an_error_of_a_script_would_be_seen(page, tmp_path):
    _, console = opened(tmp_path, page.replace("<script>", "<script>missing();"))
    assert "missing is not defined" in console[0]
    _, console = opened(tmp_path, page.replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1>'))
    assert "Content Security Policy" in console[0]
