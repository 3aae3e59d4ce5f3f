"""Text, genomes and series of a run, made into token files in its folder before step 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lss.config import Config
from lss.data.bins import Bins, Series
from lss.data.token_folder import INDEX
from lss.data.tokenize import Recipe, tokenize
from lss.data.tokenizer import NUCLEOTIDE, SERIES

FOLDER = "tokens"
PREPARED = ("text", "fasta", "series")  # values of data.source that are not read as they are


def is_prepared(config: Config, out: Path) -> bool:
    """Whether the run's data can be opened: it is read as it is, or its tokens are there."""
    return config.data.source not in PREPARED or (out / FOLDER / INDEX).is_file()


def prepare(
    config: Config,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    bins: Bins | None = None,
) -> None:
    """Make the run's tokens, or go on where that was broken off; nothing where they are there or none are needed.

    Args:
        bins: of a numeric series: those that the model was trained with, which hold for other files too.

    Raises:
        Refused: files that cannot be read so, no tokenizer, or tokens of other files in the folder.
    """
    data = config.data
    if data.source not in PREPARED:
        return
    recipe, most = Recipe(config.model.hf, "text"), None
    if data.source == "fasta":
        recipe = Recipe(NUCLEOTIDE, "fasta")
    elif data.source == SERIES:
        series, most = Series(data.columns, data.bins, data.binning, data.nan, data.held_out), ids_below(config)
        recipe = Recipe(SERIES, SERIES, series=series, given=bins)
    folder = out / FOLDER
    tokenize([data.path], recipe, folder, most_ids=most, setting="model.hf", out_setting="data.path", progress=progress)


def ids_below(config: Config) -> int:
    """Ids in the data are below this: the vocabulary, less the id that stands for masked tokens in an encoder's."""
    vocabulary = config.model.vocab_size
    genome = config.data.source == "fasta" or config.data.reverse_complement  # whose vocabulary has an id for masks
    masks = config.model.kind == "encoder" and config.data.source != "bytes" and not genome
    return vocabulary - 1 if masks else vocabulary
