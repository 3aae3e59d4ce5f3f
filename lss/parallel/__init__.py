"""Laying a model out over the mesh, and summing its gradients."""

from lss.parallel.grad_sync import sum_gradients
from lss.parallel.hf import HFLayout
from lss.parallel.laid_out import AnyLayout, clip_grad_norm_, full_state_dict, layout_of
from lss.parallel.parallelize import Layout, parallelize

__all__ = [
    "AnyLayout", "HFLayout", "Layout", "clip_grad_norm_", "full_state_dict", "layout_of", "parallelize", "sum_gradients",
]  # fmt: skip
