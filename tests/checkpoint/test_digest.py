"""A file's digest, taken by pieces, against the plain way; saves of the format before it still load."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from lss.checkpoint import read_weights, verify
from lss.checkpoint.digest import LARGEST_PIECE, PIECE, PieceDigest, hashers
from lss.checkpoint.files import hash_file, read_header, write_tensors
from lss.checkpoint.manifest import file_facts, render
from lss.config.errors import Refused
from tests.distributed.pool import pool
from tests.train.jobs import train_run


def by_hand(raw: bytes) -> str:
    """What the digest is to be."""
    if len(raw) <= PIECE:
        return hashlib.sha256(raw).hexdigest()
    pieces = [raw[at : at + PIECE] for at in range(0, len(raw), PIECE)]
    return hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()


@pytest.mark.parametrize("elements", [0, 1, PIECE - 200, PIECE, PIECE + 1, 5 * PIECE // 2])
def test_pieces_are_those_of_the_file(tmp_path, elements):
    """Whatever the tensors' sizes, and read again with them or without."""
    generator = torch.Generator().manual_seed(elements)
    tensors = {"a": torch.randint(256, (elements,), generator=generator).to(torch.uint8), "b": torch.rand(77).double(),
               "c": torch.rand(9, 11)[:, ::2], "d": torch.empty(0)}  # fmt: skip
    path = tmp_path / "weights-00000-of-00001.safetensors"
    with hashers() as pool:
        size, digest = write_tensors(path, tensors, PieceDigest(pool))
    raw = path.read_bytes()
    facts = file_facts(size, digest)
    assert size == len(raw)
    assert digest == by_hand(raw)
    assert ("piece" in facts) == (size > PIECE)
    assert hash_file(path, facts.get("piece", 0)) == digest
    assert read_header(path).keys() == tensors.keys()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A save whose files have several pieces."""
    out = tmp_path_factory.mktemp("large") / "run"
    pool(2).run(train_run, 2, str(out), ["train.steps=1", "model.d_mlp=4096"])
    return out / "checkpoints" / "step_1"


def rewrite(folder, change):
    content = json.loads((folder / "manifest.json").read_bytes())
    change(content)
    (folder / "manifest.json").write_bytes(render(content))


def test_any_piece_s_damage_is_found(large, tmp_path):
    name = "optimizer-00001-of-00002.safetensors"
    facts = verify(large).files[name]
    assert facts["piece"] == PIECE
    assert facts["sha256"] == by_hand((large / name).read_bytes())
    for at in (PIECE - 1, PIECE, facts["bytes"] - 1):
        folder = shutil.copytree(large, tmp_path / str(at) / "step_1")
        with (folder / name).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(Refused, match=f"{name}: damaged"):
            verify(folder)


@pytest.mark.parametrize("piece", [0, 1, PIECE // 2, LARGEST_PIECE * 2, "4096", True])
def test_other_pieces_are_refused(large, tmp_path, piece):
    folder = shutil.copytree(large, tmp_path / "step_1")
    name = "weights-00000-of-00002.safetensors"
    rewrite(folder, lambda content: content["files"][name].update(piece=piece))
    with pytest.raises(Refused, match="step_1/"):
        verify(folder)


def test_a_save_of_format_2_is_good(large, tmp_path):
    """Its digests are SHA-256s of whole files."""
    folder = shutil.copytree(large, tmp_path / "step_1")
    state = json.loads((folder / "state.json").read_bytes())
    (folder / "state.json").write_text(json.dumps(state | {"format": 2}))

    def earlier(content):
        content["format"] = 2
        for name in content["files"]:
            raw = (folder / name).read_bytes()
            content["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    rewrite(folder, earlier)
    weights = read_weights(verify(folder))
    assert all(torch.equal(weight, weights[name]) for name, weight in read_weights(verify(large)).items())
    rewrite(folder, lambda content: content.update(format=4))
    with pytest.raises(Refused, match="not of format 2 or 3"):
        verify(folder)
