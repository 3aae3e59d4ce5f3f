"""Keys and values of the tokens so far, of which every rank holds its own part, for good."""

from __future__ import annotations

from bisect import bisect_left

import torch

from lss.segment import Segment


class SegmentedCache:
    """This rank's keys and values of a prompt that is cut over ranks, and of the tokens that came behind it.

    A new token's go to the rank that holds fewest, the first of these, so that all come to hold equally many, to one. What
    each rank holds is known to all by arithmetic; nothing moves. A rank's tokens lie in the order of the sequence.

    Args:
        segment: of the prompt, on this rank.
        layers: calls of attention in a pass.
        most: how many tokens may come.

    Attributes:
        length: tokens of the sequence so far, those of all ranks.
        counts: how many of them each rank holds.

    Memory: 2 layers B (S + most) / cp K H elements, rounded up to a token.
    """

    def __init__(self, segment: Segment, layers: int, most: int, device: torch.device) -> None:
        self.rank, self.length = segment.rank, segment.seq_len
        self.counts = [segment.peer(rank).true_len for rank in range(segment.cp)]
        runs = sorted(segment.local_runs, key=lambda run: run[2])
        index = [torch.arange(start, stop) for start, stop, _, _ in runs]
        self._index = torch.cat(index).to(device) if index else torch.empty(0, dtype=torch.int64, device=device)
        self._places = [place for _, _, start, stop in runs for place in range(start, stop)]
        self._room = self._room_for(most)
        self._device_places = torch.zeros(self._room, dtype=torch.int64, device=device)
        self._device_places[: len(self._places)] = torch.tensor(self._places, dtype=torch.int64)
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers
        self._holds = False  # whether the last token is this rank's

    def _room_for(self, most: int) -> int:
        counts = list(self.counts)
        for _ in range(most):
            counts[counts.index(min(counts))] += 1
        return counts[self.rank]

    @property
    def bytes(self) -> int:
        """What this rank's keys and values take, room for those to come included."""
        return sum(x.numel() * x.element_size() for pair in self._layers if pair is not None for x in pair)

    def fill(self, layer: int, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> None:
        """Keep this rank's keys and values of the prompt, padding left out."""
        kept = []
        for x in (k_BTKH, v_BTKH):
            room = x.new_empty(x.shape[0], self._room, *x.shape[2:])
            room[:, : len(self._index)] = x[:, self._index]
            kept.append(room)
        self._layers[layer] = kept[0], kept[1]

    def advance(self) -> int:
        """One more token: decide whose it is; returns its place."""
        place, owner = self.length, self.counts.index(min(self.counts))
        self._holds = owner == self.rank
        self.counts[owner] += 1
        self.length += 1
        if self._holds:
            self._device_places[len(self._places)] = place
            self._places.append(place)
        return place

    def append(self, layer: int, k_B1KH: torch.Tensor, v_B1KH: torch.Tensor) -> None:
        """Keep the last token's keys and values, where it is this rank's."""
        if not self._holds:
            return
        pair, at = self._layers[layer], len(self._places) - 1
        assert pair is not None
        for room, x in zip(pair, (k_B1KH, v_B1KH), strict=True):
            room[:, at] = x[:, 0]

    def visible(self, layer: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values (B, T', K, H) and places (T',) of this rank's tokens that the sequence's last token sees."""
        pair = self._layers[layer]
        assert pair is not None
        seen = slice(0 if window is None else bisect_left(self._places, self.length - window), len(self._places))
        return pair[0][:, seen], pair[1][:, seen], self._device_places[seen]
