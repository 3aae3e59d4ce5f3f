"""Strategies compared: the same step planned for each, over numbers of ranks and lengths, and what follows, in words.

All ranks share one sequence. Every row is a `Plan`; nothing here computes a time of its own. A strategy "cannot" where the
library refuses it, or where ranks would have no head to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from lss.config import Config
from lss.config.errors import Refused
from lss.planner.drawn import Traces
from lss.planner.hardware import Hardware
from lss.planner.plan import make_plan
from lss.planner.tracers import Tracers

Row = dict[str, Any]
Build = Callable[[Sequence[str], int], Config]

# strategy -> how it is named in a table
COMPARED = {
    "lss": "LSS", "lss_2d": "2D (lss_2d)", "ring": "ring", "ulysses": "Ulysses", "tp": "Megatron TP-SP (tp)",
}  # fmt: skip
RANKS = (1, 8, 32, 64, 512, 4096, 32768, 131072)
LENGTHS = tuple(4096 * 8**k for k in range(6))  # to 134,217,728
WEAK = 4096  # tokens a rank where both grow together
# Shorter segments would be kernels of next to nothing.
LEAST_SEGMENT = 128
# Times nearer than this are not told apart: no model here is better.
ALIKE = 0.05


def compare(
    build: Build, hardware: Hardware, ranks: Iterable[int] = RANKS, lengths: Iterable[int] = LENGTHS,
    on_row: Callable[[Row], None] = lambda row: None, tracers: Tracers | None = None,
) -> list[Row]:
    """A row for each strategy, number of ranks and length whose segments are not too short.

    Args:
        build: makes a config of overrides, resolved for a number of ranks; may raise Refused.
        on_row: called with each row as it is made.
        tracers: processes that take the plans' traces; by default this one does.

    Returns:
        rows with strategy, ranks, tokens, gpu, status ("ok", "does not fit" or "cannot: why"), and of a plan seconds (of a
        step, and by part), peak_bytes, payload_bytes, calls, staged_s and flat_s (the exchange of keys as it is, and in one
        stage over all hosts).
    """
    rows: list[Row] = []
    lengths, ranks = tuple(lengths), tuple(ranks)
    for strategy in COMPARED:
        traces = Traces(tracers)  # other strategies share none
        for n in ranks if strategy == "lss" else [n for n in ranks if n > 1]:
            for tokens in lengths:
                if tokens < LEAST_SEGMENT * n:
                    continue
                row = {"strategy": strategy, "ranks": n, "tokens": tokens, "gpu": hardware.name}
                rows.append(row | _planned(build, hardware, strategy, n, tokens, traces))
                on_row(rows[-1])
    return rows


def _planned(build: Build, hardware: Hardware, strategy: str, ranks: int, tokens: int, traces: Traces) -> Row:
    settings = [f"parallel.strategy={strategy}", f"parallel.cp={ranks}", "parallel.dp=1", "train.batch_size=1",
                "train.accumulate=1", f"data.seq_len={tokens}"]  # fmt: skip
    settings += ["train.compile=false"] if strategy == "tp" else []  # which it refuses
    try:
        config = build(settings, ranks)
        if strategy == "ulysses" and ranks > config.model.n_heads:
            return {"status": f"cannot: of {ranks} ranks only {config.model.n_heads} would have a query head to compute"}
        plan = make_plan(config, hardware, traces)
    except Refused as refusal:
        return {"status": f"cannot: {refusal}"}
    times = {"seconds": plan.step} | {f"{part}_s": seconds for part, seconds in plan.seconds.items()}
    times |= {"staged_s": plan.staged, "flat_s": plan.flat}
    return {
        "status": "ok" if plan.fits else "does not fit", "peak_bytes": plan.peak.bytes,
        "payload_bytes": sum(plan.payload.values()), "calls": sum(plan.calls.values()),
        **{name: float(f"{seconds:.5g}") for name, seconds in times.items()},
    }  # fmt: skip


def fastest(rows: Iterable[Row]) -> Row | None:
    """The fastest of rows that fit; LSS, or else the first in the table, where others are no faster than can be told."""
    fitting = [row for row in rows if row["status"] == "ok"]
    if not fitting:
        return None
    least = min(row["seconds"] for row in fitting)
    order = list(COMPARED)
    alike = [row for row in fitting if row["seconds"] <= (1 + ALIKE) * least]
    return min(alike, key=lambda row: order.index(row["strategy"]))


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Sentences: for each number of ranks which strategy is the fastest at which lengths, and how far LSS is behind."""
    told = []
    for ranks in sorted({row["ranks"] for row in rows if row["ranks"] > 1}):
        here = [row for row in rows if row["ranks"] == ranks]
        runs: list[tuple[str, list[int], list[float]]] = []
        for tokens in sorted({row["tokens"] for row in here}):
            alike = [row for row in here if row["tokens"] == tokens]
            best = fastest(alike)
            name = best["strategy"] if best else ""
            if not runs or runs[-1][0] != name:
                runs.append((name, [], []))
            runs[-1][1].append(tokens)
            ours = [row for row in alike if row["strategy"] == "lss" and row["status"] == "ok"]
            if best and ours:
                runs[-1][2].append(ours[0]["seconds"] / best["seconds"])
        told.append(f"{ranks:,} ranks: " + "; ".join(_run(*run) for run in runs) + ".")
    return told


def stages(rows: Iterable[Row]) -> str | None:
    """From how many ranks on keys in two stages, across hosts and inside, come sooner than in one ring over all hosts."""
    weak = sorted((row["ranks"], row["staged_s"] < row["flat_s"]) for row in rows
                  if row["strategy"] == "lss" and row["tokens"] == WEAK * row["ranks"]
                  and row.get("staged_s") != row.get("flat_s"))  # fmt: skip
    if not weak:
        return None
    ring, span = "in one ring over all hosts", f"{weak[0][0]:,} to {weak[-1][0]:,} ranks with {WEAK:,} tokens each"
    if not weak[-1][1]:
        return f"Keys {ring} come no later than in two stages, on {span}."
    least = next(ranks for place, (ranks, _) in enumerate(weak) if all(sooner for _, sooner in weak[place:]))
    return f"Keys in two stages, across hosts and inside, come sooner than {ring} from {least:,} ranks on, of {span}."


def _run(strategy: str, lengths: list[int], behind: list[float]) -> str:
    span = f"{_span(lengths)} tokens"
    if not strategy:
        return f"at {span} nothing fits"
    if strategy == "lss":
        return f"at {span} LSS, or nothing is faster by {100 * ALIKE:.0f} %"
    if not behind:
        return f"at {span} {COMPARED[strategy]}, as LSS does not fit"
    least, most = f"{min(behind):.2f}", f"{max(behind):.2f}"
    return f"at {span} {COMPARED[strategy]}: LSS takes {least if least == most else f'{least} to {most}'} times as long"


def advice(rows: Sequence[Row]) -> list[str]:
    """For each strategy that is ever the right one, where."""
    places: dict[str, list[tuple[int, int]]] = {}
    for ranks, tokens in sorted({(row["ranks"], row["tokens"]) for row in rows if row["ranks"] > 1}):
        best = fastest(row for row in rows if (row["ranks"], row["tokens"]) == (ranks, tokens))
        if best:
            places.setdefault(best["strategy"], []).append((ranks, tokens // ranks))
    told = []
    for strategy, found in places.items():
        ranks, each = ({place[part] for place in found} for part in (0, 1))
        told.append(f"{COMPARED[strategy]} is the one to take in {len(found)} of these places, on {_span(ranks)} ranks with "
                    f"{_span(each)} tokens each.")  # fmt: skip
    return told


def _span(numbers: Collection[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
