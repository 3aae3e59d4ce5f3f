"""Attention on one device: (out, lse) and an explicit backward, behind one table; and dropout keyed by position."""

from lss.kernels.single import single_attention
from lss.kernels.table import KERNEL_CHOICES, KERNELS, Kernel, pick_kernel

__all__ = ["KERNELS", "KERNEL_CHOICES", "Kernel", "pick_kernel", "single_attention"]
