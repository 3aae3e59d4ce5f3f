"""Where tokens come from: files of bytes or token ids, cut into samples, each rank reading its own part."""

from lss.data.corpus import open_corpus
from lss.data.loader import Batch, EvalLoader, Loader
from lss.data.packing import Packed, pack
from lss.data.sources import ByteCorpus, Corpus, Split
from lss.data.tokens import TokenCorpus

__all__ = ["Batch", "ByteCorpus", "Corpus", "EvalLoader", "Loader", "Packed", "Split", "TokenCorpus", "open_corpus", "pack"]
