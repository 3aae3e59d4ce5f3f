"""A rank that finds no memory ends the run with one sentence: what took most, and which settings lessen it."""

from __future__ import annotations

import json
import os

import pytest

from lss.cli.main import _expand_segments
from tests.faults.plants import plant
from tests.faults.ranks import Run

PLANTS = {
    # a GPU's own words, in a later step than is measured: told from what step 2 took
    "raised": ({"rank": 1, "place": "forward", "step": 4, "do": "out of memory"}, "rank 1 ran out of memory in step 4"),
    # the host's own refusal, in the first step, of its first large tensors
    "limited": ({"rank": 1, "place": "forward", "step": 1, "do": "limit"}, "rank 1 ran out of memory in step 1 (forward)"),
    "all": ({"place": "forward", "step": 4, "do": "out of memory"}, "ran out of memory in step 4"),
    "built": ({"rank": 1, "place": "build", "do": "out of memory"}, "rank 1 ran out of memory before step 1"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_one_sentence_names_the_class_and_the_remedy(tmp_path, name):
    planted, sentence = PLANTS[name]
    length = 8192 if name == "limited" else 256  # so long that what the heap holds already is nothing
    options = ["train.steps=9", f"data.seq_len={length}", "model.n_kv_heads=4"]
    run = Run(tmp_path / "run", 2, options, hook=plant, environ={"PLANT": json.dumps(planted)})
    assert run.wait(90) == [1, 1], run.said()
    said = run.said()
    assert sentence in said
    assert "of activations less is needed with memory.checkpointing=\"full\", memory.offload=\"host\"" in said
    assert "Traceback" not in said
    own = [line for line in said.splitlines() if line.startswith("lss: rank") and "failed" not in line]
    assert len(own) == 1, said
    # the other rank is told by the watch
    assert ("lss: rank 1 failed" in said) == (name != "all")


@pytest.mark.parametrize("there, before, after", [
    (True, {}, "expandable_segments:True"), (False, {}, None),
    (True, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    (True, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
])  # fmt: skip
def test_segments_grow_unless_the_user_says_otherwise(monkeypatch, there, before, after):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os.path, "exists", lambda path: there)
    _expand_segments()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == after
    os.environ.pop("PYTORCH_ALLOC_CONF", None)
