"""A trained model that the tests of the commands share."""

from __future__ import annotations

import argparse

import pytest

from tests.cli.test_cli import SMALL, TINY, lss

WORDS = "the quick brown fox jumps over the lazy dog, and then again. "


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of two steps, and a text."""
    folder = tmp_path_factory.mktemp("run")
    done = lss("train", TINY, *SMALL, f"data.path={argparse.__file__}", "train.steps=2", "train.eval_every=2",
               "train.eval_samples=1000", "train.dtype=float64", "--out", folder / "a", cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "book.txt").write_text(WORDS * 20)
    return folder
