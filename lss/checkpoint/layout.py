"""What a checkpoint needs to know of how a model lies on the ranks."""

from __future__ import annotations

from typing import Protocol

import torch

from lss.comm import Communicator


class TensorLayout(Protocol):
    """Tells parts of parameters from whole ones; `lss.parallel.Layout` is one.

    Attributes:
        all: the group of all ranks of the run.
    """

    all: Communicator

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The whole tensor of a parameter, its gradient or its optimizer state, on every rank."""
        ...

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of it."""
        ...
