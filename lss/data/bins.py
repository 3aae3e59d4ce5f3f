"""Bins of values: each channel's edges, fitted on the training part alone, and ids by them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lss.config.errors import Refused, refuse
from lss.data.tables import Table, open_table

SAMPLE = 1 << 20  # values of a fit by quantiles, all channels together
_SEED = 0


@dataclass(frozen=True)
class Series:
    """How numbers become ids.

    Attributes:
        columns: names or numbers (from 0) with commas between, in the order in which they are read; empty: all.
        bins: of a channel.
        binning: "quantile": bins of equally many training values; "uniform": bins of equal width.
        nan: NaN and empty cells have an id of their own; else they are refused.
        held_out: the fraction at the end of the series on which nothing is fitted.
    """

    columns: str = ""
    bins: int = 64
    binning: str = "quantile"
    nan: bool = False
    held_out: float = 0.05

    @property
    def chosen(self) -> list[str]:
        """The columns, one by one."""
        return [name.strip() for name in self.columns.split(",") if name.strip()]


@dataclass(frozen=True)
class Bins:
    """Edges by which values become ids, the same for every part of the data.

        id of value x in channel c = c bins + (number of edges of c that are <= x);  NaN: channels x bins

    Attributes:
        channels: their names, in the order of the columns.
        edges: of each channel, rising, at most bins - 1; a value below the first or above the last is of the outer bins.
        values: what the bins of each channel stand for, in numbers: the mean of the training values (quantile), or the
            middle (uniform).
    """

    channels: tuple[str, ...]
    bins: int
    binning: str
    nan: bool
    held_out: float
    edges: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...] = field(repr=False)

    @property
    def ids(self) -> int:
        """Ids are below this."""
        return len(self.channels) * self.bins + self.nan

    def encode(self, values: np.ndarray) -> np.ndarray:
        """float64 (rows, channels) to int64 (rows * channels,): rows in order, the channels of a row side by side."""
        ids = np.empty(values.shape, np.int64)
        for channel, edges in enumerate(self.edges):
            ids[:, channel] = channel * self.bins + np.searchsorted(edges, values[:, channel], side="right")
        ids[np.isnan(values)] = len(self.channels) * self.bins
        return ids.reshape(-1)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """What ids stand for, float64 of their shape; NaN for an id that no training value had."""
        table = np.full(max(self.ids, int(ids.max(initial=0)) + 1), np.nan)
        for channel, values in enumerate(self.values):
            table[channel * self.bins : channel * self.bins + len(values)] = values
        return table[ids]

    def to_dict(self) -> dict[str, Any]:
        """For tokens.json; floats come back to the bit."""
        return asdict(self)

    @staticmethod
    def of(told: Any, where: Path) -> Bins:
        """From `to_dict`.

        Raises:
            Refused: it is not what `to_dict` made.
        """
        try:
            listed = {key: tuple(map(tuple, told[key])) for key in ("edges", "values")}
            bins = Bins(**{**told, **listed, "channels": tuple(told["channels"])})
            rising = all(np.isfinite(e).all() and (np.diff(e) > 0).all() and len(e) < bins.bins for e in bins.edges)
            if not rising or not len(bins.edges) == len(bins.values) == len(bins.channels) > 0:
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise Refused(f"{where}: holds no bins of a numeric series that can be read; make the folder anew.") from None
        return bins


def fit_bins(files: Sequence[Path], series: Series, most: int | None = None) -> Bins:
    """Bins from the rows of the files, in order, that come before the held-out part.

    Reads the files twice. Memory: `SAMPLE` values; by quantiles of more training values than these, a sample of them is
    taken, the same every time.

    Args:
        most: ids that there may be.

    Raises:
        Refused: too many bins for `most`, files whose columns differ, a channel that is empty or constant in the training
            part, and what `Table` refuses.
    """
    tables = [open_table(file, series.chosen) for file in files]
    names = tables[0].names
    for table in tables:
        if len(table.names) != len(names) or (series.chosen and table.names != names):
            raise Refused(f"{table.file}: has the columns {', '.join(table.names)[:200]}, and {tables[0].file} has "
                          f"{', '.join(names)[:200]}; give files of the same columns.")  # fmt: skip
    _refuse_many(len(names), series, most)
    counts = [sum(len(chunk) for chunk in table.checked(series.nan)) for table in tables]
    for table, count in zip(tables, counts, strict=True):
        if not count:
            raise Refused(f"{table.file}: no rows below its header; fill it or remove it.")
    items = sum(counts) * len(names)
    rows = (items - round(items * series.held_out)) // len(names)
    if not rows:
        raise refuse("data.held_out", series.held_out, f"of {sum(counts)} rows none is left to train on; give more rows")
    fit = _quantiles if series.binning == "quantile" else _uniform
    found = fit(tables, rows, series)
    edges, values = (tuple(tuple(map(float, one)) for one in part) for part in zip(*found, strict=True))
    return Bins(names, series.bins, series.binning, series.nan, series.held_out, edges, values)


def _refuse_many(channels: int, series: Series, most: int | None) -> None:
    needed = channels * series.bins + series.nan
    if most is None or needed <= most:
        return
    room = (most - series.nan) // channels
    what = f"{channels} column{'s' * (channels > 1)} of {series.bins} bins{' and NaN' * series.nan}"
    few = f"{room} or fewer bins, or " if room > 1 else ""
    raise refuse("data.bins", series.bins, f"{what} take {needed} ids, and the model has {most}; "
                 f"use {few}model.vocab_size={needed} or more")  # fmt: skip


def _training(tables: Sequence[Table], rows: int, nan: bool):
    """(number of the first row, values) of the chunks of the first `rows` rows."""
    start = 0
    for table in tables:
        for chunk in table.checked(nan):
            if start >= rows:
                return
            yield start, chunk[: rows - start]
            start += len(chunk)


def _uniform(tables: Sequence[Table], rows: int, series: Series) -> list[tuple[np.ndarray, np.ndarray]]:
    channels = len(tables[0].names)
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    for _, chunk in _training(tables, rows, series.nan):
        low, high = np.fmin(low, chunk.min(0, initial=np.inf, where=~np.isnan(chunk))), np.fmax(
            high, chunk.max(0, initial=-np.inf, where=~np.isnan(chunk)))  # fmt: skip
    found = []
    for name, first, last in zip(tables[0].names, low, high, strict=True):
        _refuse_flat(name, first, last)
        borders = np.linspace(first, last, series.bins + 1)
        if not (np.isfinite(borders).all() and (np.diff(borders) > 0).all()):
            raise Refused(f"column {name!r}: {series.bins} bins of equal width do not fit between {first} and {last}; "
                          'use fewer, or data.binning="quantile".')  # fmt: skip
        found.append((borders[1:-1], borders[:-1] / 2 + borders[1:] / 2))
    return found


def _quantiles(tables: Sequence[Table], rows: int, series: Series) -> list[tuple[np.ndarray, np.ndarray]]:
    channels = len(tables[0].names)
    most = max(series.bins, SAMPLE // channels)
    # drawn, not every n-th row, which a periodic series may always meet at the same phase
    places = np.arange(rows) if rows <= most else np.unique(np.random.default_rng(_SEED).integers(0, rows, most))
    parts = []
    for start, chunk in _training(tables, rows, series.nan):
        first, last = np.searchsorted(places, (start, start + len(chunk)))
        parts.append(chunk[places[first:last] - start])
    sample = np.concatenate(parts)
    found = []
    for channel, name in enumerate(tables[0].names):
        values = sample[:, channel]
        values = values[~np.isnan(values)]
        _refuse_flat(name, values.min(initial=np.inf), values.max(initial=-np.inf))
        edges = quantile_edges(values, series.bins)
        bins = np.searchsorted(edges, values, side="right")
        # divided first: a sum of the largest floats would be infinite
        counts = np.bincount(bins)
        found.append((edges, np.bincount(bins, values / counts[bins])))
    return found


def _refuse_flat(name: str, low: float, high: float) -> None:
    if low > high:
        raise Refused(f"column {name!r}: empty in the training part, it has no value to put bins around; leave it out "
                      "(data.columns).")  # fmt: skip
    if low == high:
        raise Refused(f"column {name!r}: constant in the training part, always {low}; leave it out (data.columns).")


def quantile_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """At most bins - 1 rising edges between bins of nearly equally many values.

    Equal values are of one bin. Where one value is more frequent than a bin's share (a gauge that mostly shows 0), it has
    a bin to itself and the others share the rest; of at most `bins` different values each has its own.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= bins:
        return distinct[1:]
    upto = np.cumsum(counts)
    edges, start = [], 0
    for left in range(bins, 1, -1):
        done = int(upto[start - 1]) if start else 0
        target = done + (len(values) - done) / left
        stop = int(np.searchsorted(upto, target)) + 1
        if stop - 1 > start and upto[stop - 1] - target > target - upto[stop - 2]:
            stop -= 1
        if stop >= len(distinct):
            break
        edges.append(distinct[stop])
        start = stop
    return np.array(edges)


def bins_of(folder: Path, index: dict[str, Any]) -> Bins | None:
    """The bins that a folder of tokens was made with; None where its tokens are no numbers."""
    return Bins.of(index["series"], folder) if "series" in index else None


def bins_told(corpus: Any) -> dict[str, Any]:
    """What a checkpoint tells of the bins of its data: `{"bins": ...}`, or nothing where the data are no numbers."""
    bins = getattr(corpus, "bins", None)
    return {} if bins is None else {"bins": bins.to_dict()}


def same_bins(one: Bins, other: Bins) -> bool:
    """Whether ids of both mean the same."""
    return json.dumps([one.bins, one.nan, one.edges]) == json.dumps([other.bins, other.nan, other.edges])
