"""Hardware as a file: what `lss plan --calibrate` writes and `lss plan --gpu FILE.json` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from lss.config import show
from lss.config.errors import Refused, refuse
from lss.planner.hardware import Hardware

FORMAT = 1
MOST_BYTES = 1 << 20
_NAMES, _FLAGS, _COUNTS = ("name", "source"), ("measured", "cpu"), ("per_host",)


def save_profile(hardware: Hardware, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a profile; `facts` say by what and when it was measured.

    Raises:
        Refused: it cannot be written.
    """
    rates = {str(size): list(map(list, points)) for size, points in hardware.attention.items()}
    text = json.dumps({"format": FORMAT} | asdict(hardware) | {"attention": rates, "facts": dict(facts)}, indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise refuse("--calibrate", show(str(path)), f"cannot be written ({error.strerror})") from error


def load_profile(path: Path) -> Hardware:
    """Read a profile.

    Raises:
        Refused: naming the file and what is wrong in it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        found = json.loads(data) if len(data) <= MOST_BYTES else None
    except OSError as error:
        raise refuse("--gpu", show(str(path)), f"cannot be read ({error.strerror})") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise Refused(f"{path}: not a profile of hardware; write one with lss plan --calibrate {path}")
    known = {}
    for field in fields(Hardware):
        if field.name in found:
            known[field.name] = _value(path, field.name, found[field.name])
        elif field.default is MISSING:
            raise Refused(f"{path}: {field.name} is missing; calibrate again")
    return Hardware(**known)


def _value(path: Path, name: str, value: Any) -> Any:
    if name == "attention":
        return _rates(path, value)
    kinds = (str,) if name in _NAMES else (bool,) if name in _FLAGS else (int,) if name in _COUNTS else (int, float)
    if not isinstance(value, kinds) or (isinstance(value, bool) and name not in _FLAGS):
        what = "text" if name in _NAMES else "true or false" if name in _FLAGS else "a number"
        raise Refused(f"{path}: {name}={show(str(value))} is not {what}; calibrate again")
    if name not in _NAMES and name not in _FLAGS and not _positive(float(value)):
        raise Refused(f"{path}: {name}={value} is not above 0; calibrate again")
    return value


def _rates(path: Path, value: Any) -> dict[int, tuple[tuple[int, float], ...]]:
    """{"64": [[tokens, FLOP/s], ...]}, lengths growing."""
    rates = {}
    for size, points in value.items() if isinstance(value, dict) else ():
        good = isinstance(points, list) and points and all(map(_point, points)) and size.isdecimal()
        if not good or [p[0] for p in points] != sorted({p[0] for p in points}):
            raise Refused(f"{path}: attention of heads of {size} is not a list of [tokens, FLOP/s], longer and longer")
        rates[int(size)] = tuple((int(tokens), float(rate)) for tokens, rate in points)
    if not rates:
        raise Refused(f"{path}: attention has no rates; calibrate again")
    return rates


def _point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(isinstance(x, int | float) and _positive(x) for x in point)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
