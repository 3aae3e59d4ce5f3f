"""A run's checkpoints: which one it goes on from, what is stored besides the weights, and what a failed save does."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from lss.checkpoint import (
    Outcome,
    Saver,
    agree_on_checkpoint,
    check_together,
    find_checkpoint,
    load_checkpoint,
    probe_shared,
    saved_steps,
)
from lss.comm import control
from lss.config import Config
from lss.config.errors import Failed, Refused, refuse
from lss.data.corpus import corpus_digest
from lss.data.loader import Batch, Loader
from lss.parallel import HFLayout, Layout
from lss.train.metrics import truncate
from lss.train.start import load_start

FOLDER = "checkpoints"


def find_resumable(config: Config, out: Path) -> int | None:
    """The step that a run of this config in this folder goes on from, by what is seen without ranks; None for a new run.

    Raises:
        Refused: the folder holds a run of another model or other data, resuming is switched off, or its newest save is
            damaged in a way that shows without reading all of it.
    """
    folder = out / FOLDER
    if config.checkpoint.resume == "never" and saved_steps(folder):
        raise refuse("checkpoint.resume", "never", f"{out} holds a run already; choose another --out or 'auto'")
    newest = find_checkpoint(folder, fallback=config.checkpoint.fallback)
    if newest is None:
        return None
    refuse_other_run(config, newest.read_state(), out)
    return newest.step


def refuse_other_run(config: Config, state: dict[str, Any], out: Path) -> None:
    """Refuse to go on from a save of another model or other data; [train] and [optim] may have changed."""
    earlier, now, defaults = state.get("config", {}), config.to_dict(), Config().to_dict()
    for section in ("model", "data"):
        for key, value in now[section].items():
            before = earlier.get(section, {}).get(key, defaults[section][key])  # saved before there was the key
            if before != value:
                raise refuse(f"{section}.{key}", value, f"{out} holds a run made with {before}; choose another --out")
    digest = state.get("corpus", {}).get("digest")
    if digest not in (None, corpus_digest(config, out)):
        fit = f"its files are no longer those that the run in {out} has read; restore them or choose another --out"
        raise refuse("data.path", config.data.path or "''", fit)


class Saving:
    """Saves and resumes of one run. Every method is called by all ranks alike.

    Args:
        say: prints one line, on the rank that prints.
        facts: what state.json tells of the run besides: config, versions, corpus.

    Attributes:
        failed: how many saves have failed so far.
        skipped: how many steps the run that is gone on with had skipped.
    """

    def __init__(
        self,
        config: Config,
        mesh: DeviceMesh,
        out: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        layout: Layout | HFLayout,
        loader: Loader,
        *,
        facts: Callable[[], dict[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self._settings, self._config, self._out = config.checkpoint, config, out
        self._model, self._optimizer, self._layout, self._loader = model, optimizer, layout, loader
        self._facts, self.say = facts, say
        # one for the saver's thread, one for the loop: their calls must not mix
        self._control = control(mesh, "checkpoints")
        self._saver = Saver(
            out / FOLDER,
            layout,
            control(mesh, "save"),
            keep=self._settings.keep,
            keep_every=self._settings.keep_every,
            background=self._settings.background,
        )
        self._asked = -1  # the step last asked for, or resumed from, unless its save has failed
        self._last: Outcome | None = None
        self.failed = self.skipped = 0

    def resume(self) -> int:
        """Load the newest save, every byte of it checked; returns its step, 0 where there is none.

        Where there is none, the weights are those of checkpoint.start, if that names any.

        Raises:
            Refused: see `find_resumable` and `load_start`; the same on every rank, before anything is loaded.
        """
        newest = agree_on_checkpoint(self._out / FOLDER, self._control, fallback=self._settings.fallback, say=self.say)
        if newest is None:
            start = load_start(self._config, self._model, self._layout, self._control)
            if start is not None:
                self.say(f"weights of {start.path}")
            return 0
        if self._settings.resume == "never":
            raise refuse("checkpoint.resume", "never", f"{self._out} holds a run already; choose another --out or 'auto'")
        refuse_other_run(self._config, newest.read_state(), self._out)
        state = load_checkpoint(newest, self._model, self._optimizer, self._layout)
        self._loader.resume(newest.step, state["loader"])
        if state["layout"] == self._place():
            _restore_rng(state["ranks"][self._control.rank]["rng"])
        self._asked, self.skipped = newest.step, state.get("skipped", 0)
        return newest.step

    def probe(self) -> None:
        """Refuse a folder that cannot be written or that not all ranks see, before step 1."""
        probe_shared(self._out, self._control)

    def save(self, step: int, *, waited_for: bool = False) -> None:
        """Save `step`, once: a step that is saved, or being saved, is not saved again.

        In the background it returns at once, and `before_update` waits until the values are copied; how that save ended
        shows at the next one and in `finish`.

        Args:
            waited_for: no training goes on beside it, that it should give way to.

        Raises:
            Failed: a save has failed and checkpoint.on_error is "stop"; on every rank.
        """
        if step == self._asked:
            return
        self._settle()
        self._asked = step
        self._saver.start(step, self._model, self._optimizer, self._state(step), waited_for=waited_for)
        if not self._settings.background:
            self._settle()

    def before_update(self) -> None:
        """Wait until a save in the background has its values: weights and optimizer are about to change."""
        self._saver.copied()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            Failed: the save last asked for has failed, whatever checkpoint.on_error says; on every rank.
        """
        self._settle()
        if self._last is not None and self._last.reason:
            raise Failed(self._last.reason)

    def prove(self, step: int) -> Path:
        """Wait for the save of `step` and hold every byte of it against its digest; returns its folder.

        Raises:
            Failed: it has failed, or is not what was saved; on every rank.

        Collectives: one gather; the ranks share the files out.
        """
        self.finish()
        path = self._out / FOLDER / f"step_{step}"
        _, reason = check_together(path, self._control)
        if reason:
            raise Failed(reason)
        return path

    def abandon(self, seconds: float) -> None:
        """Give a save under way this long to end, without a word of how."""
        self._saver.wait(seconds)

    def _settle(self) -> None:
        outcome = self._saver.wait()
        if outcome is None:
            return
        self._last = outcome
        if not outcome.reason:
            return
        self.failed += 1
        self._asked = -1
        if outcome.lost or self._settings.on_error == "stop":
            raise Failed(outcome.reason)
        self.say(f"{outcome.reason.rstrip('.')}; saves that failed so far: {self.failed}.")

    def _place(self) -> dict[str, Any]:
        layout = self._layout
        return {"dp": layout.dp.size, "cp": layout.cp.size, "strategy": layout.strategy}

    def _state(self, step: int) -> dict[str, Any]:
        return self._facts() | {
            "stored": ["weights", "optimizer", "step of the schedule", "loader", "random states of torch, by rank"],
            "loader": self._loader.state(step),
            "layout": self._place(),
            "rank": {"rng": _rng()},
        }


def _rng() -> dict[str, str]:
    """This rank's random states of torch: of the CPU, and of its GPU where it has one in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _restore_rng(states: dict[str, str]) -> None:
    raw = {name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()}
    torch.set_rng_state(raw["cpu"])
    if "cuda" in raw and torch.cuda.is_available():
        torch.cuda.set_rng_state(raw["cuda"])


class SampleLog:
    """`DIR/samples.jsonl`: the split's samples that each step read, in the order of the step's slots.

    The ranks tell which they have read, so that what stands there is what was trained on.

    Args:
        last_step: rows after it are removed on opening, as in metrics.jsonl.

    Raises:
        Refused: the file cannot be written.
    """

    def __init__(self, out: Path, mesh: DeviceMesh, loader: Loader, *, last_step: int) -> None:
        self._control, self._loader, self._file = control(mesh, "samples"), loader, None
        if mesh.get_rank() == 0:
            path = out / "samples.jsonl"
            try:
                truncate(path, last_step)
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise Refused(f"{path}: cannot be written ({error.strerror}).") from error

    def write(self, step: int, batches: list[Batch]) -> None:
        """Write one step's row. Collectives: one gather of its sample numbers."""
        mine = [number for batch in batches for number in batch.sample_ids.tolist()]
        told = self._control.gather(json.dumps(mine))
        if self._file is not None:
            # ranks of one sequence group read the same samples; those of different groups different ones
            numbers = sorted({number for text in told for number in json.loads(text)})
            self._file.write(json.dumps({"step": step, "ids": [self._loader.sample(n) for n in numbers]}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
