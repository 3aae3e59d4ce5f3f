"""The corpus that a config names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lss.config import Config
from lss.config.errors import Refused, refuse
from lss.data.mixture import MixedCorpus
from lss.data.prepare import FOLDER, PREPARED, ids_below
from lss.data.sources import ByteCorpus, Corpus
from lss.data.tokenizer import NUCLEOTIDE
from lss.data.tokens import TokenCorpus


def open_corpus(config: Config, out: Path | None = None) -> Corpus | MixedCorpus:
    """The config's corpus, or its corpora with `data.weights`. Token ids are not read yet: `TokenCorpus.scan` does.

    Args:
        out: the run's folder, where `lss.data.prepare` has put the tokens of text and genomes.

    Raises:
        Refused: no files, or files that do not fit `data.source`.
    """
    data = config.data
    if data.weights:
        alone = [replace(config, data=replace(data, path=path, weights=())) for path in data.paths]
        corpora = [corpus for one in alone if isinstance(corpus := open_corpus(one), Corpus)]
        return MixedCorpus(corpora, data.weights)
    if data.source == "bytes":
        return ByteCorpus(data.path)
    if data.source in PREPARED and out is None:
        raise refuse("data.source", f'"{data.source}"', 'only lss train reads it; lss data tokenize makes "tokens" of it')
    path = str(out / FOLDER) if data.source in PREPARED and out is not None else data.path
    corpus = TokenCorpus(path, ids_below(config), data.token_bytes)
    if data.source in PREPARED:
        corpus.name, corpus.digest = data.path or ByteCorpus().name, ByteCorpus(data.path).digest
    if data.reverse_complement and corpus.tokenizer != NUCLEOTIDE:
        raise Refused(f"data.reverse_complement=true: {path} holds no nucleotides of lss data tokenize; use false.")
    return corpus


def corpus_digest(config: Config, out: Path) -> str:
    """The digest by which a changed corpus is told, without its tokens where they are made by the run."""
    return ByteCorpus(config.data.path).digest if config.data.source in PREPARED else open_corpus(config, out).digest


def mask_id(config: Config) -> int:
    """The id that stands for a masked token: 256 for bytes, the vocabulary's last for tokens."""
    return 256 if config.data.source == "bytes" else config.model.vocab_size - 1
