"""Checkpoints: safetensors and JSON, sharded over the ranks that write, read into any layout."""

from lss.checkpoint.find import agree_on_checkpoint, check_together, find_checkpoint, probe_shared, saved_steps
from lss.checkpoint.load import load_checkpoint, load_weights, read_weights
from lss.checkpoint.manifest import Checkpoint, open_checkpoint, verify
from lss.checkpoint.save import Outcome, Saver

__all__ = [
    "Checkpoint",
    "Outcome",
    "Saver",
    "agree_on_checkpoint",
    "check_together",
    "find_checkpoint",
    "load_checkpoint",
    "load_weights",
    "open_checkpoint",
    "probe_shared",
    "read_weights",
    "saved_steps",
    "verify",
]
