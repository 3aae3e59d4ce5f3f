"""Texts that the ranks of a group tell one another; what torch sends as objects would be unpickled by who receives it."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_texts(text: str, group: dist.ProcessGroup | None, device: torch.device) -> list[str]:
    """Every rank's text, by rank of the group.

    Collectives: one all-reduce of one number, one all-gather of the longest text; not counted, since they belong to no step.
    """
    raw = text.encode()
    longest = torch.tensor([len(raw)], dtype=torch.int64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    # spaces at the end, which texts here do not have
    mine = torch.frombuffer(bytearray(raw.ljust(int(longest) + 1)), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return [bytes(part.tolist()).decode().rstrip(" ") for part in parts]
