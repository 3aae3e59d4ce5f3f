"""What `lss bench attention` is asked to measure, and the errors that pass."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lss.bench.candidates import Candidate
from lss.bench.rival import Rival
from lss.config.errors import refuse
from lss.context_parallel import STRATEGIES
from lss.kernels import KERNEL_CHOICES
from lss.segment import ORDERS

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Largest relative error of anything that gets a time, by dtype; and for LSS, over the one-device kernel's own error.
CAPS = {"float64": 1e-12, "float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
OWN_ERROR_FACTOR = 1.25


def own_bound(name: str, own: float, dtype: torch.dtype) -> float:
    """Largest error of one of LSS's results in half precision where the same kernel on one device has `own`.

    dk and dv may have one rounding more: kernels return them in half precision, and each rank's calls a share of them.
    Rounding to p bits is a relative error of 2^(1-p) / sqrt(12) over the root mean square mantissa, sqrt(3 / (2 ln 2)).
    """
    once = torch.finfo(dtype).eps / math.sqrt(12 * 3 / (2 * math.log(2))) if name in ("dk", "dv") else 0.0
    return OWN_ERROR_FACTOR * math.hypot(own, once)


def sizes_of(option: str, text: str, count: int, form: str) -> list[int]:
    """N, K and so many sizes of "N/KxSIZExSIZE".

    Raises:
        Refused: other text, or N no multiple of K.
    """
    match = re.fullmatch(r"(\d+)/(\d+)" + r"x(\d+)" * count, text)
    numbers = [int(number) for number in match.groups()] if match else [0]
    if min(numbers) < 1 or numbers[0] % numbers[1]:
        raise refuse(option, text, f"write {form} for one, the first a multiple of the second")
    return numbers


@dataclass(frozen=True)
class Heads:
    """N query heads, K key heads, size H; written "32/8x128"."""

    N: int
    K: int
    H: int

    def __str__(self) -> str:
        return f"{self.N}/{self.K}x{self.H}"

    @staticmethod
    def parse(text: str) -> Heads:
        """Read "32/8x128".

        Raises:
            Refused: other text, or N no multiple of K.
        """
        return Heads(*sizes_of("--heads", text, 1, "query heads/key heads x size, 32/8x128"))


@dataclass(frozen=True)
class AttentionPlan:
    """What to measure.

    Attributes:
        options: sets of overrides of `AttentionOptions`, each one more variant.
        yardsticks: kernels to measure on one device, the fastest of which is the ideal; all fused ones that fit if empty.
        only: measure those candidates alone whose name, heads and tokens contain one of these words; all if empty.
        repeat: rounds at most; fewer, but 3 at least, where a candidate would take more than `seconds` in a cell.
        check_upto: tokens up to which gradients of keys are held to the truth too.
        graphs_upto: tokens up to which LSS and one device are measured a second time as CUDA graphs; 0: never.
    """

    lengths: Sequence[int]
    heads: Sequence[Heads]
    strategies: Sequence[str] = ("lss", "ring", "ulysses")
    kernels: Sequence[str] = ("auto",)
    orders: Sequence[str] = ("head_tail",)
    options: Sequence[dict[str, Any]] = ()
    rivals: Sequence[Rival] = ()
    dtype: str = "bfloat16"
    batch: int = 1
    repeat: int = 7
    seconds: float = 30.0
    check_upto: int = 131072
    yardsticks: Sequence[str] = ()
    only: Sequence[str] = ()
    graphs_upto: int = 0

    def validate(self, ranks: int) -> None:
        """Refuse names that there are not, before any rank is started.

        Raises:
            Refused: naming the option, its value and what there is.
        """
        for option, values, known in (
            ("--strategies", [*self.strategies, *(o["strategy"] for o in self.options if "strategy" in o)], STRATEGIES),
            ("--kernels", [*self.kernels, *(o["kernel"] for o in self.options if "kernel" in o)], KERNEL_CHOICES),
            ("--yardsticks", self.yardsticks, KERNEL_CHOICES),
            ("--orders", self.orders, ORDERS),
            ("--dtype", [self.dtype], DTYPES),
        ):
            for value in values:
                if value not in known:
                    raise refuse(option, value, f"unknown; use one of {', '.join(known)}")
        for option, numbers in (("--lengths", self.lengths), ("--repeat", [self.repeat]), ("--batch", [self.batch])):
            if not numbers or min(numbers) < 1:
                raise refuse(option, ",".join(map(str, numbers)), "give whole numbers, 1 or more")
        if self.graphs_upto < 0:
            raise refuse("--graphs-upto", self.graphs_upto, "give a number of tokens, or 0 for none")
        short = [length for length in self.lengths if length < ranks]
        if short:
            raise refuse("--lengths", short[0], f"fewer tokens than the {ranks} ranks; give longer sequences")

    def wants(self, candidate: Candidate, heads: Heads, tokens: int) -> bool:
        """Whether `only` picks it."""
        label = f"{candidate.name} {heads} {tokens}"
        return not self.only or any(word in label for word in self.only)
