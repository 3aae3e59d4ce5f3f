"""When the loop saves out of turn and when it stops: what one rank was told, all ranks do, after the same step."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from lss.checkpoint import saved_steps
from lss.comm import control
from lss.config.errors import Failed, Stopped
from lss.train.signals import Signals, name_of


class Stopping:
    """What the ranks agree on between two steps.

    Args:
        mesh: of all ranks.
        signals: what this process was told; None where nothing is listened to: no rank then asks the others.
        max_bad_steps: steps in a row without a finite loss and gradient after which the run fails.

    Attributes:
        stop: the signal to stop at, once the ranks have agreed on one; else 0.
        skipped, in_a_row: steps without an update, in all and up to now in a row.

    Collectives: each `agree` is one all-reduce of two int64, host to host.
    """

    def __init__(self, mesh: DeviceMesh, signals: Signals | None, max_bad_steps: int) -> None:
        self._mesh, self._signals, self._most = mesh, signals, max_bad_steps
        self.stop = self.skipped = self.in_a_row = 0

    def begin(self, at_once: bool) -> None:
        """The loop starts: signals now wait for the end of a step, of the second where not `at_once`, since the first
        compiles for minutes. Collectives: makes the ranks' group.
        """
        if self._signals is not None:
            control(self._mesh, "loop")
            if at_once:
                self._signals.begin()

    def agree(self, saves: bool = True) -> bool:
        """Whether any rank was told to stop (then `stop` says by what), or, where `saves`, to save now."""
        if self._signals is None:
            return False
        self._signals.begin()
        stop, save = control(self._mesh, "loop").largest(self._signals.stop, int(saves and self._signals.take_save()))
        self.stop = self.stop or stop
        return bool(self.stop or save)

    def agree_to_stop(self) -> bool:
        """The same of stopping alone; a save that was asked for stays asked for."""
        self.agree(saves=False)
        return bool(self.stop)

    def leave(self, step: int, saved: Path, say: bool) -> None:
        """Stop the run after this step, saved in `saved`, if the ranks have agreed to.

        Raises:
            Stopped: with what there is to say on the rank that says it.
        """
        if self.stop:
            text = f"stopped by {name_of(self.stop)} after step {step}, saved as {saved}; resume with the same command."
            raise Stopped(text if say else "", 128 + self.stop)

    def count(self, finite: bool, step: int) -> None:
        """Count a step that was taken or skipped; loss and norm are the same numbers on every rank, so all fail together.

        Raises:
            Failed: too many skipped in a row.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row >= self._most:
            raise Failed(
                f"loss or gradient was not finite in {self._most} steps in a row, up to step {step}; lower optim.lr, set "
                "optim.clip, or raise train.max_bad_steps."
            )


def newest_words(folder: Path) -> str:
    """What a run that ends unforeseen says of its saves, which are in `folder`."""
    steps = saved_steps(folder)
    return f"the newest save is step_{steps[0]}" if steps else "nothing was saved yet"
