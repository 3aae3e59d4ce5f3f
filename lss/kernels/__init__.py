"""Attention on one device: (out, lse) and an explicit backward, behind one table; and dropout keyed by position."""

from lss.kernels.blocks import Work, make_work
from lss.kernels.rules import MaskMod, Rules, Scores, keep_rows
from lss.kernels.single import single_attention
from lss.kernels.table import KERNEL_CHOICES, KERNELS, Kernel, pick_kernel

__all__ = [
    "KERNELS",
    "KERNEL_CHOICES",
    "Kernel",
    "MaskMod",
    "Rules",
    "Scores",
    "Work",
    "keep_rows",
    "make_work",
    "pick_kernel",
    "single_attention",
]
