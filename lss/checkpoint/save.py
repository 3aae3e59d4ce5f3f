"""Writing checkpoints: every rank its share, aside, and a name only for what is whole.

A save is begun and then waited for. A thread writes the tensors, hashes and flushes them, agrees with the other ranks' and
commits. A synchronous save is one waited for at once. One in the background first copies the tensors to host memory that
is the save's own: a GPU's in the order of its stream, a host's by the thread, beside the next forward and backward, which
change none of them; `copied` is waited for before the update, which does.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lss.checkpoint.digest import PieceDigest, hashers, yield_cores
from lss.checkpoint.files import NAMES, flush_folder, write_file, write_tensors
from lss.checkpoint.find import commit, prune, remove_leftovers, writing_folder
from lss.checkpoint.layout import TensorLayout, home_of, local_of, name_of, written_pieces
from lss.checkpoint.manifest import FORMAT, KINDS, MANIFEST, STATE, file_facts, render, tensor_file, tensor_key
from lss.checkpoint.quantized import parts_of
from lss.comm import Control


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank.

    Attributes:
        step: the step saved.
        path: its folder.
        reason: why it could not be saved, one sentence; "" where it could.
        lost: the ranks could not agree any more; this rank alone may know of it.
    """

    step: int
    path: Path
    reason: str = ""
    lost: bool = False


class _Copies:
    """Tensors of the host that a save has still to copy. Several threads make the copies together, each one at a time."""

    def __init__(self) -> None:
        self._left: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._undone = 0
        self._why: Exception | None = None
        self._changed = threading.Condition()

    @property
    def made(self) -> bool:
        """Whether every copy has been made, and not only begun."""
        return not self._undone

    def add(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """One more, before any is made."""
        self._left.append((to, source))
        self._undone += 1

    def make(self) -> None:
        """Make those that nobody has begun, and wait for the others.

        Raises:
            Exception: that with which a copy ended, here or in another thread.
        """
        while True:
            with self._changed:
                if not self._left:
                    break
                to, source = self._left.pop()
            try:
                _copy(to, source)
            except Exception as error:
                self._why = error
            finally:
                with self._changed:
                    self._undone -= 1
                    self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: self.made)
        if self._why is not None:
            raise self._why


@dataclass
class _Job:
    """What one save writes: tensors of the host by their names in the file, what the manifest says of them, the state."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    entries: dict[str, dict[str, dict[str, Any]]]
    state: dict[str, Any]
    ready: Any = None  # on a GPU: when the copies have come
    yields: bool = False  # training comes first
    copies: _Copies = field(default_factory=_Copies)

    @property
    def bytes(self) -> int:
        """Bytes of this rank's tensors."""
        return sum(t.numel() * t.element_size() for kind in self.tensors.values() for t in kind.values())


class Saver:
    """Saves a model and its optimizer into a run's `checkpoints` folder, sharded over the ranks. All ranks call alike.

    Args:
        folder: where `step_N` and `latest` go.
        layout: how the model lies on the ranks.
        control: what the ranks agree over; the saver's own, since its thread calls it.
        keep: how many of the newest saves stay; older ones go after a newer one is complete.
        keep_every: saves of steps that this divides stay for ever; 0 for none.
        background: copy, and write while the caller goes on; `copied` must be called before weights or optimizer change.
            Without it a host's tensors are written from where they lie, and `start` must be followed by `wait` before.

    Memory: in the background, this rank's share in host memory (pinned for a GPU's), kept from save to save.
    """

    def __init__(
        self,
        folder: Path,
        layout: TensorLayout,
        control: Control,
        *,
        keep: int,
        keep_every: int = 0,
        background: bool = False,
    ) -> None:
        self.folder, self._layout, self._control = folder, layout, control
        self._keep, self._keep_every, self._background = keep, keep_every, background
        self._held: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._copies = _Copies()

    def start(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *,
        waited_for: bool = False,
    ) -> None:  # fmt: skip
        """Begin to save as `step_N` what model and optimizer hold now.

        Args:
            state: JSON values stored in state.json, the first rank's beside step and optimizer. `rank` in it is gathered:
                each rank's under `ranks`.
            waited_for: at once, also where saves are in the background: the threads do not leave the cores to whatever else
                wants them, since other work of a crowded host would then hold it up.

        Collectives: none here; the thread gathers four texts over `control`.
        """
        assert self._thread is None, "the save before has not been waited for"
        job = self._collect(step, model, optimizer, dict(state))
        job.yields = self._background and not waited_for
        self._outcome, self._copies = None, job.copies
        # a daemon: a run that fails must not wait for a save that cannot end
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save of step {step}", daemon=True)
        self._thread.start()

    def copied(self) -> None:
        """Wait until a save in the background has the values of its step; weights and optimizer may change from then on.

        What its thread, which leaves the cores to training, has not copied yet is copied here.
        """
        if self._thread is not None:
            self._copies.make()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait for the save under way; returns how it ended, None where there is none or time is up."""
        if self._thread is None:
            return None
        self._thread.join(timeout)
        if self._thread.is_alive():
            return None
        self._thread = None
        return self._outcome

    # -- what is saved -----------------------------------------------------------------------------------------------

    def _collect(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> _Job:
        parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        shares = written_pieces(parameters, self._layout, self._control.rank)
        job, scalars = _Job(step, {k: {} for k in KINDS}, {k: {} for k in KINDS}, state), {}
        for name, parameter in parameters:
            part = local_of(parameter)
            tensors = {("weights", name): part}
            for key, value in optimizer.state.get(home_of(optimizer, parameter), {}).items():
                value = local_of(value) if torch.is_tensor(value) else value
                if torch.is_tensor(value) and value.dim() > 0 and value.shape == part.shape:
                    tensors |= {("optimizer", f"{name}/{title}"): x for title, x in parts_of(key, value).items()}
                else:
                    scalars[f"{name}/{key}"] = float(value)
            for (kind, title), tensor in tensors.items():
                self._add(job, kind, title, tensor, self._layout.whole_shape(name), shares.get(name, ()))
        job.state |= {"optimizer": name_of(optimizer), "optimizer_scalars": scalars}
        if any(t.is_cuda for t in self._held.values()) or next(model.parameters()).is_cuda:
            job.ready = torch.cuda.Event()
            job.ready.record()
        return job

    def _add(self, job: _Job, kind: str, title: str, tensor: torch.Tensor, shape: tuple[int, ...], pieces: Any) -> None:
        for piece in pieces:
            key = tensor_key(title, shape, piece.at, piece.size)
            entry = job.entries[kind].setdefault(title, {"dtype": NAMES[tensor.dtype], "shape": list(shape), "pieces": []})
            file = tensor_file(kind, self._control.rank, self._control.size)
            entry["pieces"].append({"file": file, "key": key, "at": list(piece.at), "size": list(piece.size)})
            job.tensors[kind][key] = self._host(job, f"{kind} {key}", tensor[piece.slices()])

    def _host(self, job: _Job, place: str, box: torch.Tensor) -> torch.Tensor:
        """Where the values of now are, or will be once `job.copies` are done, in host memory."""
        if not self._background and not box.is_cuda:
            return box
        held = self._held.get(place)
        if held is None or held.shape != box.shape or held.dtype != box.dtype:
            held = torch.empty(box.shape, dtype=box.dtype, pin_memory=box.is_cuda)
            self._held[place] = held
        if box.is_cuda:
            # in the order of its stream, so that the next update comes after
            held.copy_(box, non_blocking=True)
        else:
            job.copies.add(held, box)
        return held

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self, job: _Job) -> None:
        path = self.folder / f"step_{job.step}"
        try:
            if job.yields:
                yield_cores()
            job.copies.make()
            if job.ready is not None:
                job.ready.synchronize()
            self._outcome = Outcome(job.step, path, self._save(job, path))
        except Exception as error:  # what the others' end does to a gather has many types
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = f"{path}: the checkpoint was not saved, the ranks lost one another ({why})."
            self._outcome = Outcome(job.step, path, reason, lost=True)

    def _save(self, job: _Job, path: Path) -> str:
        """Write and agree; returns why it failed, "" where it did not. Every rank makes the same gathers."""
        first, reason, free = self._control.rank == 0, "", 0
        if first:
            try:
                free = _prepare(path)
            except Exception as error:
                reason = _why(error)
        told = self._gather({"reason": reason, "bytes": job.bytes, "free": free})
        needed, free, reason = sum(one["bytes"] for one in told), told[0]["free"], told[0]["reason"]
        files: dict[str, Any] = {}
        if not reason:
            try:
                files = self._write(job, writing_folder(path))
            except Exception as error:
                reason = _why(error)
        told = self._gather({"reason": reason, "files": files, "tensors": job.entries, "rank": job.state.pop("rank", None)})
        reason = next((one["reason"] for one in told if one["reason"]), "")
        if first and not reason:
            try:
                self._commit(job, path, told)
            except Exception as error:
                reason = _why(error)
        if first and reason:
            # it must not hold the space that the next try needs
            shutil.rmtree(writing_folder(path), ignore_errors=True)
        reason = self._gather({"reason": reason})[0]["reason"]
        if not reason:
            return ""
        return (f"{path}: the checkpoint could not be written ({reason}); it needs {needed:,} bytes and {free:,} were free, "
                "and earlier checkpoints are as they were.")  # fmt: skip

    def _gather(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self._control.gather(json.dumps(mine))]

    def _write(self, job: _Job, aside: Path) -> dict[str, Any]:
        rank, world = self._control.rank, self._control.size
        shares = {tensor_file(kind, rank, world): tensors for kind, tensors in job.tensors.items() if tensors}
        # both files at once, and each in pieces: one core hashes about as fast as a good disk writes, two are faster
        writing = ThreadPoolExecutor(len(KINDS), initializer=yield_cores if job.yields else None)
        with hashers(yielding=job.yields) as pool, writing as writers:
            written = {name: writers.submit(write_tensors, aside / name, tensors, PieceDigest(pool))
                       for name, tensors in shares.items()}  # fmt: skip
        return {name: file_facts(*done.result()) for name, done in written.items()}

    def _commit(self, job: _Job, path: Path, told: list[dict[str, Any]]) -> None:
        aside = writing_folder(path)
        state = {"format": FORMAT, "step": job.step} | job.state | {"ranks": [one["rank"] for one in told]}
        size, digest = write_file(aside / STATE, json.dumps(state, indent=1).encode() + b"\n")
        files: dict[str, Any] = {STATE: {"bytes": size, "sha256": digest}}
        tensors: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for one in told:
            files |= one["files"]
            for kind in KINDS:
                for title, entry in one["tensors"][kind].items():
                    known = tensors[kind].setdefault(title, entry | {"pieces": []})
                    known["pieces"] = known["pieces"] + entry["pieces"]
        content = {"format": FORMAT, "step": job.step, "world": self._control.size, "files": files, "tensors": tensors}
        write_file(aside / MANIFEST, render(content))
        commit(path)
        prune(self.folder, self._keep, self._keep_every)


@torch.no_grad()
def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    to.copy_(source)


def _prepare(path: Path) -> int:
    """Make the folder to write into; returns the bytes free for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    free = shutil.disk_usage(path.parent).free
    writing_folder(path).mkdir()
    flush_folder(path.parent)
    return free


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
