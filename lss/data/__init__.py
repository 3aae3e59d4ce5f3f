"""Where tokens come from: files as bytes, cut into samples, each rank reading its own part."""

from lss.data.loader import Batch, EvalLoader, Loader
from lss.data.packing import Packed, pack
from lss.data.sources import ByteCorpus, Split

__all__ = ["Batch", "ByteCorpus", "EvalLoader", "Loader", "Packed", "Split", "pack"]
