"""Faults that ranks do to themselves at an exact place; `plant` is the hook, and PLANT in a rank's environment says which.

PLANT is JSON: {"rank", "place", "step", "do", ...}, done once, by that rank, at that place of that step.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def plant() -> None:
    """Wrap the places of this rank."""
    wanted = json.loads(os.environ.get("PLANT", "{}"))
    if not wanted:
        return
    import lss.train.trainer as trainer

    now = {"step": 0, "done": False}

    def here(place: str) -> None:
        mine = wanted.get("rank") in (None, int(os.environ["RANK"]))
        if mine and wanted["place"] == place and not now["done"] and now["step"] >= wanted.get("step", 0):
            now["done"] = not wanted.get("again")
            _do(wanted)
        elif not mine and wanted.get("others_sleep") and wanted["place"] == place and now["step"] == wanted.get("step"):
            time.sleep(wanted["others_sleep"])

    def before(function: Callable[..., Any], place: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            if place == "step":
                now["step"] = args[1]
            here(place)
            return function(*args, **more)

        return wrapped

    import lss.train.evaluate as evaluate
    import lss.train.steps as steps

    trainer.find_model = before(trainer.find_model, "build")
    trainer.Trainer.train_step = before(trainer.Trainer.train_step, "step")
    steps.forward_loss = before(steps.forward_loss, "forward")
    evaluate.forward_loss = before(evaluate.forward_loss, "eval")
    trainer.Trainer.save = before(trainer.Trainer.save, "save")
    trainer.clip_grad_norm_ = before(trainer.clip_grad_norm_, "clip")


def _do(wanted: dict[str, Any]) -> None:
    what, seconds = wanted["do"], wanted.get("seconds", 1.3)
    if what == "sleep":
        if "mark" in wanted:
            Path(wanted["mark"]).write_text("")
        time.sleep(seconds)
    elif what == "hold":  # Python's lock, which a foreign call keeps unless it is careful
        ctypes.PyDLL(None).sleep(int(seconds))
    elif what == "raise":
        raise ValueError("planted")
    elif what == "out of memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB.")
    elif what == "limit":  # what the process holds now, and a little
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (8 << 20), resource.RLIM_INFINITY))
    elif what in ("SIGKILL", "SIGSTOP"):
        # slept first, so that the last beat tells of just this place
        if wanted.get("later"):  # it goes on, into the collective, and is hit there
            threading.Timer(seconds, os.kill, (os.getpid(), signal.Signals[what])).start()
        else:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.Signals[what])


def poison() -> None:
    """An infinity in one rank's gradients at the steps that POISON names, and digests of its weights after each step."""
    import hashlib

    import torch

    import lss.train.trainer as trainer

    bad, rank = json.loads(os.environ["POISON"]), int(os.environ["RANK"])
    place = os.environ["POISON_AT"]
    original, accumulate = trainer.Trainer.train_step, trainer.accumulate_gradients
    now = {"step": 0}

    def train_step(self: Any, step: int) -> Any:
        now["step"] = step
        try:
            return original(self, step)
        finally:
            digest = hashlib.sha256()
            for parameter in self.model.parameters():
                digest.update(parameter.detach().numpy().tobytes())
            with Path(f"{self.out}.{rank}.digests").open("a") as file:
                file.write(f"{step} {digest.hexdigest()}\n")

    def accumulate_gradients(model: Any, batches: Any, config: Any, *, step: int) -> Any:
        handles = []
        if rank == 1 and step in bad:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            if place == "gradient":
                handles.append(parameter.register_hook(lambda grad: torch.full_like(grad, float("inf"))))
            else:
                handles.append(model.final_norm.register_forward_hook(lambda module, args, out: out * float("nan")))
        try:
            return accumulate(model, batches, config, step=step)
        finally:
            for handle in handles:
                handle.remove()

    trainer.Trainer.train_step = train_step
    trainer.accumulate_gradients = accumulate_gradients
