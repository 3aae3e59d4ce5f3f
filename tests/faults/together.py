"""Cases that mostly wait, run side by side: the first to be asked for starts all that this session will ask for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest


class Together:
    """Runs `function(case, folder)` for every collected test that has a parameter `case`, a few at a time."""

    def __init__(self, request: pytest.FixtureRequest, folder: Any, function: Callable[..., Any], at_once: int) -> None:
        names: Sequence[Hashable] = [
            item.callspec.params["case"]
            for item in request.session.items
            if item.path == request.path and "case" in getattr(getattr(item, "callspec", None), "params", {})
        ]
        self._pool = ThreadPoolExecutor(at_once)
        self._results: dict[Hashable, Future] = {
            name: self._pool.submit(function, name, folder / str(number)) for number, name in enumerate(names)
        }

    def __call__(self, case: Hashable) -> Any:
        """The case's result, or what it raised."""
        return self._results[case].result(timeout=280)

    def end(self) -> None:
        """Start no more."""
        self._pool.shutdown(cancel_futures=True)
