"""Markdown tables of results, and a page whose tables are made from result files.

A page marks where a table goes:

    <!-- table NAME FILES KEY=VALUE ... -->
    (replaced)
    <!-- end of table -->

NAME is one of `TABLES`, FILES a glob of JSONL files beside which the page's results lie, and each KEY=VALUE keeps the rows
that have this value: `heads=32/8x128 world_size=2`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path

from lss.bench.candidates import ONE_DEVICE
from lss.bench.rows import Row, read_rows
from lss.config.errors import Refused

# Goals on two H100s, 32/8 heads of 128, bfloat16: tokens -> (share of no-comm, share of ideal).
GOALS = {8192: (0.93, 0.75), 16384: (0.96, 0.88), 65536: (0.985, 0.96), 131072: (0.99, 0.975), 524288: (0.995, 0.99)}
_MARK = re.compile(r"(<!-- table (?P<what>.*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
UNMEASURED = "Not measured yet."


def label(row: Row) -> str:
    """What a row measures, in the words of a table."""
    options = row.get("options") or {}
    own = ", ".join(f"{key}={value}" for key, value in options.items())
    if row["rival"] is not None:
        return " ".join(filter(None, (row["rival"], row["strategy"])))
    layer = row["model"] if row["bench"] == "scan" else None
    words = [layer, row["strategy"], row["kernel"], row["order"] if row["order"] != "head_tail" else None]
    return " ".join(str(word) for word in words if word) + (f" ({own})" if own else "")


def _grid(rows: Sequence[Row], cell: Callable[[Row], str], corner: str) -> str:
    """Labels down, lengths across."""
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(label(row) for row in sorted(rows, key=_rank)))
    by = {(label(row), row["tokens"]): row for row in rows}
    lines = [f"| {corner} | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---|" + "---:|" * len(lengths)]
    for name in names:
        cells = [cell(by[name, length]) if (name, length) in by else "" for length in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines + _reasons(rows))


def _rank(row: Row) -> tuple:
    """One device first, then ours, then rivals."""
    return (row["rival"] is not None, row["strategy"] not in (ONE_DEVICE, "plain"), row["rival"] or "")


def _reasons(rows: Iterable[Row]) -> list[str]:
    """Why what is missing is missing, once each."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if row["status"].startswith("failed: "):
            at = told.setdefault(f"{label(row)}: {row['status'].removeprefix('failed: ')}", [])
            at += [f"{row['tokens']:,}"] if row["tokens"] is not None else []
    lines = [f"- {why}" + (f" (at {', '.join(at)})" if at else "") for why, at in told.items()]
    return ["", *lines] if lines else []


def _bad(row: Row) -> str | None:
    if row["status"] == "ok":
        return None
    return "out of memory" if row["status"] == "oom" else "failed"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" if x >= 100 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def time_table(rows: Sequence[Row]) -> str:
    """Milliseconds, and in brackets the share of ideal."""

    def cell(row: Row) -> str:
        share = f" ({row['ideal_ms'] / row['ms']:.3f})" if row["ideal_ms"] else ""
        return f"{_number(row['ms'])}{share}"

    return _grid(rows, lambda row: _bad(row) or cell(row), "ms (share of ideal)")


def memory_table(rows: Sequence[Row]) -> str:
    """Peak memory of a step beyond its inputs, in GiB."""

    def cell(row: Row) -> str:
        return "" if row["peak_bytes"] is None else _number(row["peak_bytes"] / 2**30)

    known = any(row["peak_bytes"] is not None for row in rows)
    return _grid(rows, lambda row: _bad(row) or cell(row), "GiB") if known else UNMEASURED


def bytes_table(rows: Sequence[Row]) -> str:
    """Payload of a step's collectives in MiB, and the number of calls."""
    counted = [row for row in rows if row["payload_bytes"] is not None and row["world_size"] > 1]

    def cell(row: Row) -> str:
        return f"{_number(row['payload_bytes'] / 2**20)} ({row['calls']})"

    return _grid(counted, lambda row: _bad(row) or cell(row), "MiB (calls)") if counted else UNMEASURED


def error_table(rows: Sequence[Row]) -> str:
    """Largest relative error against float64."""
    return _grid(rows, lambda row: _bad(row) or ("" if row["error"] is None else f"{row['error']:.1e}"), "relative error")


def goal_table(rows: Sequence[Row]) -> str:
    """LSS against its own local calls and against the ideal, beside the goals."""
    lines = ["| | tokens | ms | of no-comm | goal | of ideal | goal |", "|---|---:|---:|---:|---:|---:|---:|"]
    ours = [row for row in rows if row["rival"] is None and row["status"] == "ok" and row["no_comm_ms"]]
    for row in sorted(ours, key=lambda row: (label(row), row["tokens"])):
        local, ideal = row["no_comm_ms"] / row["ms"], row["ideal_ms"] / row["ms"]
        goals = [f"{goal}{'' if share >= goal else ' (missed)'}" for share, goal in
                 zip((local, ideal), GOALS.get(row["tokens"], ()), strict=False)] or ["", ""]  # fmt: skip
        lines.append(f"| {label(row)} | {row['tokens']:,} | {_number(row['ms'])} | {local:.3f} | {goals[0]} | {ideal:.3f} | "
                     f"{goals[1]} |")  # fmt: skip
    return "\n".join(lines) if len(lines) > 2 else UNMEASURED


def train_table(rows: Sequence[Row]) -> str:
    """Whole steps: time, tokens a second, model FLOP utilisation and peak memory."""
    lines = ["| | model | tokens | ranks | s a step | tokens/s | MFU | peak GiB |", "|---|---|" + "---:|" * 6]
    for row in sorted(rows, key=lambda row: (str(row["model"]), row["layers"], row["tokens"], _rank(row))):
        what = f"| {label(row)} | {row['model']}, {row['layers']} layers | {row['tokens']:,} | {row['world_size']} |"
        bad = _bad(row)
        if bad is None:
            mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
            peak = "" if row["peak_bytes"] is None else _number(row["peak_bytes"] / 2**30)
            what += f" {_number(row['ms'] / 1e3)} | {row['tokens_per_s']:,.0f} | {mfu} | {peak} |"
        else:
            what += f" {bad} | | | |"
        lines.append(what)
    return "\n".join(lines + _reasons(rows))


def length_table(rows: Sequence[Row]) -> str:
    """The longest sequences whose whole step fits, and what a token takes of the device in each layer."""
    lines = ["| | model | ranks | memory GiB | longest, tokens | peak GiB | KiB a token and layer | s a step | by |",
             "|---|---|" + "---:|" * 6 + "---|"]  # fmt: skip
    for row in sorted(rows, key=lambda row: (str(row["model"]), row["layers"], row["world_size"], _rank(row))):
        what = f"| {label(row)} | {row['model']}, {row['layers']} layers | {row['world_size']} |"
        bad = _bad(row)
        if bad is not None:
            lines.append(f"{what} | {bad} | | | | |")
            continue
        limit, peak, each, ms = (row.get(key) for key in ("limit_bytes", "peak_bytes", "token_layer_bytes", "ms"))
        numbers = ((limit, 2**30), (peak, 2**30), (each, 2**10), (ms, 1e3))
        cells = ["" if x is None else _number(x / unit) for x, unit in numbers]
        by = "a whole step" if row.get("confirmed") else "an estimate"
        lines.append(f"{what} {cells[0]} | {row['tokens']:,} | {cells[1]} | {cells[2]} | {cells[3]} | {by} |")
    return "\n".join(lines + _reasons(rows))


def scan_table(rows: Sequence[Row]) -> str:
    """A recurrence beside attention: time a token, and that over the same at the shortest length."""
    names = ("ranks", "tokens", "ms", "ns a token", "of the shortest's", "of ideal", "peak GiB", "MiB (calls)", "error")
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    shortest: dict[tuple, float] = {}
    for row in sorted(rows, key=lambda row: (row["model"] != "scan", row["model"], row["world_size"], _rank(row), label(row),
                                             row["tokens"])):  # fmt: skip
        what = f"| {label(row)} | {row['world_size']} | {row['tokens']:,} |"
        bad = _bad(row)
        if bad is not None:
            lines.append(f"{what} {bad} | | | | | | |")
            continue
        each = 1e6 * row["ms"] / row["tokens"]
        first = shortest.setdefault((label(row), row["world_size"]), each)
        ideal = f"{row['ideal_ms'] / row['ms']:.3f}" if row["ideal_ms"] else ""
        peak = "" if row["peak_bytes"] is None else _number(row["peak_bytes"] / 2**30)
        sent = f"{_number(row['payload_bytes'] / 2**20)} ({row['calls']})" if row["world_size"] > 1 else ""
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        cells = (_number(row["ms"]), _number(each), f"{each / first:.3f}", ideal, peak, sent, error)
        lines.append(f"{what} {' | '.join(cells)} |")
    return "\n".join(lines + _reasons(rows))


TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "time": ("attention", time_table),
    "memory": ("attention", memory_table),
    "bytes": ("attention", bytes_table),
    "error": ("attention", error_table),
    "goals": ("attention", goal_table),
    "train": ("train", train_table),
    "length": ("length", length_table),
    "scan": ("scan", scan_table),
}


def tables_of(rows: Sequence[Row]) -> str:
    """Every table that these rows give, under headings: by device, dtype, head shape and number of ranks."""
    parts = []
    for bench, gpu, dtype in dict.fromkeys((row["bench"], row["gpu"], row["dtype"]) for row in rows):
        alike = [row for row in rows if (row["bench"], row["gpu"], row["dtype"]) == (bench, gpu, dtype)]
        if bench in ("train", "length", "scan"):
            parts.append(f"### {bench}: {dtype} on {gpu}\n\n{TABLES[bench][1](alike)}\n")
            continue
        for heads in dict.fromkeys(row["heads"] for row in alike):
            same = [row for row in alike if row["heads"] == heads]
            sizes = dict.fromkeys(row["world_size"] for row in same if row["strategy"] != ONE_DEVICE) or {1: None}
            for ranks, graph in product(sizes, dict.fromkeys(row.get("graph") for row in same)):
                mine = [row for row in same if _fits(row, {"world_size": str(ranks), "graph": str(graph)})]
                how = f"{heads} heads, {dtype}, {ranks} ranks, {gpu}{', as CUDA graphs' if graph else ''}"
                for name, (of, make) in TABLES.items():
                    if of == bench:
                        parts.append(f"### {name}: {how}\n\n{make(mine)}\n")
    return "\n".join(parts)


def fill_page(text: str, folder: Path) -> str:
    """The page with every marked table made anew from the result files in `folder`.

    Raises:
        Refused: a mark that names no table, or a file that holds other things.
    """
    return _MARK.sub(lambda mark: f"{mark[1]}\n{_marked(mark['what'].split(), folder)}\n\n{mark[3]}", text)


def _marked(words: list[str], folder: Path) -> str:
    if len(words) < 2 or words[0] not in TABLES:
        raise Refused(f"table {' '.join(words)}: write NAME FILES KEY=VALUE ..., NAME one of {', '.join(TABLES)}.")
    bench, make = TABLES[words[0]]
    # steps issued call by call, unless graphs are asked for
    wanted = {"graph": "None"} | dict(word.split("=", 1) for word in words[2:])
    rows = [row for row in read_rows(sorted(folder.glob(words[1]))) if row["bench"] == bench and _fits(row, wanted)]
    return make(rows) if rows else UNMEASURED


def _fits(row: Row, wanted: dict[str, str]) -> bool:
    # one device's rows are the yardstick beside any number of ranks
    return all(
        str(json.dumps(row[key]) if isinstance(row.get(key), dict) else row.get(key)) == value
        or (key == "world_size" and row["strategy"] in (ONE_DEVICE, "plain"))
        for key, value in wanted.items()
    )
