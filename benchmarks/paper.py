"""The paper's weak scaling, planned: `python benchmarks/paper.py` writes benchmarks/results/paper-planned.jsonl, and the
tables of docs/paper.md. Some minutes on one core.

348 tokens a V100, six to a host, from 6 to 3,456 devices; beyond 144 by data parallelism. Every model and precision below is
planned by `lss.planner`, with LSS in the order of the paper and with its rival read in two ways:

- "tp": Megatron's tensor and sequence parallelism, `parallel.strategy = "tp"`, as if there were a head for each rank;
- "whole": the same, with attention left whole on every rank, since a model has fewer heads than there are ranks.

What plans do not know is added here by the formulas of `unfused` and `left_whole`: attention that writes its scores down, as
PyTorch did in 2023, and the rival's attention on every rank. No constant is fitted to what the paper reports.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lss.config import Config, load_config
from lss.planner import HARDWARE, Hardware, Plan, make_plan
from lss.planner.drawn import Traces
from lss.planner.hardware import MATRIX_PART, TERA

ROOT = Path(__file__).parents[1]
ROWS, PAGE = ROOT / "benchmarks/results/paper-planned.jsonl", ROOT / "docs/paper.md"

TOKENS, SHARING, GPUS = 348, 144, (6, 36, 144, 864, 3456)
LAYERS, WIDTHS, HEADS, VOCABULARY = (6, 12, 24), (576, 1152), 12, 256
SHOWN = (12, 576, "half")  # the model whose weak scaling has a table of its own
PAPER = {"speed-up at 144": 5.6, "memory ratio at 144": 10.2, "PFLOP/s at 3,456": 32.0, "efficiency at 3,456": 161.0}
_HIDDEN = "were all exchange hidden"
WAYS = {"lss": "LSS", "tp": "TP-SP", "whole": "attention whole"}

# A V100 without its tensor cores: FLOP/s of float32 by NVIDIA's data sheet, of which 60 % are taken as of the others here.
_V100 = HARDWARE["v100"]
_SINGLE = 15.7 * TERA
PRECISIONS: dict[str, tuple[str, int, Hardware]] = {
    "half": ("bfloat16", 2, _V100),
    "single": ("float32", 4, replace(_V100, peak=_SINGLE, matrices=MATRIX_PART * _SINGLE,
                                     attention={64: ((8192, 0.5 * _SINGLE),)})),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What the formulas need: layers, width, heads, all tokens of a sequence, its ranks, bytes of a number."""

    layers: int
    width: int
    heads: int
    tokens: int
    ranks: int
    number: int


def unfused(sizes: Sizes, share: float, hardware: Hardware) -> tuple[float, int]:
    """(seconds of forward and backward, bytes kept for backward) of attention that writes all scores down, masked or not.

    Kept of each score: softmax and dropout's output, b bytes each, and its mask, 1: 2 b + 1, the 5 of Korthikanti et al.
    2022 at b = 2. Moved: forward writes the scores, reads and writes them to mask, for softmax and for dropout, and reads
    them for the values, 8 b + 1; backward 11 b + 1 likewise. Products: 3 times 4 H a score.

    Args:
        share: of all scores that the rank computes.
    """
    scores = share * sizes.layers * sizes.heads * float(sizes.tokens) ** 2
    moved = scores * (19 * sizes.number + 2) / hardware.bandwidth
    products = 3 * 4 * scores * sizes.width / sizes.heads / hardware.matrices
    return moved + products, round(scores * (2 * sizes.number + 1))


def left_whole(sizes: Sizes, hardware: Hardware) -> tuple[float, int]:
    """(seconds, bytes) that a rank of "tp" has more where attention's own weights and tokens are whole on every rank.

    Its four products of width by width, 6 FLOPs a weight and token; q, k, v and outputs of all tokens; and weights,
    gradients and two moments in float32. Scores are not counted.
    """
    more = 1 - 1 / sizes.ranks
    weights = 4 * sizes.width**2 * sizes.layers * more
    kept = 4 * sizes.tokens * sizes.width * sizes.number * sizes.layers * more
    return 6 * weights * sizes.tokens / hardware.matrices, round(kept + 16 * weights)


def config_of(way: str, layers: int, width: int, precision: str, gpus: int) -> Config:
    """The run of so many devices, each with its tokens."""
    cp = min(gpus, SHARING)
    heads = HEADS if way == "lss" else cp
    return load_config(None, [
        f"model.n_layers={layers}", f"model.d_model={width}", f"model.n_heads={heads}", f"model.n_kv_heads={heads}",
        f"model.d_mlp={4 * width}", f"model.vocab_size={VOCABULARY}", "model.positions=learned", "model.mlp=gelu",
        "model.norm=layernorm", f"data.seq_len={TOKENS * cp}", "parallel.order=contiguous",
        f"parallel.strategy={'lss' if way == 'lss' else 'tp'}", f"parallel.cp={cp}", f"parallel.dp={gpus // cp}",
        "parallel.regather=false",
        f"train.batch_size={gpus // cp}", "train.accumulate=1", f"train.dtype={PRECISIONS[precision][0]}",
        "memory.checkpointing=none",
    ]).resolved(gpus)  # fmt: skip


def rows_of(plan: Plan, way: str, sizes: Sizes, precision: str, gpus: int) -> list[dict]:
    """A row for each of the two kernels: what is planned, and what the formulas add to it."""
    hardware, whole = PRECISIONS[precision][2], way == "whole"
    share = 1.0 if whole else 1 / sizes.ranks
    more_seconds, more_bytes = left_whole(sizes, hardware) if whole else (0.0, 0)
    # with the wait for the rank that has most, which has no counterpart where all scores are computed
    attention = plan.seconds["attention"] + plan.seconds["bubbles"]
    fused = attention * (sizes.ranks if whole else 1)
    rows = []
    for kernel, (seconds, kept) in (("flash", (fused, 0)), ("unfused", unfused(sizes, share, hardware))):
        step = plan.step - attention + seconds + more_seconds
        held = plan.peak.bytes + kept + more_bytes
        numbers = {
            "seconds": step, "attention_s": seconds, "exchange_s": plan.seconds["exchange"],
            "gradients_s": plan.seconds["gradients"], "gib": held / 2**30, "pflops": plan.flops / step / 1e15,
            "hidden_pflops": plan.flops / (step - plan.seconds["exchange"] - plan.seconds["gradients"]) / 1e15,
        }  # fmt: skip
        rows.append({
            "way": way, "layers": sizes.layers, "width": sizes.width, "precision": precision, "kernel": kernel, "gpus": gpus,
            "tokens": sizes.tokens, "fits": held <= plan.room, **{name: float(f"{x:.4g}") for name, x in numbers.items()},
        })  # fmt: skip
    return rows


def all_rows() -> list[dict]:
    """Everything, planned now."""
    rows = []
    for width, precision, gpus in itertools.product(WIDTHS, PRECISIONS, GPUS):
        traces, (_, number, hardware) = Traces(), PRECISIONS[precision]
        for layers in LAYERS:
            plans = {way: make_plan(config_of(way, layers, width, precision, gpus), hardware, traces)
                     for way in ("lss", "tp")}  # fmt: skip
            plans["whole"] = plans["tp"]
            ranks = min(gpus, SHARING)
            sizes = Sizes(layers, width, HEADS, TOKENS * ranks, ranks, number)
            for way in WAYS:
                rows += rows_of(plans[way], way, sizes, precision, gpus)
    return rows


# -- what is shown ---------------------------------------------------------------------------------------------------------


def _model(row: dict) -> tuple:
    return row["layers"], row["width"], row["precision"]


def _by(rows: Iterable[dict], **wanted: object) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _times(x: float, ours: float) -> str:
    return f" ({_number(x / ours)}x)" if x != ours else ""


def _size(row: dict) -> str:
    return _number(row["gib"]) if row["fits"] else f"*{_number(row['gib'])}*"


def efficiency(rows: Sequence[dict], row: dict, of: str = "pflops") -> float:
    """FLOP/s of a device, as a part of those that the same has on the fewest: per cent."""
    alike = {key: row[key] for key in ("way", "layers", "width", "precision", "kernel")}
    (first,) = _by(rows, gpus=GPUS[0], **alike)
    return 100 * (row[of] / row["gpus"]) / (first[of] / GPUS[0])


def summary(rows: Sequence[dict]) -> str:
    """The paper's four figures beside the range of the planned ones over all models and precisions."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for kernel in ("unfused", "flash"):
        for ours in _by(rows, way="lss", kernel=kernel, gpus=SHARING):
            for way in ("tp", "whole"):
                (rival,) = [r for r in _by(rows, way=way, kernel=kernel, gpus=SHARING) if _model(r) == _model(ours)]
                found.setdefault(("speed-up at 144", kernel, way), []).append(rival["seconds"] / ours["seconds"])
                found.setdefault(("memory ratio at 144", kernel, way), []).append(rival["gib"] / ours["gib"])
        for ours in _by(rows, way="lss", kernel=kernel, gpus=GPUS[-1]):
            for way, of in (("", "pflops"), (_HIDDEN, "hidden_pflops")):
                found.setdefault(("PFLOP/s at 3,456", kernel, way), []).append(ours[of])
                found.setdefault(("efficiency at 3,456", kernel, way), []).append(efficiency(rows, ours, of))
    lines = ["| | paper | attention | | planned |", "|---|---:|---|---|---:|"]
    for (figure, kernel, way), values in sorted(found.items(), key=lambda item: list(PAPER).index(item[0][0])):
        span = f"{_number(min(values))} to {_number(max(values))}"
        unit = " %" if "efficiency" in figure else ""
        note = f"against {WAYS[way]}" if way in WAYS else way
        lines.append(f"| {figure} | {PAPER[figure]:g}{unit} | {kernel} | {note} | {span}{unit} |")
    return "\n".join(lines)


def at_144(rows: Sequence[dict]) -> str:
    """Every model at 144 devices: seconds and GiB of the three; in italics what a V100 has no memory for."""
    lines = ["| layers x width | precision | attention | s a step: LSS | TP-SP | whole | GiB: LSS | TP-SP | whole |",
             "|---|---|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for ours in _by(rows, way="lss", gpus=SHARING):
        alike = {key: ours[key] for key in ("layers", "width", "precision", "kernel", "gpus")}
        three = [_by(rows, way=way, **alike)[0] for way in WAYS]
        times = [_number(row["seconds"]) + _times(row["seconds"], ours["seconds"]) for row in three]
        sizes = [_size(row) + _times(row["gib"], ours["gib"]) for row in three]
        lines.append(f"| {ours['layers']} x {ours['width']} | {ours['precision']} | {ours['kernel']} | "
                     + " | ".join((*times, *sizes)) + " |")  # fmt: skip
    return "\n".join(lines)


def scaling(rows: Sequence[dict]) -> str:
    """One model over numbers of devices."""
    lines = ["| devices | tokens | | attention | s a step | of which exchange | GiB | PFLOP/s | efficiency |",
             "|---:|---:|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    chosen = [row for row in rows if _model(row) == SHOWN]
    for row in sorted(chosen, key=lambda r: (r["kernel"] == "flash", list(WAYS).index(r["way"]), r["gpus"])):
        numbers = (_number(row["seconds"]), _number(row["exchange_s"]), _size(row), _number(row["pflops"]))
        cells = (f"{row['gpus']:,}", f"{row['tokens']:,}", WAYS[row["way"]], row["kernel"], *numbers,
                 f"{efficiency(rows, row):.0f} %")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"summary": summary, "at 144": at_144, "scaling": scaling}


def fill(text: str, rows: Sequence[dict]) -> str:
    """A page with every table between its two marks made anew."""
    end = "<!-- end of table -->"
    for name, table in TABLES.items():
        mark = f"<!-- paper {name} -->\n"
        before, _, rest = text.partition(mark)
        text = before + mark + "\n" + table(rows) + "\n\n" + end + rest.partition(end)[2]
    return text


def main() -> None:
    """Plan, or read the rows that are there, and fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only fill the page from the rows that are there")
    if not parser.parse_args().page:
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in all_rows()))
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    PAGE.write_text(fill(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
