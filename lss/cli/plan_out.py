"""`lss plan --out`: plans as rows that `lss report` makes pages of."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lss.config import Config
from lss.config.errors import refuse

if TYPE_CHECKING:
    from lss.planner import Curve, Plan

MOMENTS = 400  # of a curve that stay: more cannot be told apart in a picture


def make_folder(name: str) -> Path:
    """The folder, made where it is not there.

    Raises:
        Refused: it cannot be made.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse("--out", name, f"cannot be made ({error.strerror}); give a folder that can") from error
    return folder


def plan_row(
    config: Config, plan: Plan, settings: Sequence[str], why: str = "", curve: Curve | None = None
) -> dict[str, Any]:
    """What a plan says: bytes, seconds and, where it was drawn, GiB by class over the moments of a step."""
    row = {
        "plan": config.name, "settings": " ".join(settings), "gpu": plan.hardware.name, "ranks": plan.ranks,
        "cp": config.parallel.cp, "dp": config.parallel.dp, "strategy": config.parallel.strategy,
        "seq_len": config.data.seq_len, "batch": config.train.batch_size, "fits": plan.fits, "step_s": plan.step,
        "tokens_per_s": plan.tokens / plan.step, "mfu": plan.mfu, "peak_bytes": plan.peak.bytes, "room_bytes": plan.room,
        "host_bytes": plan.peak.host, "phase": plan.peak.phase, "classes": dict(plan.peak.classes),
        "seconds": dict(plan.seconds), "payload": dict(plan.payload), "calls": dict(plan.calls), "why": why,
    }  # fmt: skip
    return row if curve is None else row | {"curve": _thinned(curve)}


def _thinned(curve: Curve) -> dict[str, Any]:
    from lss.planner.curve import ON_DEVICE
    from lss.report.plots import thin

    total = curve.total.tolist()
    kept = [int(x) for x in thin(range(len(total)), total, MOMENTS)[0]]
    parts = [(name, bisect_left(kept, first)) for name, first in curve.parts]
    return {"gib": {name: (curve.of(name)[kept] / 2**30).round(decimals=4).tolist() for name in ON_DEVICE}, "parts": parts}


def write_plans(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to the folder's plans.jsonl, and say so."""
    path = folder / "plans.jsonl"
    try:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        fit = f"{path.name} cannot be written ({error.strerror}); give another folder"
        raise refuse("--out", str(folder), fit) from error
    print(f"written: {path}; lss report {folder} makes a page of it")
