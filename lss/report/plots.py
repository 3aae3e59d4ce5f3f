"""Curves as SVG that stands in a page: transparent, its ink the page's own colour."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lss.config.errors import Refused

MAX_POINTS = 800  # of a curve: more cannot be told apart at this width
LONGEST_NAME = 60  # characters in a legend
# Okabe and Ito's colours, told apart by most eyes, on light and on dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#999999"  # of what is stacked upon all these
DASHES = ("-", "--", "-.", ":")  # once the colours are used up
# drawn in a colour that nothing else has, and then given to the page's currentColor
_INK = "#010203"
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "lss", "font.size": 9, "font.family": "sans-serif",
               "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
               "axes.edgecolor": _INK, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A line over steps. `colour` counts through COLOURS; with `points` each value is marked as measured."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    points: bool = False


def thin(x: Sequence[float], y: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points of the same look: of each bucket of neighbours the lowest and the highest stay.

    The first and the last point stay too. Values that are not finite are left out.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]
    if len(points) > most:
        buckets = most // 2 - 1
        kept = {points[0], points[-1]}
        for i in range(buckets):
            bucket = points[len(points) * i // buckets : len(points) * (i + 1) // buckets]
            kept |= {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        points = sorted(kept)
    return [a for a, _ in points], [b for _, b in points]


def line_plot(curves: Sequence[Curve], y_label: str, *, x_label: str = "step", log: bool = False) -> str:
    """An SVG of curves over steps, a few ten KB each at most; it has a view box but no size, so that it can shrink.

    Args:
        log: both axes are logarithmic.

    Raises:
        Refused: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise Refused("The report's curves need matplotlib: pip install lss-transformer[report].") from error
    columns = 1 if max((len(curve.name) for curve in curves), default=0) > LONGEST_NAME // 2 else 2
    legend_rows = math.ceil(len(curves) / columns) if len(curves) > 1 else 0
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # names are measured here but drawn by the reader's fonts, which have more glyphs
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        # its own Figure, not pyplot's: nothing global, no display, no backend to choose
        figure = Figure(figsize=(4.8, 2.6 + 0.19 * legend_rows), layout="constrained")
        axes = figure.add_subplot()
        lines = [_draw(axes, curve) for curve in curves]
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log:
            axes.set(xscale="log", yscale="log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        for axis, values in ((axes.xaxis, [x for c in curves for x in c.x]), (axes.yaxis, [y for c in curves for y in c.y])):
            if max(map(abs, values), default=0) >= 10_000 and not log:
                axis.set_major_formatter("{x:,.0f}")
        axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
        if legend_rows:
            _legend(figure, lines, curves, columns)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


def stack_plot(
    layers: Mapping[str, Sequence[float]], parts: Sequence[tuple[str, int]], y_label: str, *, line: tuple[str, float],
    png: bool = False,
) -> bytes:  # fmt: skip
    """A picture of quantities stacked upon one another over moments that have no unit; an SVG, or a PNG on white.

    Of more moments than can be told apart, those with the highest and the lowest sum among their neighbours stay.

    Args:
        layers: values by name, from the lowest; as many of each. One of zeros alone is not shown, and keeps its colour.
        parts: (name, its first moment) of what the moments are of, in turn.
        line: name and height of a line across.

    Raises:
        Refused: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refused("The picture needs matplotlib: pip install lss-transformer[report].") from error
    sums = [sum(values) for values in zip(*layers.values(), strict=True)]
    kept = [int(x) for x in thin(range(len(sums)), sums, MAX_POINTS // 2)[0]]
    assert len(layers) <= len(COLOURS) + 1, "more layers than colours"
    shown = {name: (values, colour) for (name, values), colour in zip(layers.items(), (*COLOURS, GREY), strict=False)
             if any(values)}  # fmt: skip
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.stackplot(kept, *([values[x] for x in kept] for values, _ in shown.values()), labels=list(shown),
                       colors=[colour for _, colour in shown.values()], linewidth=0)  # fmt: skip
        axes.axhline(line[1], color=_INK, linewidth=1.0, linestyle="--", label=line[0])
        axes.set_xlim(0, max(1, len(sums) - 1))
        axes.set_ylim(0, 1.05 * max(line[1], *sums))
        axes.set_ylabel(y_label)
        for _, first in parts[1:]:
            axes.axvline(first, color=_INK, alpha=0.4, linewidth=0.6)
        ends = [first for _, first in parts[1:]] + [len(sums) - 1]
        middles = [(first + end) / 2 for (_, first), end in zip(parts, ends, strict=True)]
        axes.set_xticks(middles, [name for name, _ in parts])
        axes.tick_params(axis="x", length=0)
        figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=8)
        if png:
            figure.savefig(buffer, format="png", dpi=150)
            return buffer.getvalue()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # a tenth of a point is enough, and a third of the bytes
    paths = re.compile(r' d="[^"]*"')
    return paths.sub(lambda d: re.sub(r"(\.\d)\d+", r"\1", d[0]), _inline(buffer.getvalue().decode())).encode()


def _draw(axes: Any, curve: Curve) -> Any:
    x, y = thin(curve.x, curve.y)
    marker = "o" if curve.points or len(x) == 1 else ""
    (line,) = axes.plot(
        x, y, color=COLOURS[curve.colour % len(COLOURS)], marker=marker, markersize=3.5, linewidth=1.2,
        linestyle=DASHES[curve.colour // len(COLOURS) % len(DASHES)],
    )  # fmt: skip
    return line


def _legend(figure: Any, lines: Sequence[Any], curves: Sequence[Curve], columns: int) -> None:
    """Below the plot, where it hides no curve. Names are set as plain words: matplotlib reads $ as mathematics and
    skips a name that starts with an underscore."""
    legend = figure.legend(
        lines, [str(i) for i in range(len(lines))], loc="outside lower left", ncols=columns, frameon=False, fontsize=8
    )
    for text, curve in zip(legend.get_texts(), curves, strict=True):
        text.set_parse_math(False)
        half = LONGEST_NAME // 2
        text.set_text(curve.name if len(curve.name) <= LONGEST_NAME else f"{curve.name[:half]}…{curve.name[-half:]}")


def _inline(svg: str) -> str:
    """The picture without what only a file of its own needs."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # a fixed size would not shrink on a phone; the view box keeps the shape
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
    return svg.replace(_INK, "currentColor")
