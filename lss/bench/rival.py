"""Other people's libraries beside ours: what an adapter is, and loading adapters from a folder by their paths.

An adapter is one Python file of the folder given as `--rivals` (names that start with `_` are helpers and are passed
over). It is loaded by its path; `lss` imports none by name. Loading it must not import the rival itself, which may be
missing. It defines:

    NAME: str                              what stands in the tables
    def version() -> str | None            the rival's version; None where it is not installed
    def why_not() -> str | None            why it cannot run here, or None

and at least one of:

    def attention(group, rank, world) -> list[tuple[str, str, Callable]]
        Entries (variant, order, f). `variant` is a name such as "ring" or "allgather-cudnn". `order` says in which order
        the rank's tokens lie: "contiguous", "head_tail" or "striped" (rank r holds tokens r, r + world, ...).
        f(q, k, v) takes this rank's tokens, q (B, T, N, H), k and v (B, T, K, H), which require gradients, and returns
        (B, T, N, H), differentiable: causal attention over all ranks' tokens, scores scaled by 1 / sqrt(H).
    def train(config, group, rank, world, device) -> list[tuple[str, Callable]]
        Entries (variant, step) for a model of the shape that `config` says (a dict as `lss.config.Config.to_dict()` gives
        it). step() -> float is one whole optimizer step (forward, backward, clipping, AdamW) on random tokens and returns
        the loss. The model is built at the first call, so that entries do not lie in memory side by side; step.close(),
        where there is one, frees it.

`group` is the process group of all ranks, None where there is one rank. Every rank calls the same functions in the same
order, so an adapter may open process groups of its own. What an adapter raises becomes the status of its row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lss.config.errors import refuse
from lss.segment import make_segment

ORDERS = ("contiguous", "head_tail", "striped")


@dataclass(frozen=True)
class Rival:
    """One adapter: `label` is its name and version; `missing` says why it cannot run here, None where it can."""

    label: str
    module: ModuleType | None
    missing: str | None = None

    def entries(self, kind: str, *arguments: Any) -> list[tuple]:
        """What the adapter offers of a kind, "attention" or "train".

        Raises:
            ValueError: an entry is not one of the protocol.
        """
        make: Callable[..., list[tuple]] = getattr(self.module, kind)
        entries = [tuple(entry) for entry in make(*arguments)]
        for entry in entries:
            _check_entry(entry, 3 if kind == "attention" else 2)
        return entries

    def offers(self, kind: str) -> bool:
        """Whether it has anything of this kind; an adapter that cannot be loaded may have."""
        return self.module is None or hasattr(self.module, kind)


def load_rivals(folder: str | None) -> list[Rival]:
    """The adapters of a folder, in the order of their names; none for None or "none".

    Raises:
        Refused: there is no such folder.
    """
    if folder in (None, "none"):
        return []
    if not Path(folder).is_dir():
        raise refuse("--rivals", folder, "no such folder; give one that holds adapters, or none")
    return [_load(path) for path in sorted(Path(folder).glob("*.py")) if not path.name.startswith("_")]


def _load(path: Path) -> Rival:
    spec = importlib.util.spec_from_file_location(f"lss_rival_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # an adapter is not ours, and neither is what it raises: it costs its own row and no other
    try:
        spec.loader.exec_module(module)
        version, reason = module.version(), module.why_not()
        label = f"{module.NAME} {version}" if version else str(module.NAME)
    except Exception as error:
        return Rival(path.stem, None, f"its adapter cannot be loaded: {reason_of(error)}")
    if version is None:
        return Rival(label, module, f"not installed: {reason or 'no version found'}")
    return Rival(label, module, reason)


def places_of(order: str, seq_len: int, world: int, rank: int) -> torch.Tensor:
    """Global position of each of a rank's tokens in this order, int64 (T,); values >= seq_len mark padding."""
    if order == "striped":
        return torch.arange(rank, -(-seq_len // world) * world, world)
    return make_segment(seq_len, cp=world, rank=rank, order=order).positions


def _check_entry(entry: tuple, length: int) -> None:
    if len(entry) != length or not callable(entry[-1]):
        raise ValueError(f"the adapter's entry {entry!r} is not one of the protocol in lss/bench/rival.py")
    if length == 3 and entry[1] not in ORDERS:
        raise ValueError(f"the adapter's order {entry[1]!r} is unknown; use one of {', '.join(ORDERS)}")


def reason_of(error: BaseException) -> str:
    """An exception in one short line."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
