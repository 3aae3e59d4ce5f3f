"""Plots of attention's and recurrences' results: time, share of ideal and memory against length, rivals beside ours."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lss.bench.candidates import ONE_DEVICE
from lss.bench.rows import Row
from lss.bench.tables import label
from lss.config.errors import Refused

# Okabe and Ito's colours, told apart by most eyes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")  # ours, one device, rivals
FORMATS = ("svg", "png")

Value = Callable[[Row], float | None]
# name -> (axis label, value of a row, whether the axis is logarithmic)
PLOTS: dict[str, tuple[str, Value, bool]] = {
    "time": ("ms", lambda row: row["ms"], True),
    "ideal": ("share of ideal", lambda row: row["ideal_ms"] / row["ms"] if row["ideal_ms"] else None, False),
    "memory": ("peak GiB", lambda row: row["peak_bytes"] / 2**30 if row["peak_bytes"] else None, True),
}

SCANS: dict[str, tuple[str, Value, bool]] = {
    "token": ("ns a token", lambda row: 1e6 * row["ms"] / row["tokens"], True),
    "memory": PLOTS["memory"],
}


def plot_attention(rows: Sequence[Row], folder: Path, form: str = "svg") -> list[Path]:
    """Write one picture for each head shape, dtype, device and kind of plot; returns their paths.

    Raises:
        Refused: matplotlib is not installed, or the folder cannot be written.
    """
    good = [row for row in rows if row["bench"] == "attention" and row["status"] == "ok" and not row.get("graph")]
    written = []
    for group in dict.fromkeys((row["heads"], row["dtype"], row["gpu"], row["batch"]) for row in good):
        mine = [row for row in good if (row["heads"], row["dtype"], row["gpu"], row["batch"]) == group]
        for name, (axis, value, logarithmic) in PLOTS.items():
            points = [(row, y) for row in mine if (y := value(row)) is not None]
            if points:
                words = re.findall(r"[A-Za-z0-9.]+", " ".join(str(word) for word in (name, *group[:3])))
                path = folder / f"{'-'.join(words)}.{form}"
                _draw(points, axis, logarithmic, path, f"{group[0]} heads, {group[1]}, {group[2]}")
                written.append(path)
    return written


def plot_scan(rows: Sequence[Row], folder: Path, form: str = "svg") -> list[Path]:
    """Write one picture for each dtype, device and kind of plot, of recurrences beside attention; returns their paths.

    Raises:
        Refused: as of `plot_attention`.
    """
    good, written = [row for row in rows if row["bench"] == "scan" and row["status"] == "ok"], []
    for group in dict.fromkeys((row["dtype"], row["gpu"], row["batch"]) for row in good):
        mine = [row for row in good if (row["dtype"], row["gpu"], row["batch"]) == group]
        for name, (axis, value, logarithmic) in SCANS.items():
            points = [(row, y) for row in mine if (y := value(row)) is not None]
            if points:
                words = re.findall(r"[A-Za-z0-9.]+", " ".join(("scan", name, *group[:2])))
                path = folder / f"{'-'.join(words)}.{form}"
                _draw(points, axis, logarithmic, path, f"a recurrence beside attention, {group[0]}, {group[1]}")
                written.append(path)
    return written


def _draw(points: Sequence[tuple[Row, float]], axis: str, logarithmic: bool, path: Path, title: str) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refused("Plots need matplotlib: pip install lss-transformer[report].") from error
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "lss", "font.size": 9, "axes.spines.top": False,
                  "axes.spines.right": False}  # fmt: skip
    curves: dict[str, list[tuple[int, float]]] = {}
    kinds: dict[str, int] = {}
    for row, y in points:
        name = _name(row)
        curves.setdefault(name, []).append((row["tokens"], y))
        kinds[name] = 2 if row["rival"] is not None else 1 if row["strategy"] == ONE_DEVICE else 0
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        # its own Figure, not pyplot's: nothing global, no display, no backend to choose
        figure = Figure(figsize=(6.4, 3.4 + 0.17 * len(curves)), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, curve) in enumerate(sorted(curves.items(), key=lambda item: (kinds[item[0]], item[0]))):
            x, y = zip(*sorted(curve), strict=True)
            axes.plot(x, y, DASHES[kinds[name]], color=COLOURS[number % len(COLOURS)], marker="o", markersize=3.5,
                      linewidth=1.2, label=name.replace("$", r"\$").lstrip("_"))  # fmt: skip
        axes.set_xscale("log", base=2)
        lengths = sorted({row["tokens"] for row, _ in points})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, max(1.05, *(y for _, y in points)))
        axes.set_xlabel("tokens")
        axes.set_ylabel(axis)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.2, linewidth=0.6)
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            dated = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, bbox_inches="tight", metadata=dated, dpi=150)  # tight: long names would be cut off
        except OSError as error:
            raise Refused(f"{path}: cannot be written ({error.strerror}).") from error


def _name(row: Row) -> str:
    ranks = "" if row["strategy"] == ONE_DEVICE else f", {row['world_size']} ranks"
    return label(row) + ranks
