"""Generating text with a trained model whose keys and values stay cut over ranks."""

from lss.infer.generate import generate
from lss.infer.sampling import Sampling

__all__ = ["Sampling", "generate"]
