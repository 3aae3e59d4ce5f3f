"""What devices can do: memory, rates and links, each number with its source.

Rates are what kernels reach, where they were measured, and a part of the data sheet's peak where not: `measured` says which.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lss.config import show
from lss.config.errors import refuse

GIGA, TERA = 1e9, 1e12
# Parts of the peak that a device which was not measured is taken to reach; those of an H100 here, rounded down.
MATRIX_PART, ATTENTION_PART = 0.6, 0.5
# Bytes/s between a device and pinned host memory, each way, as measured beside H100s; and of a host's own memory, a guess.
HOST_LINK, HOST_BANDWIDTH = 54 * GIGA, 200 * GIGA


@dataclass(frozen=True)
class Hardware:
    """One kind of device and the links between them.

    Attributes:
        memory: bytes of a device.
        peak: FLOP/s of dense bfloat16 (float16 where there is none), by which MFU is told.
        matrices: FLOP/s of matrix products.
        attention: head size -> ((tokens, FLOP/s), ...): forward and backward of causal attention, 3.5 units of which a
            forward is one; between lengths by a straight line over their logarithms.
        bandwidth: bytes/s of device memory.
        link: bytes/s that one device sends another of its host; `network`: of another host.
        per_host: devices of a host.
        watts: what a device takes under load.
        host: bytes of host memory for each device.
        measured: whether rates were measured, by this library's benches or others'.
        source: of the numbers, but those of `start` and hops, which are the same for all: the latencies by which NCCL
            chooses (NVIDIA/nccl, src/graph/tuning.cc: ring, simple protocol, NVLink and network). RCCL began as NCCL; that
            AMD's devices are alike is a guess.
        host_link: bytes/s between a device and pinned memory of its host, each way.
        cpu: whether it is one, whose kernels and tiles plans then have, and whose memory is its host's.
        start, hop, network_hop: seconds until a collective begins, and that a message takes to the next device of the host
            and of another host.
    """

    name: str
    memory: float
    peak: float
    matrices: float
    attention: Mapping[int, tuple[tuple[int, float], ...]]
    bandwidth: float
    link: float
    network: float
    per_host: int
    watts: float
    host: float
    measured: bool
    source: str
    host_link: float = HOST_LINK
    start: float = 8.4e-6
    hop: float = 3.4e-6
    network_hop: float = 14e-6
    cpu: bool = False


def _unmeasured(name: str, gib: float, peak: float, bandwidth: float, link: float, network: float, per_host: int,
                watts: float, host: float, source: str) -> Hardware:  # fmt: skip
    rate = ATTENTION_PART * peak * TERA
    return Hardware(
        name, gib * 2**30, peak * TERA, MATRIX_PART * peak * TERA, {64: ((8192, rate),), 128: ((8192, rate),)},
        bandwidth * GIGA, link * GIGA, network * GIGA, per_host, watts, host * GIGA, False, source,
    )  # fmt: skip


HARDWARE = {
    "h100": Hardware(
        "H100 SXM 80GB", 79.1 * 2**30, 989 * TERA, 610 * TERA,
        {64: ((8192, 458 * TERA), (16384, 549 * TERA), (131072, 511 * TERA)),
         128: ((8192, 533 * TERA), (16384, 604 * TERA), (131072, 612 * TERA))},
        3350 * GIGA, 339 * GIGA, 50 * GIGA, 8, 700, 250 * GIGA, True,
        "benchmarks/results (step-parts-h100, probe-2xh100: flash-attn-4, matrix products by tiles, copies over NVLink); "
        "memory bandwidth, network (one 400 Gb/s port a GPU), power and host memory (2 TB for 8) by NVIDIA's data sheets of "
        "the H100 and the DGX H100",
    ),
    "h200": _unmeasured("H200 SXM 141GB", 139.8, 989, 4800, 339, 50, 8, 700, 250,
                        "NVIDIA's data sheet of H200 and HGX H200; the host's memory as of a DGX H100"),
    "a100": _unmeasured("A100 SXM 80GB", 79.1, 312, 2039, 240, 25, 8, 400, 250,
                        "NVIDIA's data sheet of A100 and DGX A100 (2 TB)"),
    "v100": _unmeasured("V100 SXM2 16GB, Summit", 15.8, 125, 900, 45, 4.2, 6, 300, 85,
                        "NVIDIA's data sheet of V100 (float16); Summit: six a node, NVLink 2 at 50 GB/s a direction between "
                        "three, two 100 Gb/s ports and 512 GB a node (OLCF user guide)"),
    "mi300x": _unmeasured("MI300X 192GB", 191.5, 1307, 5300, 50, 50, 8, 750, 250,
                          "AMD's data sheet of MI300X; a host of 2 TB is a guess"),
    # 96 cores x 2.4 GHz x 32 FLOP of float32 a cycle
    "cpu": replace(
        _unmeasured("CPU, a socket of 96 cores", 384.0, 7.37, 461, 64, 12.5, 2, 360, 0.0,
                    "AMD's data sheet of EPYC 9654 (float32; 12 channels of DDR5-4800); 384 GiB, the link between sockets "
                    "and the network are guesses"),
        cpu=True,
    ),
}  # fmt: skip


def find_hardware(name: str) -> Hardware:
    """The device of this name, or the one that a profile (a file that ends in .json) tells of.

    Raises:
        Refused: there is none.
    """
    if name.endswith(".json"):
        from lss.planner.profile import load_profile

        return load_profile(Path(name))
    if name.lower() not in HARDWARE:
        near = difflib.get_close_matches(name.lower(), HARDWARE, n=1, cutoff=0.0)[0]
        raise refuse("--gpu", show(name), f"unknown; use one of {', '.join(HARDWARE)} or a profile.json; nearest is {near}")
    return HARDWARE[name.lower()]


def attention_rate(hardware: Hardware, head_size: int, tokens: int) -> float:
    """FLOP/s of causal attention, forward and backward, over sequences of so many tokens with heads of this size."""
    size = min(hardware.attention, key=lambda known: abs(known - head_size))
    points = hardware.attention[size]
    if tokens <= points[0][0]:
        return points[0][1]
    for (a, low), (b, high) in itertools.pairwise(points):
        if tokens <= b:
            return low + (high - low) * math.log(tokens / a) / math.log(b / a)
    return points[-1][1]
