"""Sections of the page made of rows: a table that sorts, and what the rows say over lengths, ranks and moments."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from lss.report.parts import figure, figures, table
from lss.report.plots import Curve, line_plot, stack_plot
from lss.report.runs import flatten, number, plain
from lss.report.sheets import PLANS, STRATEGIES, Row, Sheet

MOST_ROWS = 5000  # of a table; the rest is counted
MOST_CURVES = 12  # in a plot
MOST_PLOTS = 8  # of a sheet
MOST_KEYS = 24  # of rows that are of none of the known kinds
GIB, MIB = 2**30, 2**20
# head of a column: the row's key, or what is computed of the row
Columns = dict[str, str | Callable[[Row], Any]]
BENCH: Columns = {
    "what": lambda row: label(row), "model": "model", "heads": "heads", "dtype": "dtype", "tokens": "tokens",
    "ranks": "world_size", "ms": "ms", "spread": "spread", "of ideal": lambda row: ratio(row.get("ideal_ms"), row.get("ms")),
    "tokens/s": "tokens_per_s", "TFLOP/s": "tflops", "MFU": "mfu", "peak GiB": lambda row: ratio(row.get("peak_bytes"), GIB),
    "sent MiB": lambda row: ratio(row.get("payload_bytes"), MIB), "calls": "calls", "error": "error", "status": "status",
    "gpu": "gpu", "commit": lambda row: plain(row.get("commit"))[:8],
}  # fmt: skip
PLAN: Columns = {
    "what": lambda row: plan_name(row), "devices": "gpu", "ranks": "ranks", "tokens a sequence": "seq_len",
    "s a step": "step_s", "tokens/s": "tokens_per_s", "MFU": "mfu",
    "peak GiB": lambda row: ratio(row.get("peak_bytes"), GIB),
    "room GiB": lambda row: ratio(row.get("room_bytes"), GIB), "host GiB": lambda row: ratio(row.get("host_bytes"), GIB),
    "fits": "fits", "why not": "why",
}  # fmt: skip


def section(sheet: Sheet) -> str:
    """A sheet's heading, plots and table."""
    make = {PLANS: _plans, STRATEGIES: _strategies}.get(sheet.name)
    if make is None:
        make = _bench if any("world_size" in row for row in sheet.rows) else _anything
    return f"<h2>{html.escape(sheet.name)}</h2>{make(sheet.rows)}"


def label(row: Row) -> str:
    """What a bench's row measures: a rival and its way, or strategy, kernel, order and options."""
    options = row.get("options")
    own = ", ".join(f"{key}={plain(value)}" for key, value in options.items()) if isinstance(options, dict) else ""
    if row.get("rival"):
        words = [row["rival"], row.get("strategy")]
    else:
        layer = row.get("model") if row.get("bench") == "scan" else None
        words = [layer, row.get("strategy"), row.get("kernel"), row.get("order")]
    return " ".join(plain(word) for word in words if word) + (f" ({own})" if own else "")


def plan_name(row: Row) -> str:
    """A plan's config and settings."""
    return " ".join(filter(None, (plain(row.get("plan")), plain(row.get("settings")))))


def ratio(a: Any, b: Any) -> float | None:
    """a / b of two numbers, None where there are none."""
    a, b = number(a), number(b)
    return a / b if a is not None and b else None


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _table(columns: Columns, rows: Sequence[Row]) -> str:
    """Columns that some row fills."""
    shown = rows[:MOST_ROWS]
    cells = [[_shown(row.get(of) if isinstance(of, str) else of(row)) for of in columns.values()] for row in shown]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    heads = list(columns)
    left = f"<p>{len(rows) - MOST_ROWS:,} rows more are not shown.</p>" if len(rows) > MOST_ROWS else ""
    return table([heads[i] for i in kept], [[line[i] for i in kept] for line in cells], "sortable numbers") + left


# -- benches -------------------------------------------------------------------------------------------------------------


def _bench(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if number(row.get("tokens")) and number(row.get("ms")):
            model = "" if row.get("bench") == "scan" else row.get("model")
            key = tuple(plain(x) for x in (model, row.get("layers") if model else None, row.get("heads"), row.get("dtype")))
            groups.setdefault(key, []).append(row)
    pictures = []
    for key, group in groups.items():
        name = " ".join(filter(None, key))
        for what, unit, of in (("Time", "ms", lambda row: number(row["ms"])),
                               ("Memory", "GiB", lambda row: ratio(row.get("peak_bytes"), GIB))):  # fmt: skip
            curves, count = _over_lengths(group, of)
            few = f", the {MOST_CURVES} lowest of {count}" if count > MOST_CURVES else ""
            if curves:
                caption = f"{what}, {name}{few}"
                pictures.append(figure(caption, line_plot(curves, unit, x_label="tokens", log=True), "by tokens"))
    return figures(pictures[:MOST_PLOTS]) + _table(BENCH, rows)


def _over_lengths(rows: Sequence[Row], of: Callable[[Row], float | None]) -> tuple[list[Curve], int]:
    """Curves over lengths of what has several, those that are lowest at their longest length; and how many there are."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        value, tokens = of(row), number(row["tokens"])
        if value and tokens and value > 0:
            ranks = row.get("world_size")
            found.setdefault(f"{label(row)}, {plain(ranks)} rank{'s' * (ranks != 1)}", {})[tokens] = value
    several = {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}
    lowest = sorted(several.items(), key=lambda item: (-item[1][-1][0], item[1][-1][1]))
    return [
        Curve(name, [x for x, _ in points], [y for _, y in points], colour, points=True)
        for colour, (name, points) in enumerate(lowest[:MOST_CURVES])
    ], len(several)


# -- plans ---------------------------------------------------------------------------------------------------------------


def _plans(rows: Sequence[Row]) -> str:
    pictures = [picture for row in rows if (picture := _memory(row)) is not None]
    split = [{"what": plan_name(row)} | row["seconds"] for row in rows if isinstance(row.get("seconds"), dict)]
    seconds = f"<h3>Seconds of a step</h3>{_by_key(split)}" if split else ""
    return figures(pictures[:MOST_PLOTS]) + _table(PLAN, rows) + seconds


def _memory(row: Row) -> str | None:
    """Memory by class over the moments of a planned step, where the row has them as `lss plan --out` writes them."""
    curve: Any = row.get("curve")
    room = ratio(row.get("room_bytes"), GIB)
    try:
        layers = {str(name): [float(x) for x in values] for name, values in curve["gib"].items()}
        parts = [(str(name), int(first)) for name, first in curve["parts"]]
        lengths = {len(values) for values in layers.values()}
        if room is None or len(lengths) != 1 or min(lengths) < 2 or not parts:
            return None
        svg = stack_plot(layers, parts, "GiB", line=(plain(row.get("gpu")) or "device", room)).decode()
    except (TypeError, KeyError, ValueError, AttributeError, AssertionError):
        return None  # a row that something else has written
    return figure(f"Memory, {plan_name(row)}", svg, "over a step")


# -- strategies ----------------------------------------------------------------------------------------------------------


def _strategies(rows: Sequence[Row]) -> str:
    """What `lss plan --compare` wrote: seconds over ranks at equal tokens a rank, and at each length."""
    points = [(str(r["strategy"]), number(r["ranks"]), number(r["tokens"]), number(r.get("seconds"))) for r in rows]
    told = [(s, n, S, t) for s, n, S, t in points if n and S and t]
    weak: dict[float, list] = {}
    strong: dict[float, list] = {}
    for strategy, n, S, t in told:
        weak.setdefault(S / n, []).append((strategy, n, t))
        strong.setdefault(S, []).append((strategy, n, t))
    pictures = []
    most = max(weak.items(), key=lambda item: len(item[1]), default=None)
    groups = [(f"{most[0]:,.0f} tokens a rank", most[1])] if most else []
    groups += [(f"{S:,.0f} tokens", found) for S, found in sorted(strong.items())]
    for caption, found in groups:
        curves = []
        for colour, strategy in enumerate(dict.fromkeys(s for s, *_ in told)):
            line = sorted((n, t) for s, n, t in found if s == strategy)
            if len(line) > 1:
                curves.append(Curve(strategy, [n for n, _ in line], [t for _, t in line], colour, points=True))
        if curves:
            svg = line_plot(curves, "seconds a step", x_label="ranks", log=True)
            pictures.append(figure(f"Step, {caption}", svg, "by ranks"))
    return figures(pictures[:MOST_PLOTS]) + _anything(rows)


def _anything(rows: Sequence[Row]) -> str:
    """Rows by their own keys, nested ones by their paths."""
    return _by_key([flatten(row) for row in rows])


def _by_key(rows: Sequence[Row]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))[:MOST_KEYS]
    return _table({key: key for key in keys}, rows)
