"""Curves as SVG that stands in a page: transparent, its ink the page's own colour."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from lss.config.errors import Refused

Curve = tuple[str, Sequence[float], Sequence[float]]  # (name, x, y)

MAX_POINTS = 800  # of a curve: more cannot be told apart at this width
# Okabe and Ito's colours, told apart by most eyes, on light and on dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# drawn in a colour that nothing else has, and then given to the page's currentColor
_INK = "#010203"


def thin(x: Sequence[float], y: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Fewer points of the same look: of each bucket of neighbours the lowest and the highest stay."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]
    if len(points) <= most:
        return [a for a, _ in points], [b for _, b in points]
    buckets = most // 2
    kept: list[tuple[float, float]] = []
    for i in range(buckets):
        bucket = points[len(points) * i // buckets : len(points) * (i + 1) // buckets]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return [a for a, _ in kept], [b for _, b in kept]


def line_plot(curves: Sequence[Curve], y_label: str, *, x_label: str = "step", marked: Sequence[Curve] = ()) -> str:
    """An SVG of curves over steps; `marked` ones get points. At most a few ten KB.

    Raises:
        Refused: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise Refused("The report's curves need matplotlib: pip install 'lss-transformer[report]'.") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "lss", "font.size": 9, "font.family": "sans-serif",
             "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
             "axes.edgecolor": _INK, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, x, y) in enumerate(curves):
            axes.plot(*thin(x, y), color=COLOURS[number % len(COLOURS)], linewidth=1.3, label=name)
        for number, (name, x, y) in enumerate(marked):
            colour = COLOURS[(number + len(curves)) % len(COLOURS)]
            axes.plot(*thin(x, y), color=colour, linewidth=1.0, marker="o", markersize=3.5, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
        if len(curves) + len(marked) > 1:
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # a fixed size would not shrink on a phone; the view box keeps the shape
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
    return svg.replace(_INK, "currentColor")
