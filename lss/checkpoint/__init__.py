"""Checkpoints: safetensors and JSON, whole tensors, written aside and moved into place."""

from lss.checkpoint.load import find_checkpoint, load_checkpoint, read_state, read_weights
from lss.checkpoint.save import save_checkpoint

__all__ = ["find_checkpoint", "load_checkpoint", "read_state", "read_weights", "save_checkpoint"]
