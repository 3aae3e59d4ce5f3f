"""What a checkpoint needs to know of how a model lies on the ranks, and which rank writes which part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.segment import Piece

# A box is cut between two writers from this size on: smaller ones make shares no evener than headers do.
SPLIT_FROM = 4096


class TensorLayout(Protocol):
    """How parameters are cut over the ranks; `lss.parallel.Layout` is one.

    A parameter's gradient and its optimizer states of the same shape are cut as it is.

    Attributes:
        mesh: of all ranks of the run.
    """

    mesh: DeviceMesh

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter of the plain model."""
        ...

    def pieces(self, name: str) -> Sequence[Piece]:
        """The boxes of the whole parameter that this rank holds and where each lies in its part; padding is in none."""
        ...

    def holders(self, name: str) -> Sequence[int]:
        """The ranks that hold the same part of a parameter as this one, itself included, in the same order on each."""
        ...


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part as a plain tensor: a DTensor's local one, without a collective; any other as it is."""
    to_local = getattr(tensor, "to_local", None)
    return (tensor if to_local is None else to_local()).detach()


def home_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor:
    """What an optimizer keeps a parameter's state by: the parameter, or this rank's part of it as a copy on the host."""
    home = getattr(optimizer, "home", None)
    return parameter if home is None else home(parameter)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """An optimizer's name in checkpoints: its class's, or of one that computes the same."""
    return getattr(optimizer, "saved_as", type(optimizer).__name__)


def written_pieces(
    parameters: Iterable[tuple[str, nn.Parameter]], layout: TensorLayout, rank: int
) -> dict[str, list[Piece]]:
    """The boxes of each parameter that this rank writes: every element of the model has one writer.

    Ranks that hold the same parts share these out evenly by bytes, in the order of the parameters, and cut a box that
    lies across the end of a share along its first dimension. Nothing is sent: holders come to the same shares.
    """
    groups: dict[tuple[int, ...], list[tuple[str, Piece, int]]] = {}
    for name, parameter in parameters:
        group = groups.setdefault(tuple(layout.holders(name)), [])
        group += [(name, piece, piece.elements * parameter.element_size()) for piece in layout.pieces(name)]
    mine: dict[str, list[Piece]] = {}
    for holders, boxes in groups.items():
        share = max(1, -(-sum(size for _, _, size in boxes) // len(holders)))
        done = 0
        for name, piece, size in boxes:
            for writer, box in _cut(piece, size, done, share):
                if holders[writer] == rank:
                    mine.setdefault(name, []).append(box)
            done += size
    return mine


def _cut(piece: Piece, size: int, done: int, share: int) -> list[tuple[int, Piece]]:
    """A box of `size` bytes that comes after `done` others, between the writers whose shares it lies in."""
    if not size:
        return []
    first, last = done // share, (done + size - 1) // share
    if first == last or size < SPLIT_FROM or piece.size[0] == 1:
        return [(first, piece)]
    edges = [round((k * share - done) * piece.size[0] / size) for k in range(first + 1, last + 1)]
    edges = [0, *edges, piece.size[0]]
    return [(first + k, piece.rows(a, b)) for k, (a, b) in enumerate(pairwise(edges)) if a < b]
