"""One self-contained HTML page of one or more runs: no network, readable on a phone, light and dark."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lss.config.errors import Refused, refuse
from lss.report.plots import Curve, line_plot

LAST_ROWS = 50
LARGEST_FILE = 1 << 30  # bytes of metrics; a run of ten million steps stays below


@dataclass
class Run:
    """One run's files, read."""

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    facts: dict[str, Any]

    def curve(self, key: str, name: str) -> Curve:
        """(name, steps, values) of one key, rows that lack it left out."""
        rows = [row for row in self.rows if isinstance(row.get(key), (int, float))]
        return name, [row["step"] for row in rows], [float(row[key]) for row in rows]


def build_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Make a page of the runs in these folders; returns its path, by default `report.html` in the first.

    Reads metrics.jsonl and, where it is there, run.json.

    Raises:
        Refused: a folder holds no metrics, a file is damaged, matplotlib is missing, or the page cannot be written.
    """
    runs = [_read(Path(folder)) for folder in folders]
    target = output or runs[0].folder / "report.html"
    page = _page(runs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page)
    except OSError as error:
        raise refuse("-o", target, f"cannot be written ({error.strerror})") from error
    return target


def _read(folder: Path) -> Run:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise refuse("DIR", folder, "holds no metrics.jsonl; give the folder of a run")
    if path.stat().st_size > LARGEST_FILE:
        raise refuse("DIR", folder, f"its metrics.jsonl has {path.stat().st_size:,} bytes, too many for a page")
    rows = [_json(line, f"{path}, line {number}") for number, line in enumerate(path.read_text().splitlines(), 1)]
    if not rows:
        raise refuse("DIR", folder, "its metrics.jsonl is empty: no step has been done yet")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), int):
            raise Refused(f"{path}, line {number}: not a row of metrics, it has no step.")
    facts_path = folder / "run.json"
    facts = _json(facts_path.read_text(), str(facts_path)) if facts_path.is_file() else {}
    return Run(folder.resolve().name, folder, rows, facts)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Refused(f"{where}: damaged ({error}).") from None
    if not isinstance(value, dict):
        raise Refused(f"{where}: not a JSON object.")
    return value


def _page(runs: Sequence[Run]) -> str:
    title = "Run " + ", ".join(run.name for run in runs) if len(runs) == 1 else "Runs " + ", ".join(run.name for run in runs)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for run in runs:
        parts.append(_cards(run, with_name=len(runs) > 1))
    parts += [f'<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>' for caption, svg in _figures(runs)]
    for run in runs:
        parts.append(f"<h2>Last steps of {html.escape(run.name)}</h2>{_table(run)}")
        parts.append(f"<h2>Facts of {html.escape(run.name)}</h2>{_facts(run.facts)}")
    return _TEMPLATE.replace("@TITLE@", html.escape(title)).replace("@BODY@", "\n".join(parts))


def _cards(run: Run, with_name: bool) -> str:
    last = run.rows[-1]
    cards = [("step", f"{last['step']:,}")]
    if isinstance(last.get("loss"), (int, float)):
        cards.append(("training loss", f"{last['loss']:.4f} nats"))
    held_out = [row["eval_loss"] for row in run.rows if isinstance(row.get("eval_loss"), (int, float))]
    if held_out:
        cards.append(("held-out", f"{held_out[-1] / math.log(2):.3f} bits per byte"))
    speeds = [row["tokens_per_s"] for row in run.rows if isinstance(row.get("tokens_per_s"), (int, float))]
    if speeds:
        cards.append(("speed, median", f"{statistics.median(speeds):,.0f} tokens/s"))
    peaks = [row["peak_memory_bytes"] for row in run.rows if isinstance(row.get("peak_memory_bytes"), int)]
    if peaks:
        cards.append(("peak memory, rank 0", f"{max(peaks) / 2**30:.2f} GiB"))
    mfu = [row["mfu"] for row in run.rows if isinstance(row.get("mfu"), (int, float))]
    if mfu:
        cards.append(("model FLOP utilisation, median", f"{statistics.median(mfu):.1%}"))
    name = f"<h2>{html.escape(run.name)}</h2>" if with_name else ""
    body = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in cards)
    return f'{name}<dl class="cards">{body}</dl>'


def _figures(runs: Sequence[Run]) -> list[tuple[str, str]]:
    def names(what: str) -> list[str]:
        return [what if len(runs) == 1 else f"{run.name}: {what}" for run in runs]

    def curves(key: str, what: str) -> list[Curve]:
        found = [run.curve(key, name) for run, name in zip(runs, names(what), strict=True)]
        return [curve for curve in found if curve[1]]

    figures = [("Loss", line_plot(curves("loss", "training"), "nats", marked=curves("eval_loss", "held-out")))]
    for key, caption, unit in (
        ("grad_norm", "Gradient norm, before clipping", "norm"),
        ("lr", "Learning rate", "learning rate"),
        ("tokens_per_s", "Speed", "tokens/s"),
    ):
        found = curves(key, caption.split(",")[0].lower())
        if found:
            figures.append((caption, line_plot(found, unit)))
    return figures


def _table(run: Run) -> str:
    rows = run.rows[-LAST_ROWS:]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(key)}</th>" for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(key))}</td>" for key in keys) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else html.escape(str(value))


def _facts(facts: dict[str, Any], prefix: str = "") -> str:
    lines = _flat(facts)
    if not lines:
        return "<p>run.json is not there.</p>"
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in lines)
    return f'<details><summary>{len(lines)} facts</summary><div class="wide"><table>{body}</table></div></details>'


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for key, value in facts.items():
        lines += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return lines


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f1f3f5; --line: #d5d9de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #14171a; --soft: #20252a; --line: #3a4149; } }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.cards div { background: var(--soft); border-radius: .5rem; padding: .75rem 1rem; }
dt { font-size: .8rem; opacity: .75; } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } figcaption { font-weight: 600; } figure svg { width: 100%; height: auto; color: var(--ink); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.sortable th { cursor: pointer; } summary { cursor: pointer; }
</style></head><body>
@BODY@
<script>
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((head, column) => {
    let rising = false;
    head.addEventListener("click", () => {
      rising = !rising;
      const body = table.tBodies[0], value = row => row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) => {
        const x = parseFloat(value(a)), y = parseFloat(value(b));
        const order = isNaN(x) || isNaN(y) ? value(a).localeCompare(value(b)) : x - y;
        return rising ? order : -order;
      });
      body.append(...rows);
    });
  });
}
</script></body></html>
"""
