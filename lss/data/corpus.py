"""The corpus that a config names."""

from __future__ import annotations

from lss.config import Config
from lss.data.sources import ByteCorpus, Corpus
from lss.data.tokens import TokenCorpus


def open_corpus(config: Config) -> Corpus:
    """The config's corpus. Token ids are not read yet: `TokenCorpus.scan` does.

    Raises:
        Refused: no files, or files that do not fit `data.source`.
    """
    data = config.data
    return ByteCorpus(data.path) if data.source == "bytes" else TokenCorpus(data.path, ids_below(config), data.token_bytes)


def ids_below(config: Config) -> int:
    """Ids in the data are below this: the vocabulary, less the id that stands for masked tokens in an encoder's."""
    vocabulary = config.model.vocab_size
    return vocabulary - 1 if config.model.kind == "encoder" and config.data.source == "tokens" else vocabulary


def mask_id(config: Config) -> int:
    """The id that stands for a masked token: 256 for bytes, the vocabulary's last for tokens."""
    return 256 if config.data.source == "bytes" else config.model.vocab_size - 1
