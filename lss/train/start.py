"""Weights that a new run starts with: those of another run, whose sequences may have had another length."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lss.checkpoint import Checkpoint, check_together, find_checkpoint, load_weights, open_checkpoint
from lss.comm import Control
from lss.config import Config
from lss.config.errors import Refused, refuse
from lss.parallel import HFLayout, Layout

# Of [model], what the same weights may be trained on with.
MAY_CHANGE = ("preset", "dropout", "attention_dropout", "windows", "residual", "rope_theta", "rope_scaling", "rope_factor")


def find_start(config: Config) -> Checkpoint | None:
    """The save that checkpoint.start names, a run's newest where it names a run; None where it names none.

    Its tensors are not read. Of [data] anything may be another; of [model] what `MAY_CHANGE` lists.

    Raises:
        Refused: no save is there, it is damaged in a way that shows, or it is of another model.
    """
    if not config.checkpoint.start:
        return None
    path = Path(config.checkpoint.start).expanduser()
    folder = path / "checkpoints"
    found = find_checkpoint(folder, fallback=config.checkpoint.fallback) if folder.is_dir() else _opened(path)
    if found is None:
        raise refuse("checkpoint.start", path, "a run without a checkpoint; train it further or name another")
    before, defaults = found.read_state().get("config", {}).get("model", {}), Config().to_dict()["model"]
    for key, now in config.to_dict()["model"].items():
        earlier = before.get(key, defaults.get(key))  # saved before there was the key
        if key not in MAY_CHANGE and earlier != now:
            raise refuse(f"model.{key}", now, f"checkpoint.start={path} is of a model with {earlier}; use that one")
    return found


def _opened(path: Path) -> Checkpoint:
    if not path.is_dir():
        raise refuse("checkpoint.start", path, "no such folder; give a run of lss train or a checkpoint of one")
    return open_checkpoint(path)


def load_start(config: Config, model: nn.Module, layout: Layout | HFLayout, control: Control) -> Checkpoint | None:
    """Load the weights of `find_start` into a model that is laid out, every byte of them checked; returns that save.

    The optimizer's state, the schedule and the order of samples are the new run's own.

    Raises:
        Refused: as `find_start`; damaged; or a learned position table of another data.seq_len. The same on every rank.

    Collectives: two gathers over `control`, none where checkpoint.start names nothing.
    """
    if not config.checkpoint.start:
        return None
    found, reason = None, ""
    try:
        found = find_start(config)
    except Refused as refusal:  # the others wait
        reason = str(refusal)
    reason = next(filter(None, control.gather(reason)), "")
    if reason:
        raise Refused(reason)
    assert found is not None
    _, reason = check_together(found.path, control, "weights")
    if reason:
        raise Refused(reason)
    load_weights(found, model, layout)
    return found
