"""What rank processes do in the tests of checkpoints."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import torch

import lss.checkpoint.digest as digest
import lss.checkpoint.files as files
import lss.checkpoint.save as save
from lss.checkpoint.layout import home_of, local_of
from lss.config.errors import Failed
from lss.parallel import full_state_dict
from lss.train.trainer import Trainer
from tests.distributed.pool import mesh
from tests.train.jobs import config_of


def trainer_of(ranks: int, out: str, overrides: list[str]) -> Trainer:
    config = config_of(ranks, *overrides)
    return Trainer(config, mesh(config.parallel.cp, config.parallel.dp), Path(out))


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and optimizer states, whole; states on the host as this rank's parts."""
    found = {f"weights {name}": tensor.clone() for name, tensor in full_state_dict(trainer.model).items()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state.get(home_of(trainer.optimizer, parameter), {}).items():
            found[f"{key} {name}"] = trainer.layout.whole(name, value).clone() if value.dim() else value.clone()
    return found


def steps(ranks: int, out: str, overrides: list[str], save_at: int, until: int):
    """From where the folder stands (a fresh run: 0) to `until`, saving at `save_at`: (from, losses, everything)."""
    torch.use_deterministic_algorithms(True)
    try:
        trainer = trainer_of(ranks, out, overrides)
        losses = []
        for step in range(trainer.done_steps + 1, until + 1):
            losses.append(trainer.train_step(step)["loss"])
            if step == save_at:
                trainer.save(step)
        trainer.finish_saves()
        return trainer.done_steps, losses, everything(trainer)
    finally:
        torch.use_deterministic_algorithms(False)


def slow_writes(seconds: float):
    """Delay every write of this rank; returns what undoes it."""
    original = files.write_bytes

    def slow(descriptor, data):
        time.sleep(seconds)
        original(descriptor, data)

    files.write_bytes = slow
    return lambda: setattr(files, "write_bytes", original)


def late_save(ranks: int, out: str, overrides: list[str]):
    """Steps go on while a delayed save of step 2 is written: what was held after step 2 and after step 4."""
    trainer = trainer_of(ranks, out, ["checkpoint.background=true", *overrides])
    for step in (1, 2):
        trainer.train_step(step)
    then, undo = everything(trainer), slow_writes(0.02)
    try:
        trainer.save(2)
        trainer.save(2)  # it is under way: nothing more is done
        for step in (3, 4):
            trainer.train_step(step)
        unfinished = not (Path(out) / "checkpoints" / "step_2").exists()
        trainer.finish_saves()
    finally:
        undo()
    return unfinished, then, everything(trainer)


def late_copy(ranks: int, out: str):
    """A save whose copies are late is waited for by the next update: what was held at the save and after the update."""
    trainer = trainer_of(ranks, out, ["checkpoint.background=true"])
    trainer.train_step(1)
    then, copy, updated = everything(trainer), save._copy, threading.Event()
    handle = trainer.optimizer.register_step_post_hook(lambda *_: updated.set())

    begun = []

    def late(to, source):
        begun.append(to)
        if len(begun) == 1:
            updated.wait(1.0)  # an update that does not wait comes first
        copy(to, source)

    save._copy = late
    try:
        trainer.save(1)
        returned_first = not trainer.saving._saver._copies.made
        trainer.train_step(2)
        trainer.finish_saves()
    finally:
        save._copy = copy
        handle.remove()
    return returned_first, then, everything(trainer)


def helped_copies(ranks: int, out: str):
    """A save whose thread gets no time: whether what waits for the copies makes them all, and before it got any."""
    trainer = trainer_of(ranks, out, ["checkpoint.background=true"])
    trainer.train_step(1)
    then, given, yield_cores, saver = everything(trainer), threading.Event(), save.yield_cores, trainer.saving._saver
    save.yield_cores = given.wait
    try:
        trainer.save(1)
        waiting = threading.Thread(target=saver.copied)
        waiting.start()
        until = time.monotonic() + 30
        while not saver._copies.made and time.monotonic() < until:
            time.sleep(0.01)
        found = saver._copies.made, given.is_set()
        given.set()
        waiting.join()
        trainer.train_step(2)
        trainer.finish_saves()
    finally:
        given.set()
        save.yield_cores = yield_cores
    return *found, then


def copies_under_way(ranks: int, out: str):
    """The update is in the midst of the last copy when the saving thread finds none left: what the save must hold."""
    trainer = trainer_of(ranks, out, ["checkpoint.background=true"])
    trainer.train_step(1)
    then, copy, yield_cores, midst = everything(trainer), save._copy, save.yield_cores, threading.Event()
    saver = trainer.saving._saver

    def slow(to, source):
        if not saver._copies._left:
            midst.set()
            time.sleep(1.0)  # a save that does not wait is written meanwhile
        copy(to, source)

    save._copy, save.yield_cores = slow, midst.wait
    try:
        trainer.save(1)
        trainer.train_step(2)
        trainer.finish_saves()
    finally:
        save._copy, save.yield_cores = copy, yield_cores
    return midst.is_set(), then


def policies(ranks: int, out: str, background: bool, waited_for: bool):
    """How the system schedules the threads that write and hash a save, and the one that trains, after it."""
    trainer, found = trainer_of(ranks, out, [f"checkpoint.background={str(background).lower()}"]), set()
    write, hashed = files.write_bytes, digest._hash

    def noted(of):
        def call(*args):
            found.add(os.sched_getscheduler(0))
            return of(*args)

        return call

    files.write_bytes, digest._hash = noted(write), noted(hashed)
    try:
        trainer.save(0, waited_for=waited_for)
        trainer.finish_saves()
    finally:
        files.write_bytes, digest._hash = write, hashed
    return found, os.sched_getscheduler(0)


def no_copies(ranks: int, out: str):
    """Host tensors that a synchronous save writes: whether each is the parameter's own memory."""
    trainer = trainer_of(ranks, out, [])
    own = {local_of(p).untyped_storage().data_ptr() for p in trainer.model.parameters()}
    job = trainer.saving._saver._collect(0, trainer.model, trainer.optimizer, {})
    return all(t.untyped_storage().data_ptr() in own for t in job.tensors["weights"].values())


def failing_saves(ranks: int, out: str, overrides: list[str], full: list[int]):
    """A run in which the last rank's disk is full (a planted error) at these saves: (why it failed, saves that failed)."""
    trainer = trainer_of(ranks, out, overrides)
    write, start = files.write_bytes, trainer.saving._saver.start

    def planted(step, *rest, **how):
        def full_disk(descriptor, data):
            raise OSError(28, "No space left on device")

        files.write_bytes = full_disk if step in full and trainer.mesh.get_rank() == ranks - 1 else write
        start(step, *rest, **how)

    trainer.saving._saver.start = planted
    reason = ""
    try:
        trainer.train()
    except Failed as failure:
        reason = str(failure)
    finally:
        files.write_bytes = write
    return reason, trainer.saving.failed
