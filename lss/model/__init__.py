"""The reference model: a decoder with nothing distributed in it."""

from lss.model.transformer import ModelOps, ModelOutput, Transformer

__all__ = ["ModelOps", "ModelOutput", "Transformer"]
