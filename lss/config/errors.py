"""The one exception for input that cannot be honoured.

Every refusal of the library is one sentence that names the setting, its value and what would fit. The command
line prints the sentence and exits with status 2; from Python it is a `ValueError`.
"""

from __future__ import annotations


class Refused(ValueError):
    """Input that the library will not compute with; its text is one sentence meant for the user.

    Raised before step 1 and before anything is written, so that nothing is lost. Subclasses `ValueError`, which is
    what callers of the Python functions expect for a bad argument.
    """


class SaidElsewhere(Refused):
    """A refusal that another rank of the run tells the user; this one only ends, with the same status."""


class Failed(RuntimeError):
    """A run that cannot go on through no fault of its input; its text is one sentence, the exit status 1."""


class FailedElsewhere(Failed):
    """A failure that another rank of the run tells the user; this one only ends, with the same status."""


class Stopped(Exception):
    """A run that was told to stop and did, in order; its text is what to say, empty where another rank says it.

    Args:
        code: the exit status, 128 + the signal's number.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def refuse(setting: str, value: object, fit: str) -> Refused:
    """Build the refusal `setting=value: fit`.

    `fit` says what is wrong and what would do, in plain words, without a full stop. Use as `raise refuse(...)`.
    """
    return Refused(f"{setting}={value}: {fit}.")
