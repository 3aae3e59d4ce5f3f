"""Rows of `lss.planner.compare` as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from lss.planner.compare import COMPARED, WEAK, Row, advice, fastest, stages, verdicts


def tables(rows: Sequence[Row]) -> str:
    """All tables, and what follows from them in words."""
    words = "\n".join(f"- {sentence}" for sentence in sentences(rows))
    parts = [("The fastest", fastest_table(rows)), ("In words", words)]
    if weak := [row for row in rows if row["tokens"] == WEAK * row["ranks"]]:
        parts.append((f"Weak scaling, {WEAK:,} tokens a rank: seconds a step", scaling_table(weak)))
    for tokens in sorted({row["tokens"] for row in rows}):
        alike = [row for row in rows if row["tokens"] == tokens]
        parts.append((f"Strong scaling, {tokens:,} tokens: seconds a step", scaling_table(alike)))
    if stages := stages_table(rows):
        parts.append(("Keys in two stages, across hosts and inside, or in one ring over all: seconds a step", stages))
    if why := cannot(rows):
        parts.append(("What cannot", "\n".join(f"- {reason}" for reason in why)))
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts) + "\n"


def sentences(rows: Sequence[Row]) -> list[str]:
    """All that is said in words."""
    told = stages(rows)
    return [*verdicts(rows), *advice(rows), *([told] if told else [])]


def fastest_table(rows: Sequence[Row]) -> str:
    """Lengths down, ranks across: the fastest that fits, its seconds, and LSS's as a multiple where it is not that one."""
    ranks, lengths = sorted({row["ranks"] for row in rows}), sorted({row["tokens"] for row in rows})
    lines = ["| tokens | " + " | ".join(f"{n:,}" for n in ranks) + " |", "|---:|" + "---|" * len(ranks)]
    for tokens in lengths:
        cells = []
        for n in ranks:
            here = [row for row in rows if (row["ranks"], row["tokens"]) == (n, tokens)]
            best, ours = fastest(here), [row for row in here if row["strategy"] == "lss" and row["status"] == "ok"]
            if best is None:
                cells.append("nothing fits" if here else "")
            elif n == 1:
                cells.append(f"one device {number(best['seconds'])}")
            else:
                behind = f" (LSS {ours[0]['seconds'] / best['seconds']:.2f}x)" if ours and best is not ours[0] else ""
                cells.append(f"{best['strategy']} {number(best['seconds'])}{behind}")
        lines.append(f"| {tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scaling_table(rows: Sequence[Row]) -> str:
    """Ranks down, strategies across; in brackets what does not fit."""
    lines = ["| ranks | tokens | " + " | ".join(COMPARED.values()) + " |", "|---:|---:|" + "---:|" * len(COMPARED)]
    for ranks in sorted({row["ranks"] for row in rows}):
        here = {row["strategy"]: row for row in rows if row["ranks"] == ranks}
        cells = [_cell(here[strategy]) if strategy in here else "" for strategy in COMPARED]
        lines.append(f"| {ranks:,} | {next(iter(here.values()))['tokens']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row["status"].startswith("cannot"):
        return "cannot"
    seconds = number(row["seconds"])
    return seconds if row["status"] == "ok" else f"({seconds})"


def stages_table(rows: Sequence[Row]) -> str:
    """LSS where keys cross hosts, with the length of each number of ranks that is nearest to `WEAK` a rank; "" if none."""
    across = [row for row in rows if row["strategy"] == "lss" and row.get("flat_s", 0) != row.get("staged_s", 0)]
    lines = ["| ranks | tokens | two stages | one ring | attention beside it |", "|---:|---:|---:|---:|---:|"]
    for ranks in sorted({row["ranks"] for row in across}):
        row = min((row for row in across if row["ranks"] == ranks), key=lambda row: abs(row["tokens"] / ranks - WEAK))
        cells = " | ".join(number(row[key]) for key in ("staged_s", "flat_s", "attention_s"))
        lines.append(f"| {ranks:,} | {row['tokens']:,} | {cells} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def cannot(rows: Sequence[Row]) -> list[str]:
    """Why a strategy cannot, with the ranks at which it is said first."""
    told: dict[str, str] = {}
    for row in rows:
        if row["status"].startswith("cannot"):
            told.setdefault(row["strategy"], f"{COMPARED[row['strategy']]} from {row['ranks']:,} ranks on: "
                            f"{row['status'].removeprefix('cannot: ')}")  # fmt: skip
    return list(told.values())


def number(x: float) -> str:
    """Three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
