"""Reading a config: TOML, overrides, and the checks across keys."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lss.config.errors import Refused, refuse
from lss.config.sections import (
    SECTIONS,
    CheckpointConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    as_plain,
    build_section,
    keys_of,
    known_keys,
    nearest,
    refuse_mismatch,
)

LARGEST_FILE = 1 << 20  # bytes; a config is a page of text


@dataclass(frozen=True)
class Config:
    """A whole, validated config. `name` is the stem of its file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    name: str = "tiny"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All values, by section and key."""
        return {section: as_plain(getattr(self, section)) for section in SECTIONS}

    @staticmethod
    def from_dict(values: Mapping[str, Mapping[str, Any]], name: str = "tiny") -> Config:
        """The inverse of `to_dict`; sections and keys may be missing, unknown ones are refused."""
        for section, entries in values.items():
            if section not in SECTIONS:
                raise _unknown(section, list(SECTIONS), "section")
            if not isinstance(entries, Mapping):
                raise refuse(section, repr(entries), f"it is a section; write [{section}] and its keys below")
            for key in entries:
                if key not in keys_of(section):
                    raise _unknown(f"{section}.{key}", known_keys(), "key")
        sections = {section: build_section(section, dict(values.get(section, {}))) for section in SECTIONS}
        config = Config(**sections, name=name)
        config.validate()
        return config

    def validate(self) -> None:
        """Refuse values that do not fit together."""
        refuse_mismatch(self.model)
        model, parallel, train = self.model, self.parallel, self.train
        if self.data.source == "bytes" and model.vocab_size < 256:
            raise refuse("model.vocab_size", model.vocab_size, "data.source=\"bytes\" has ids up to 255; use 256 or more")
        if isinstance(parallel.head_chunks, int):
            if parallel.head_chunks > model.n_kv_heads:
                raise refuse("parallel.head_chunks", parallel.head_chunks, f"model.n_kv_heads={model.n_kv_heads} bounds it; "
                             f"use \"auto\" or 1 to {model.n_kv_heads}")  # fmt: skip
            if parallel.head_chunks > 1 and parallel.strategy != "lss":
                raise refuse("parallel.head_chunks", parallel.head_chunks, "only parallel.strategy=\"lss\" gathers by head "
                             f"chunks; with \"{parallel.strategy}\" use \"auto\" or 1")  # fmt: skip
        share = parallel.dp * train.accumulate
        if train.batch_size % share:
            low = train.batch_size // share * share
            fit = f"{low} or {low + share}" if low else f"{share}"
            raise refuse("train.batch_size", train.batch_size, f"must be a multiple of parallel.dp={parallel.dp} x "
                         f"train.accumulate={train.accumulate}; use {fit}")  # fmt: skip
        if isinstance(parallel.cp, int):
            self._validate_tensor_parallel(parallel.cp)

    def _validate_tensor_parallel(self, cp: int) -> None:
        if self.parallel.strategy != "tp":
            return
        for key in ("n_heads", "n_kv_heads", "d_mlp"):
            value = getattr(self.model, key)
            if value % cp:
                fit = f"parallel.strategy=\"tp\" cuts it over parallel.cp={cp} ranks, which must divide it; "
                raise refuse(f"model.{key}", value, f"{fit}{nearest(value, cp)} ranks, or strategy \"lss\"")

    def resolved(self, ranks: int) -> Config:
        """This config for a run of `ranks`: cp a number, and cp x dp the number of ranks."""
        cp, dp = self.parallel.cp, self.parallel.dp
        if cp == "auto":
            if ranks % dp:
                raise refuse("parallel.dp", dp, f"must divide the number of ranks, which is {ranks}; {nearest(ranks, dp)}")
            cp = ranks // dp
        assert isinstance(cp, int)
        if cp * dp != ranks:
            are = "is" if ranks == 1 else "are"
            raise refuse("parallel.cp", cp, f"with parallel.dp={dp} this needs {cp * dp} ranks and {ranks} {are} planned; "
                         f"start {cp * dp} (--nproc {cp * dp}) or choose cp x dp = {ranks}")  # fmt: skip
        config = replace(self, parallel=replace(self.parallel, cp=cp))
        config.validate()
        return config


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML config and apply `section.key=value` overrides; without a file, the defaults of configs/tiny.toml.

    An override's value is read as a TOML value, and as a plain string where it is none.

    Raises:
        Refused: the file cannot be read, or a key or value is unknown or wrong.
    """
    values = {} if path is None else _read(Path(path))
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise refuse("override", repr(override), "write section.key=value, optim.lr=1e-3 for one")
        if section not in SECTIONS or key not in keys_of(section):
            raise _unknown(name.strip(), known_keys(), "key")
        entries = values.setdefault(section, {})
        if not isinstance(entries, dict):
            raise refuse(section, repr(entries), f"it is a section; write [{section}] and its keys below")
        entries[key] = _value(text.strip())
    return Config.from_dict(values, Path(path).stem if path is not None else "tiny")


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise refuse("CONFIG", path, f"too large for a config ({path.stat().st_size} bytes); give a TOML file")
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        fit = f"cannot be read ({error.strerror}); give a TOML file such as configs/tiny.toml"
        raise refuse("CONFIG", path, fit) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise refuse("CONFIG", path, f"not valid TOML ({str(error).rstrip('.')})") from None


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except (tomllib.TOMLDecodeError, ValueError):
        return text


def _unknown(name: str, known: Sequence[str], what: str) -> Refused:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return Refused(f"{name}: unknown {what}; nearest is {near[0]}.")
