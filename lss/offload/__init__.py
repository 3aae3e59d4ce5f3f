"""Keeping what backward needs away from the device: in host memory, and on disk where that is full.

A tensor that autograd saves is copied out on a stream of its own while the next layer computes, and brought back while the
layer after it is in backward: the copies stand beside the computation, not in its way. Host buffers are pinned, taken up to
a bound, and used again from step to step. What finds no room stays on the device.
"""

from __future__ import annotations

import torch

from lss.config.errors import refuse
from lss.hosts import free_memory
from lss.offload.disk import DiskTier
from lss.offload.host import HostTier
from lss.offload.saved import Kept, Offloader

__all__ = ["DiskTier", "HostTier", "Kept", "Offloader", "host_limit", "make_offloader"]


def make_offloader(
    kind: str | None, device: torch.device, *, gib: float | str = "auto", folder: str = "", local_ranks: int = 1
) -> Offloader | None:
    """The offloader of a setting: None or "none", "host", or "disk", which is host memory first and disk when it is full.

    Args:
        gib: GiB of host memory for this rank's buffers, or "auto": its share of half of what is free now.
        folder: for "disk"; the system's temporary folder by default.
        local_ranks: that share the host.

    Raises:
        Refused: another setting, or a folder that cannot be written to.
    """
    if kind in (None, "none"):
        return None
    if kind not in ("host", "disk"):
        raise refuse("memory.offload", kind, "use 'none', 'host' or 'disk'")
    if gib != "auto" and (isinstance(gib, bool) or not isinstance(gib, int | float) or not gib > 0):
        raise refuse("memory.offload_gib", gib, 'give GiB of host memory for each rank, more than 0, or "auto"')
    limit = host_limit(gib, local_ranks)
    if kind == "host":
        return Offloader([HostTier(device, limit)])
    # a quarter of the memory passes bytes on to disk
    return Offloader([HostTier(device, limit - limit // 4), DiskTier(HostTier(device, limit // 4), folder)])


def host_limit(gib: float | str, local_ranks: int) -> int:
    """Bytes of host memory that a rank's buffers may take: `gib`, or for "auto" its share of half of what is free now."""
    if gib != "auto":
        return int(float(gib) * 2**30)
    return free_memory() // 2 // max(local_ranks, 1)
