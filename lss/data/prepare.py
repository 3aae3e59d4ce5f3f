"""Text and genomes of a run, made into token files in its folder before step 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lss.config import Config
from lss.data.token_folder import INDEX
from lss.data.tokenize import Recipe, tokenize
from lss.data.tokenizer import NUCLEOTIDE

FOLDER = "tokens"
PREPARED = ("text", "fasta")  # values of data.source that are not read as they are


def is_prepared(config: Config, out: Path) -> bool:
    """Whether the run's data can be opened: it is read as it is, or its tokens are there."""
    return config.data.source not in PREPARED or (out / FOLDER / INDEX).is_file()


def prepare(config: Config, out: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Make the run's tokens, or go on where that was broken off; nothing where they are there or none are needed.

    Raises:
        Refused: files that cannot be read so, no tokenizer, or tokens of other files in the folder.
    """
    data = config.data
    if data.source not in PREPARED:
        return
    name, form = (NUCLEOTIDE, "fasta") if data.source == "fasta" else (config.model.hf, "text")
    recipe = Recipe(name, form)
    tokenize([data.path], recipe, out / FOLDER, setting="model.hf", out_setting="data.path", progress=progress)
