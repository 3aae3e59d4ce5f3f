"""A run's `checkpoints` folder: which saves it has, which is the newest good one, which go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lss.checkpoint.files import flush_folder, write_file
from lss.checkpoint.manifest import STATE, STEP_NAME, Checkpoint, open_checkpoint
from lss.comm import Control
from lss.config.errors import Refused

LATEST = "latest"
FALLBACK = "checkpoint.fallback=true takes the next older good one"


def saved_steps(folder: Path) -> list[int]:
    """The steps saved in a run's `checkpoints` folder, the newest first; a link is none."""
    found = [p for p in folder.glob("step_*") if STEP_NAME.fullmatch(p.name) and not p.is_symlink() and p.is_dir()]
    return sorted((int(p.name[5:]) for p in found), reverse=True)


def find_checkpoint(folder: Path, *, fallback: bool = False) -> Checkpoint | None:
    """The newest save of a run by its manifest and sizes, without reading its tensors; None where there is none.

    Raises:
        Refused: the newest is damaged, or with `fallback` all are.
    """
    refusal: Refused | None = None
    for step in saved_steps(folder):
        try:
            checkpoint = open_checkpoint(folder / f"step_{step}")
            checkpoint.read_state()
            return checkpoint
        except Refused as error:
            refusal = refusal or error
            if not fallback:
                break
    if refusal is not None:
        raise _damaged(str(refusal), fallback)
    return None


def agree_on_checkpoint(
    folder: Path, control: Control, *, fallback: bool, say: Callable[[str], None]
) -> Checkpoint | None:
    """The newest save of a run, every byte of it checked: ranks share out the files, and all come to the same answer.

    Args:
        fallback: pass over damaged saves, newest first. Those passed over are renamed to `step_N.damaged`, so that they
            are not taken for the newest again.
        say: called with one sentence for each that was passed over, on every rank.

    Returns:
        None where nothing was saved.

    Raises:
        Refused: the newest is damaged, or all are; or ranks see different folders. The same on every rank.

    Collectives: two gathers for each save that is looked at, over `control`.
    """
    steps = json.loads(control.gather(json.dumps(saved_steps(folder)))[0])
    damaged: list[tuple[int, str]] = []
    for step in steps:
        checkpoint, reason = check_together(folder / f"step_{step}", control)
        if checkpoint is not None:
            for other, why in damaged:
                say(f"{why.rstrip('.')}; going on from step {step} and keeping the damaged one as step_{other}.damaged.")
                if control.rank == 0:
                    _set_aside(folder / f"step_{other}")
            control.gather("")  # nobody looks at the folder again before the names are changed
            return checkpoint
        damaged.append((step, reason))
        if not fallback:
            break
    if damaged:
        raise _damaged(damaged[0][1], fallback)
    return None


def _damaged(reason: str, fallback: bool) -> Refused:
    hint = "no older checkpoint of the run is good; choose another --out" if fallback else FALLBACK
    return Refused(f"{reason.rstrip('.')}; {hint}.")


def check_together(path: Path, control: Control, kind: str = "") -> tuple[Checkpoint | None, str]:
    """Check every byte of a save, its files shared out over the ranks; returns it, or None and what is amiss.

    Args:
        kind: "weights" where the optimizer's state is not going to be read; state.json is checked always.

    Collectives: one gather over `control`.
    """
    checkpoint, reason = None, ""
    try:
        checkpoint = open_checkpoint(path)
        # the largest first, dealt out in turn
        files = {name: facts for name, facts in checkpoint.files.items() if name.startswith(kind)}
        names = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        for name in {*names[control.rank :: control.size], STATE}:
            checkpoint.check_file(name)
        checkpoint.read_state()
    except Refused as error:
        reason = str(error)
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror})."
    told = control.gather(json.dumps({"reason": reason, "digest": checkpoint.digest if checkpoint else ""}))
    answers = [json.loads(text) for text in told]
    reason = next((answer["reason"] for answer in answers if answer["reason"]), "")
    if not reason and len({answer["digest"] for answer in answers}) > 1:
        reason = f"{path}: ranks see different folders of this name; put the run on a file system that all hosts share."
    return (None, reason) if reason else (checkpoint, "")


def _set_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
    flush_folder(path.parent)


# -- what the first rank does around a save ------------------------------------------------------------------------------


def writing_folder(path: Path) -> Path:
    """Where a save is written before it takes its name."""
    return path.with_name(f".{path.name}.writing")


def remove_leftovers(folder: Path) -> None:
    """Remove what saves that did not end have left."""
    for leftover in (*folder.glob(".step_*.writing"), *folder.glob(".step_*.removing")):
        shutil.rmtree(leftover, ignore_errors=True)


def commit(path: Path) -> None:
    """Give a folder that is written and flushed its name, then point `latest` to it."""
    pointer = path.with_name(f".{LATEST}.writing")
    write_file(pointer, f"{path.name}\n".encode())
    flush_folder(writing_folder(path))
    remove(path)  # the same step again, after a resume from an earlier one
    writing_folder(path).rename(path)
    flush_folder(path.parent)
    os.replace(pointer, path.with_name(LATEST))
    flush_folder(path.parent)


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep` saves and, unless it is 0, those of every step that `keep_every` divides."""
    for step in saved_steps(folder)[keep:]:
        if not keep_every or step % keep_every:
            remove(folder / f"step_{step}")


def remove(path: Path) -> None:
    """Remove a save, of which no part keeps its name: a stop on the way leaves a leftover, not a damaged save."""
    if path.exists():
        away = path.with_name(f".{path.name}.removing")
        shutil.rmtree(away, ignore_errors=True)
        path.rename(away)
        shutil.rmtree(away)


def probe_shared(folder: Path, control: Control) -> None:
    """Refuse a folder that cannot be written, or that not all ranks see; makes it where it is missing.

    Raises:
        Refused: on every rank, the same sentence.

    Collectives: three gathers over `control`.
    """
    probe, token, reason = folder / ".probe", os.urandom(8).hex(), ""
    if control.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(probe, token.encode())
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); choose another --out"
    told = json.loads(control.gather(json.dumps([token, reason]))[0])
    if not told[1]:
        try:
            seen = probe.read_text()
        except OSError:
            seen = ""
        if seen != told[0]:
            reason = f"rank {control.rank} does not see what rank 0 writes there; choose one that all hosts share"
    reason = next((text for text in control.gather(reason) if text), "")
    if control.rank == 0:
        with suppress(OSError):  # the folder may be none
            probe.unlink()
    if reason:
        raise Refused(f"--out={folder}: {reason}.")
