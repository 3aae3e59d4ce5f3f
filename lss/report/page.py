"""One self-contained HTML page of runs, benches and plans: no network, readable on a phone, light and dark."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lss.config.errors import refuse
from lss.report.parts import figure, figures, table
from lss.report.plots import Curve, line_plot
from lss.report.runs import Run, plain, read_runs
from lss.report.sheets import Sheet, read_sheets, row_files
from lss.report.tabled import section
from lss.report.template import PAGE

LAST_ROWS = 50
NAMED = 4  # in the title; each stands over its own section too
FEW = 12  # facts that stand open; a longer list is folded
# the facts worth a line under the title, where run.json has them: (words around the value, path)
LEDE = (
    ("model {}", "config.model.preset"),
    ("model {}", "config.model.hf"),
    ("{} parameters", "parameters"),
    ("{} tokens", "config.data.seq_len"),
    ("strategy {}", "config.parallel.strategy"),
    ("order {}", "config.parallel.order"),
    ("dp {}", "mesh.dp"),
    ("cp {}", "mesh.cp"),
    ("{}", "config.train.dtype"),
    ("{}", "mesh.device"),
    ("torch {}", "versions.torch"),
)


def build_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Make a page of what is in these folders; returns its path, by default `report.html` in the first.

    Of a run's folder metrics.jsonl is read and, where it is there, run.json: any JSON object. Several runs share the plots.
    Of other folders all files of rows are, as `lss bench --out` and `lss plan --out` write them; such a file may be named
    itself.

    Raises:
        Refused: a folder holds neither, a file is damaged, matplotlib is missing, or the page cannot be written.
    """
    paths = [Path(folder) for folder in folders]
    files = {path: row_files(path) for path in paths}
    sheets = read_sheets([file for path in paths for file in files[path]])
    others = [path for path in paths if not files[path]]
    runs = read_runs(others) if others or not sheets else []
    first = paths[0]
    target = Path(output) if output else (first if first.is_dir() else first.parent) / "report.html"
    page = _page(runs, sheets)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # JSON can name half a character, which no encoding has
        target.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise refuse("-o", target, f"cannot be written ({error.strerror}); name a file in a folder that can") from error
    return target


def _page(runs: Sequence[Run], sheets: Sequence[Sheet]) -> str:
    words = [f"Run{'s' if len(runs) > 1 else ''} " + ", ".join(run.name for run in runs)] if runs else []
    names = [*words, *(sheet.name for sheet in sheets)]
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    title = html.escape(" · ".join([*names[:NAMED], *more]))
    body = "\n".join([*(_of_runs(runs) if runs else []), *map(section, sheets)])
    return PAGE.substitute(title=title, body=f"<h1>{title}</h1>\n{body}")


def _of_runs(runs: Sequence[Run]) -> list[str]:
    parts = []
    if len(runs) == 1:
        parts += [_lede(runs[0]), _cards(figures_of(runs[0]))]
    else:
        parts += [_comparison(runs), _differences(runs)]
    parts.append(figures(figure(*plot) for plot in _plots(runs)))
    for run in runs:
        of = f" of {html.escape(run.name)}" if len(runs) > 1 else ""
        if taken := _memory(run):
            parts.append(f"<h2>Peak memory{of}</h2>{taken}")
        if run.facts:
            parts.append(f"<h2>Facts{of}</h2>{_facts(run)}")
        parts.append(f"<h2>Last steps{of}</h2>{_last_rows(run)}")
    return parts


def figures_of(run: Run) -> dict[str, str]:
    """The run's key figures, as words: only those that its rows hold."""
    found = {"step": f"{run.rows[-1]['step']:,}"}
    if loss := run.values("loss"):
        found["training loss"] = f"{loss[-1]:.4f} nats"
    if held_out := run.values("eval_loss"):
        found["held-out loss"] = f"{held_out[-1]:.4f} nats"
        item = "token" if run.facts.get("config.data.source") == "tokens" else "byte"
        found["held-out"] = f"{held_out[-1] / math.log(2):.3f} bits per {item}"
    if speeds := run.values("tokens_per_s"):
        found["speed, median"] = f"{statistics.median(speeds):,.0f} tokens/s"
    if peaks := run.values("peak_memory_bytes"):
        found["peak memory, rank 0"] = f"{max(peaks) / 2**30:.2f} GiB"
    if mfu := run.values("mfu"):
        found["model FLOP utilisation, median"] = f"{statistics.median(mfu):.1%}"
    return found


def _lede(run: Run) -> str:
    found = [(text, run.facts[path]) for text, path in LEDE if run.facts.get(path) not in (None, "")]
    words = [text.format(f"{value:,}" if type(value) is int else plain(value)) for text, value in found]
    return f'<p class="lede">{html.escape(" · ".join(words))}</p>' if words else ""


def _cards(figures: dict[str, str]) -> str:
    body = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in figures.items())
    return f'<dl class="cards">{body}</dl>'


def _comparison(runs: Sequence[Run]) -> str:
    figures = [figures_of(run) for run in runs]
    keys = list(dict.fromkeys(key for found in figures for key in found))
    rows = [[run.name, *(found.get(key, "") for key in keys)] for run, found in zip(runs, figures, strict=True)]
    return table(["run", *keys], rows, "sortable numbers")


def _differences(runs: Sequence[Run]) -> str:
    """The settings that tell the runs apart; what they came to stands above."""
    keys = dict.fromkeys(key for run in runs for key in run.facts if not key.startswith("results."))
    rows = [[key, *(plain(run.facts.get(key)) for run in runs)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return f"<h2>What differs</h2>{table(['', *(run.name for run in runs)], rows)}" if rows else ""


def _plots(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(caption, SVG) of every key that some run has. One colour a run; of a single run, one a curve."""

    def curves(key: str, what: str = "", *, shift: int = 0, points: bool = False) -> list[Curve]:
        found = []
        for i, run in enumerate(runs):
            steps, values = run.series(key)
            name = what if len(runs) == 1 else f"{run.name}: {what}" if what else run.name
            found.append(Curve(name, steps, values, i if len(runs) > 1 else shift, points))
        return [curve for curve in found if curve.x]

    plots = [
        ("Loss", "nats", curves("loss", "training") + curves("eval_loss", "held-out", shift=1, points=True)),
        ("Gradient norm, before clipping", "norm", curves("grad_norm")),
        ("Learning rate", "learning rate", curves("lr")),
        ("Speed", "tokens/s", curves("tokens_per_s")),
    ]
    return [(caption, line_plot(found, unit)) for caption, unit, found in plots if found]


def _memory(run: Run) -> str:
    """What the peak of a step was made of, where run.json tells; the facts name the step and the rank."""
    start = "results.memory.classes."
    sizes = {key.removeprefix(start): n for key, n in run.facts.items() if key.startswith(start)}
    rows = [[name, f"{n / 2**20:,.2f} MiB"] for name, n in sizes.items() if type(n) is int and 0 <= n < 1 << 62]
    return table(["class", "bytes"], rows, "facts") if rows else ""


def _last_rows(run: Run) -> str:
    rows = run.rows[-LAST_ROWS:]
    # a column that no row fills, as mfu on a CPU, is none
    keys = list(dict.fromkeys(key for row in rows for key in row if row[key] is not None))
    return table(keys, [[plain(row.get(key)) for key in keys] for row in rows], "sortable numbers")


def _facts(run: Run) -> str:
    """One list for each object at the top of run.json, the short ones open."""
    lists = []
    for group, items in groupby(run.facts.items(), key=lambda fact: _group(fact[0])):
        facts: list[tuple[str, Any]] = list(items)
        rows = [(name.removeprefix(f"{group}."), plain(value)) for name, value in facts]
        body = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
        opened = " open" if len(facts) <= FEW else ""
        lists.append(
            f"<details{opened}><summary>{html.escape(group or 'run')}</summary>"
            f'<div class="wide"><table class="facts">{body}</table></div></details>'
        )
    return "".join(lists)


def _group(path: str) -> str:
    first, dot, _ = path.partition(".")
    return first if dot else ""
