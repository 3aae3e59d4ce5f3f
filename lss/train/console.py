"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

# Plain lines: about this many in a run, and one at least every so many seconds of a slow one.
PLAIN_LINES = 20
PLAIN_SECONDS = 30.0


def summary(row: dict[str, Any]) -> str:
    """The numbers of one step in a line."""
    loss = row["loss"]
    memory = row["peak_memory_bytes"] / 2**30
    text = f"loss {loss:.4f} ({loss / math.log(2):.3f} bits)  {row['tokens_per_s']:,.0f} tokens/s  {memory:.2f} GiB"
    return text if row["mfu"] is None else f"{text}  mfu {row['mfu']:.1%}"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60:,}:{minutes % 60:02}:{seconds:02}"


class TrainConsole:
    """Shows a run's progress.

    Args:
        total_steps: the last step.
        first_step: the step that comes first, after a resume not 1.
        stream: where to write; standard output by default. A terminal gets a bar, anything else plain lines.
    """

    def __init__(self, total_steps: int, first_step: int, *, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False)
        self._total, self._first = total_steps, first_step
        self._every = max(1, (total_steps - first_step + 1) // PLAIN_LINES)
        self._said = time.monotonic()
        self._progress: Progress | None = None
        self._task: Any = None

    def start(self, header: Sequence[tuple[str, str]]) -> None:
        """Print what is about to run."""
        # plain lines, not a table of rich: that cuts long values off at the width, 80 in a pipe
        width = max((len(name) for name, _ in header), default=0)
        for name, value in header:
            self.note(f"{name:<{width}}  {value}")
        if self._console.is_terminal:
            self._progress = self._bar()
            self._progress.start()
            self._task = self._progress.add_task("", total=self._total, completed=self._first - 1)
            # a run that fails never comes to finish(), and the bar has hidden the terminal's cursor
            atexit.register(self.finish)

    def _bar(self) -> Progress:
        # on a narrow terminal the numbers shrink from the right; where the run stands and when it ends stay
        steps = Column(no_wrap=True, min_width=2 * len(str(self._total)) + 1)
        return Progress(
            MofNCompleteColumn(table_column=steps),
            BarColumn(bar_width=12),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=7)),
            console=self._console,
        )

    def step(self, row: dict[str, Any]) -> None:
        """Show one step's row."""
        step = row["step"]
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=summary(row))
            return
        now = time.monotonic()
        due = (step - self._first) % self._every == 0 or step == self._total or now - self._said >= PLAIN_SECONDS
        if due:
            self._said = now
            left = duration((self._total - step) * row["step_time_s"])
            self.note(f"step {step}/{self._total}  {summary(row)}  {left} left")

    def evaluation(self, step: int, nats: float, bits: float, item: str = "byte") -> None:
        """Show a held-out loss."""
        self.note(f"step {step}/{self._total}  held-out {nats:.4f} nats, {bits:.3f} bits per {item}")

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one, as it is: brackets are no markup, and nothing is cut off."""
        self._console.print(text, soft_wrap=True, markup=False, emoji=False)

    def finish(self, lines: Sequence[str] = ()) -> None:
        """End the bar and print the last lines."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            atexit.unregister(self.finish)
        for line in lines:
            self.note(line)


class SilentConsole(TrainConsole):
    """The same for ranks that show nothing."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def start(self, header: Sequence[tuple[str, str]]) -> None:
        """Nothing."""

    def step(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def make_console(
    enabled: bool, total_steps: int, first_step: int, *, stream: TextIO | None = None
) -> TrainConsole:
    """A console for the first rank, a silent one for the others."""
    return TrainConsole(total_steps, first_step, stream=stream) if enabled else SilentConsole()
