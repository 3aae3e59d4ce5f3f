"""The reference model: decoder, encoder, or both, with nothing distributed in it."""

from lss.model.layers import ModelOps
from lss.model.transformer import ModelOutput, Transformer

__all__ = ["ModelOps", "ModelOutput", "Transformer"]
