"""Texts that ranks tell one another; what torch sends as objects would be unpickled by who receives it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

_LENGTH = 8  # bytes in front of a text, that tell how many are its own


def pack(raw: bytes, longest: int) -> torch.Tensor:
    """A text's bytes behind their number, filled up to those of the longest: uint8 on the CPU."""
    return torch.frombuffer(bytearray(len(raw).to_bytes(_LENGTH, "little") + raw.ljust(longest, b"\0")), dtype=torch.uint8)


def unpack(parts: Sequence[torch.Tensor]) -> list[str]:
    """The texts that were packed."""
    packed = [bytes(part.tolist()) for part in parts]
    return [raw[_LENGTH : _LENGTH + int.from_bytes(raw[:_LENGTH], "little")].decode() for raw in packed]


def gather_texts(text: str, group: dist.ProcessGroup | None, device: torch.device) -> list[str]:
    """Every rank's text, by rank of the group.

    Collectives: one all-reduce of one number, one all-gather of the longest text; not counted, since they belong to no step.
    """
    raw = text.encode()
    longest = torch.tensor([len(raw)], dtype=torch.int64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    mine = pack(raw, int(longest)).to(device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return unpack(parts)
