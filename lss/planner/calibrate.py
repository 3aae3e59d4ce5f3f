"""What this machine can do, measured: the rates that plans are made of, as `Hardware`.

Every rate is that of the library's own calls: attention by the kernel that "auto" takes, forward and backward; matrix
products of a layer's shapes; collectives through `lss.comm`. Random numbers, never zeros. Each is the median of repetitions
after a first one that warms up; longer lengths are left out when the time given is over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lss.comm import Communicator
from lss.flops import peak_flops
from lss.hosts import all_memory
from lss.kernels import single_attention
from lss.planner.hardware import GIGA, HOST_LINK, Hardware

REPEAT = 5
HEAD_SIZES = (64, 128)
# Largest sizes by kind of device: tokens of attention, width of matrix products, bytes of copies and of collectives.
HEADS = {"cuda": (32, 8), "cpu": (8, 2)}  # of queries and keys
LENGTHS = {"cuda": (2048, 8192, 32768, 131072), "cpu": (256, 512, 1024, 2048)}
WIDTHS = {"cuda": (2048, 4096, 8192), "cpu": (256, 512, 1024)}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
MESSAGES = {"cuda": (1 << 20, 1 << 24, 1 << 28), "cpu": (1 << 16, 1 << 20, 1 << 24)}
LEAST_START = 1e-6
# Where nothing was measured, since there is but one device or one host: a guess that the source names.
UNKNOWN_LINK, UNKNOWN_NETWORK, UNKNOWN_WATTS = 50 * GIGA, 12.5 * GIGA, {"cuda": 700.0, "cpu": 150.0}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """Measures on one device of some ranks, all together.

    Args:
        comm: over all ranks; every rank does the same.
        seconds: after so many no longer attention is begun.
        say: called with a line for each number.
    """

    comm: Communicator
    device: torch.device
    seconds: float
    say: Say

    def hardware(self, name: str) -> Hardware:
        """Everything, measured now. Collectives: all-reduces of times, and all-gathers of up to 256 MiB a rank."""
        kind, began = self.device.type, time.monotonic()
        attention = {size: self._attention(size, began) for size in HEAD_SIZES}
        matrices = self._matrices()
        link, start = self._link() if self.comm.size > 1 else (UNKNOWN_LINK, Hardware.start)
        alone = "" if self.comm.size > 1 else "the link between devices, "
        host = all_memory() / self.comm.size
        memory = torch.cuda.get_device_properties(self.device).total_memory if kind == "cuda" else host
        best = max(rate for points in attention.values() for _, rate in points)
        return Hardware(
            name, float(memory), peak_flops(name) or max(matrices, best), matrices, attention, self._bandwidth(), link,
            min(link, UNKNOWN_NETWORK), self.comm.size, UNKNOWN_WATTS[kind], host, True,
            f"measured on this machine by lss plan --calibrate; {alone}the network and power are guesses",
            host_link=self._host_link() if kind == "cuda" else HOST_LINK, start=start, cpu=kind == "cpu",
        )  # fmt: skip

    # -- rates ---------------------------------------------------------------------------------------------------------

    def _attention(self, head_size: int, began: float) -> tuple[tuple[int, float], ...]:
        """FLOP/s at each length, forward and backward of causal attention; one length at least."""
        points = []
        for tokens in LENGTHS[self.device.type]:
            if points and self._late(began):
                break
            N, K = HEADS[self.device.type]
            q, k, v, dout = (self._random(1, tokens, heads, head_size) for heads in (N, K, K, N))
            leaves = [x.requires_grad_() for x in (q, k, v)]

            def step(leaves=leaves, dout=dout) -> None:
                torch.autograd.grad(single_attention(*leaves), leaves, dout)

            rate = 3.5 * 2 * N * head_size * tokens**2 / self._time(step)
            self.say(f"attention, heads of {head_size}, {tokens:,} tokens: {rate / 1e12:.3g} TFLOP/s")
            points.append((tokens, rate))
        return tuple(points)

    def _matrices(self) -> float:
        """FLOP/s of a layer's products: tokens by width, by four widths and back; the median over widths."""
        rates = []
        for width in WIDTHS[self.device.type]:
            x, up, down = self._random(4 * width, width), self._random(width, 4 * width), self._random(4 * width, width)
            rates.append(2 * 2 * 4 * width * width * 4 * width / self._time(lambda: (x @ up) @ down))  # noqa: B023
            self.say(f"matrix products, {width:,} wide: {rates[-1] / 1e12:.3g} TFLOP/s")
        return statistics.median(rates)

    def _bandwidth(self) -> float:
        """Bytes/s of device memory: a copy reads and writes each byte."""
        source = self._random(COPY_BYTES[self.device.type] // 4, dtype=torch.float32)
        place = torch.empty_like(source)
        rate = 2 * source.numel() * 4 / self._time(lambda: place.copy_(source))
        self.say(f"memory: {rate / 1e9:.4g} GB/s")
        return rate

    def _host_link(self) -> float:
        size = COPY_BYTES["cuda"] // 4
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        here = torch.empty(size, dtype=torch.uint8, device=self.device)
        rates = [size / self._time(lambda: here.copy_(host, non_blocking=True)),
                 size / self._time(lambda: host.copy_(here, non_blocking=True))]  # fmt: skip
        self.say(f"host to device {rates[0] / 1e9:.4g} GB/s, back {rates[1] / 1e9:.4g}")
        return min(rates)

    def _link(self) -> tuple[float, float]:
        """Bytes/s that a rank receives from others in an all-gather, the best over message sizes; and seconds to its start,
        which the smallest message takes beyond that."""
        rates, times, others = [], [], self.comm.size - 1
        for size in MESSAGES[self.device.type]:
            mine = self._random(size // 4, dtype=torch.float32)
            took = self._time(lambda: self.comm.all_gather(mine, 0, "bench").wait())  # noqa: B023
            times.append((others * size, took))
            rates.append(others * size / took)
            told = f"{rates[-1] / 1e9:.4g} GB/s, {1e6 * took:,.0f} microseconds"
            self.say(f"all-gather of {size / 2**20:g} MiB a rank: {told}")
        size, took = times[0]
        return max(rates), max(took - size / max(rates) - others * Hardware.hop, LEAST_START)

    # -- how -----------------------------------------------------------------------------------------------------------

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        default = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return torch.randn(*shape, dtype=dtype or default, device=self.device)

    def _time(self, step: Callable[[], object]) -> float:
        """Median seconds of a step, the slowest rank's."""
        times = []
        for number in range(REPEAT + 1):
            self._largest(0.0)  # together
            self._synchronize()
            began = time.perf_counter()
            step()
            self._synchronize()
            if number:
                times.append(time.perf_counter() - began)
        return self._largest(statistics.median(times))

    def _late(self, began: float) -> bool:
        return self._largest(time.monotonic() - began) > self.seconds

    def _largest(self, value: float) -> float:
        x = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(self.comm.all_reduce_max(x, "bench").wait())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
