"""The losses of a whole text's tokens, put back into its order, in a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.config.errors import refuse
from lss.context_parallel import unshard
from lss.data.reader import IGNORE_INDEX, Batch
from lss.data.windows import WindowReader
from lss.parallel import layout_of

SUFFIXES = (".npy", ".jsonl")


def refuse_losses_file(path: Path) -> None:
    """Refuse a file that losses cannot be written to, before any are computed.

    Raises:
        Refused: another suffix, a folder that is not there or cannot be written to, or a folder of that name.
    """
    if path.suffix not in SUFFIXES:
        raise refuse("--per-token", path, f"use a name that ends in {' or '.join(SUFFIXES)}")
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise refuse("--per-token", path, "not a file in a folder that can be written to; give one")


class LossesFile:
    """Writes each token's loss in nats to `path`, on the first rank.

    `.npy`: float64, one number an item of the part, NaN for what is not counted (the first, for one). `.jsonl`: a line a
    counted item, {"token": its number in the part, "id": its id, "nats": its loss}. The file takes its name in `close`.

    Collectives: for each batch one all-gather of its losses over the cp ranks and one over the dp ranks.
    """

    def __init__(self, path: Path, reader: WindowReader, model: nn.Module, mesh: DeviceMesh) -> None:
        self._path, self._reader, self._mesh, self._layout = path, reader, mesh, layout_of(model)
        self._aside = path.with_name(f".{path.name}.writing")
        self._array: Any = None
        self._lines: Any = None
        if mesh.get_rank():
            return
        try:
            if path.suffix == ".npy":
                shape = (len(reader.split),)
                self._array = np.lib.format.open_memmap(self._aside, mode="w+", dtype=np.float64, shape=shape)
                self._array[:] = np.nan
            else:
                self._lines = self._aside.open("w", encoding="utf-8")
        except OSError as error:
            raise refuse("--per-token", path, f"cannot be written ({error.strerror})") from None

    def write(self, number: int, batch: Batch, losses: torch.Tensor | None) -> None:
        """Put the losses of batch `number`, (B, T) on each rank, into their places."""
        assert losses is not None
        assert batch.segment is not None
        labels = batch.labels.to(losses.device)
        # padding is cut off by unshard; what is not counted must not look like a loss of 0
        local = losses.double().masked_fill(labels == IGNORE_INDEX, torch.nan)
        whole = unshard(local, self._mesh, seg=batch.segment)
        rows = self._layout.dp.all_gather(whole.contiguous(), 0, "losses").wait()
        if self._array is None and self._lines is None:
            return
        values = rows.cpu().numpy()
        for place, row in enumerate(self._reader.rows_of(number)):
            for first, end, item in self._reader.places(row):
                self._put(item, values[place, first:end])

    def _put(self, item: int, nats: np.ndarray) -> None:
        if self._array is not None:
            self._array[item : item + len(nats)] = nats
            return
        ids = self._reader.split.read(item, item + len(nats)).tolist()
        for at, (name, value) in enumerate(zip(ids, nats.tolist(), strict=True)):
            if value == value:
                self._lines.write(json.dumps({"token": item + at, "id": name, "nats": value}) + "\n")

    def close(self) -> None:
        """End the file and give it its name."""
        if self._array is not None:
            self._array.flush()
            self._array = None
        elif self._lines is not None:
            self._lines.close()
        else:
            return
        self._aside.rename(self._path)
