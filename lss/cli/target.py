"""The trained model that a command is given: a run, a checkpoint of one, or a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lss.cli.verify import checkpoint_folder
from lss.config import Config, overridden
from lss.config.errors import refuse

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from lss.checkpoint import Checkpoint
    from lss.data.bins import Bins
    from lss.train.models import Subject

NAMED = "model.hf="


@dataclass(frozen=True)
class Target:
    """What is evaluated or generates.

    Attributes:
        name: as it was given.
        subject: the model, its config resolved for the ranks of this command.
        checkpoint: where its weights are; None for a model of transformers with its own.
        run: the run's folder; None without one.
        rows: the data.seq_len that it was trained with.
        own_data: no other data was named than what the run was trained on.
    """

    name: str
    subject: Subject
    checkpoint: Checkpoint | None
    run: Path | None
    rows: int
    own_data: bool

    @property
    def config(self) -> Config:
        """The config of this command."""
        return self.subject.config

    @property
    def bins(self) -> Bins | None:
        """The bins of the numbers that it was trained on; None for a model of other data."""
        from lss.data.bins import Bins

        told = None if self.checkpoint is None else self.checkpoint.read_state().get("bins")
        return None if told is None else Bins.of(told, Path(self.name))

    def at(self, seq_len: int) -> Target:
        """The same for sequences of another length."""
        data = replace(self.config.data, seq_len=seq_len)
        return replace(self, subject=replace(self.subject, config=replace(self.config, data=data)))

    @property
    def tokenizer(self) -> str:
        """The folder or name of its tokenizer; empty where it has none."""
        from lss.train.models import KEPT

        kept = None if self.run is None else self.run / KEPT
        return str(kept) if kept is not None and any(kept.glob("tokenizer*")) else self.config.model.hf

    def describe(self) -> str:
        """The model in a line."""
        step = "" if self.checkpoint is None else f", step {self.checkpoint.step}"
        return f"{self.name}{step}: {self.subject.describe()}"

    def load(self, mesh: DeviceMesh) -> nn.Module:
        """The model on the mesh, with its weights; see `lss.train.models.load_model`."""
        from lss.train.models import load_model

        return load_model(self.subject, self.checkpoint, mesh, self.rows)

    def load_plain(self, mesh: DeviceMesh) -> nn.Module:
        """The model whole on every rank; see `lss.train.models.load_plain`."""
        from lss.train.models import load_plain

        return load_plain(self.subject, self.checkpoint, mesh, self.rows)


def settings_of(given: Sequence[str]) -> list[str]:
    """The settings behind a command's model; refuses anything else."""
    for argument in given:
        if "=" not in argument:
            raise refuse("CKPT", argument, "one model is used; behind it come settings, train.dtype=bfloat16 for one")
    return list(given)


def open_target(name: str, overrides: Sequence[str], ranks: int) -> Target:
    """Find the model and its settings, those of the run with `overrides` put in, for this many ranks.

    Raises:
        Refused: there is no such model, or a setting does not fit it.
    """
    from lss.train.models import subject_of

    path = Path(name).expanduser()
    if (path / "checkpoints").is_dir() or (path / "manifest.json").exists():
        return _of_run(checkpoint_folder(str(path)), name, overrides, ranks)
    given = name.removeprefix(NAMED)
    if given == name and path.is_dir() and not (path / "config.json").is_file():
        fit = "neither a run or checkpoint of lss train nor the folder of a model of transformers; give one of these"
        raise refuse("CKPT", name, fit)
    if given == name and not path.exists() and (name.count("/") != 1 or path.parent.is_dir()):
        fit = "no such folder; give a run or checkpoint of lss train, or a model of transformers: a folder, or OWNER/NAME"
        raise refuse("CKPT", name, fit)
    _refuse_model_keys(overrides, given)
    values = overridden({"model": {"hf": given}}, overrides)
    config = Config.from_dict(_for_use(values, overrides), Path(given).name).resolved(ranks)
    subject = subject_of(config, {})
    return Target(given, subject, None, None, config.data.seq_len, own_data=False)


def _of_run(folder: Path, name: str, overrides: Sequence[str], ranks: int) -> Target:
    from lss.checkpoint import open_checkpoint
    from lss.train.models import subject_of

    checkpoint = open_checkpoint(folder)
    state = checkpoint.read_state()
    values: dict[str, Any] = {section: dict(entries) for section, entries in state.get("config", {}).items()}
    rows = int(values.get("data", {}).get("seq_len", Config().data.seq_len))
    for override in overrides:
        if override.startswith("model."):
            key, _, value = override.partition("=")
            raise refuse(key, value, f"{folder} brings its own model; leave it out")
    own = not any(override.startswith(("data.path=", "data.source=")) for override in overrides)
    if not own:  # settings of the run's own files, which others need not have
        data = values.get("data", {})
        kept = ["source", "seq_len", "packing"]
        if data.get("source") == "series" and not any(override.startswith("data.source=") for override in overrides):
            kept += ["columns", "bins", "binning", "nan", "held_out"]
        values["data"] = {key: data[key] for key in kept if key in data}
    for section in ("optim", "checkpoint", "memory"):
        values.pop(section, None)
    values["parallel"] = values.get("parallel", {}) | {"cp": "auto", "dp": 1}
    train = values.get("train", {})
    rows_at_once = max(1, train.get("batch_size", 1) // train.get("accumulate", 1))
    values["train"] = {key: train[key] for key in ("dtype", "seed") if key in train} | {"batch_size": rows_at_once}
    values = _for_use(overridden(values, overrides), overrides)
    run = folder.absolute().parents[1]
    config = Config.from_dict(values, run.name).resolved(ranks)
    return Target(name, subject_of(config, state.get("hf", {})), checkpoint, run, rows, own)


def _for_use(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Rows of a batch that the ranks can share, unless they are given."""
    if any(override.startswith("train.batch_size=") for override in overrides):
        return values
    dp = values.get("parallel", {}).get("dp", 1)
    dp = dp if isinstance(dp, int) and dp > 0 else 1
    train = values.setdefault("train", {})
    rows = 1 if values.get("data", {}).get("packing") else max(1, train.get("batch_size", 8) // dp)
    train["batch_size"] = rows * dp * train.get("accumulate", 1)
    return values


def _refuse_model_keys(overrides: Sequence[str], given: str) -> None:
    for override in overrides:
        if override.startswith(NAMED):
            raise refuse("model.hf", override.removeprefix(NAMED), f"the model is {given} already; name one")
