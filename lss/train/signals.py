"""SIGTERM, SIGINT and SIGUSR1, from before torch is imported to the end.

Python runs a handler only between two of its own instructions, and a rank spends its life inside calls: it waits for other
ranks to come, for a device, for a transfer. So the handlers here do nothing; the number of the signal arrives at a thread
through a pipe, at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
# Where a launcher ends its ranks because one was refused, the others are about to say the same and are let do it.
GRACE = 0.3


# Who says which rank a process is, in the order in which `lss.mesh` asks; that imports torch, and comes too late here.
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def is_first_rank(environ: Mapping[str, str]) -> bool:
    """Whether this process is rank 0, or the only one."""
    return next((environ[name] for name in RANKS if environ.get(name)), "0") == "0"


def name_of(number: int) -> str:
    """"SIGTERM" and its like."""
    return signal.Signals(number).name


class Signals:
    """What this process was told by signals. A context; outside of the main thread it hears nothing.

    Until `begin` a signal to stop ends the process at once, since there is nothing to save. From then on it is noted:
    whoever runs the loop asks for it. The first signal to stop counts, any later one is the same.

    Args:
        say: whether to print a line where the process ends at once.

    Attributes:
        stop: the number of the signal to stop, 0 while there was none.
        before_leaving: called, with the signal's name and the exit status, before the process ends at once.
    """

    def __init__(self, say: bool = True) -> None:
        self.stop = 0
        self.before_leaving: Callable[[str, int], object] = lambda name, code: None
        self._say, self._save, self._begun = say, False, False
        self._lock = threading.Lock()
        self._earlier: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)  # the system writes to it from inside a handler
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in (*STOPPING, signal.SIGUSR1):
            self._earlier[number] = signal.signal(number, lambda number, frame: None)
        self._thread = threading.Thread(target=self._listen, args=(self._pipe[0],), name="lss signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pipe is None:
            return
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])  # the thread reads the end of it and ends
        self._thread.join()
        os.close(self._pipe[0])
        self._pipe = None

    def begin(self) -> None:
        """From here on there is something to lose: signals are noted."""
        with self._lock:
            self._begun = True

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def _listen(self, descriptor: int) -> None:
        while numbers := os.read(descriptor, 64):
            for number in numbers:
                self._got(number)

    def _got(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self._save = True
        elif number in STOPPING and not self.stop:
            with self._lock:
                self.stop = number
                if not self._begun:
                    self._leave(number)

    def _leave(self, number: int) -> None:
        name = name_of(number)
        if number == signal.SIGTERM:
            time.sleep(GRACE)
        try:
            self.before_leaving(name, 128 + number)
            if self._say:
                print(f"lss: stopped by {name} before the first step: nothing was trained yet.", file=sys.stderr, flush=True)
        finally:
            os._exit(128 + number)
