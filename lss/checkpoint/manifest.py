"""A checkpoint's manifest, and holding a folder against it.

`step_N/` holds `weights-00000-of-00004.safetensors` and `optimizer-00000-of-00004.safetensors`, one pair for every rank
that wrote anything, `state.json`, and `manifest.json`: the step, the ranks that wrote, every file's bytes and SHA-256 (of
a file longer than a piece that of its pieces' SHA-256s, with the `piece`'s bytes: see `lss.checkpoint.digest`), every
tensor's dtype, shape and the boxes that it lies in, and the SHA-256 of all this. The manifest is stored in exactly
the form that its digest is taken of, so that no byte of it can change either. Nothing else may lie in the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lss.checkpoint.digest import LARGEST_PIECE, PIECE, SMALLEST_PIECE
from lss.checkpoint.files import DTYPES, LARGEST_JSON, hash_file, open_regular, parse_json, read_file, read_header
from lss.config.errors import Refused

FORMAT = 3
READ = (2, 3)  # in format 2 a file's digest is its SHA-256, however long it is
MANIFEST, STATE = "manifest.json", "state.json"
KINDS = ("weights", "optimizer")
STEP_NAME = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_TENSOR_FILE = re.compile(r"(weights|optimizer)-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def tensor_file(kind: str, rank: int, world: int) -> str:
    """Name of the file that a rank writes."""
    return f"{kind}-{rank:05}-of-{world:05}.safetensors"


def render(content: dict[str, Any]) -> bytes:
    """A manifest's bytes, its own digest included."""
    plain = {key: value for key, value in content.items() if key != "digest"}
    digest = hashlib.sha256(_canonical(plain)).hexdigest()
    return _canonical(plain | {"digest": digest}) + b"\n"


def file_facts(size: int, digest: str) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": size, "sha256": digest} | ({"piece": PIECE} if size > PIECE else {})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def tensor_key(name: str, shape: list[int] | tuple[int, ...], at: list[int] | tuple[int, ...],
               size: list[int] | tuple[int, ...]) -> str:  # fmt: skip
    """A box's name in its file: the tensor's where it is the whole of it, else with the place behind."""
    return name if list(size) == list(shape) else f"{name}@{','.join(map(str, at))}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose folder and manifest have been found sound; `manifest` is as it is stored."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return self.manifest["step"]

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and so of everything."""
        return self.manifest["digest"]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Every file's bytes and SHA-256, by name."""
        return self.manifest["files"]

    @property
    def format(self) -> int:
        """The format that it was written in."""
        return self.manifest["format"]

    def tensors(self, kind: str) -> dict[str, dict[str, Any]]:
        """Every tensor's dtype, shape and pieces, by name; `kind` is "weights" or "optimizer"."""
        return self.manifest["tensors"][kind]

    def read_state(self) -> dict[str, Any]:
        """state.json, held against its SHA-256.

        Raises:
            Refused: it is missing, damaged, or of another step.
        """
        path = self.path / STATE
        raw = read_file(path)
        if hashlib.sha256(raw).hexdigest() != self.files[STATE]["sha256"]:
            raise Refused(f"{path}: damaged, its SHA-256 is not the manifest's.")
        state = parse_json(raw, path)
        mine = (state.get("format"), state.get("step")) == (self.format, self.step)
        if not mine or not isinstance(state.get("optimizer"), str):
            raise Refused(f"{path}: not the state of step {self.step} in format {self.format}.")
        return state

    def check_file(self, name: str) -> None:
        """Refuse a file whose bytes are not those saved, by name, and tensors that are not where the manifest says."""
        path, facts = self.path / name, self.files[name]
        if hash_file(path, facts.get("piece", 0)) != facts["sha256"]:
            raise Refused(f"{path}: damaged, its SHA-256 is not the manifest's.")
        if name != STATE:
            self._check_header(name)

    def _check_header(self, name: str) -> None:
        path, found = self.path / name, read_header(self.path / name)
        told = {
            piece["key"]: (entry["dtype"], piece["size"])
            for entry in self.tensors(name.partition("-")[0]).values()
            for piece in entry["pieces"]
            if piece["file"] == name
        }
        here = {key: (entry.get("dtype"), entry.get("shape")) for key, entry in found.items() if isinstance(entry, dict)}
        if told != here:
            odd = next(key for key in sorted(told.keys() | found.keys()) if told.get(key) != here.get(key))
            raise Refused(f"{path}: its tensor {odd!r} is not the one that the manifest tells of.")


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, its manifest checked in full and its files by name, kind and bytes, not yet by digest.

    Raises:
        Refused: not a checkpoint, or naming the first file that is missing, not the run's, changed in size or a link.
    """
    if not path.is_dir():
        raise Refused(f"{path}: not a checkpoint; give a folder such as RUN/checkpoints/step_100.")
    entries = {entry.name: entry for entry in path.iterdir()}
    if MANIFEST not in entries:
        if "model.safetensors" in entries:
            raise Refused(f"{path}: a checkpoint of format 1, of an earlier version; this one reads format {FORMAT}.")
        fit = "give a folder such as RUN/checkpoints/step_100"
        raise Refused(f"{path / MANIFEST}: missing, so this is not a checkpoint; {fit}.")
    manifest = _read_manifest(path / MANIFEST)
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise Refused(f"{path / MANIFEST}: of step {manifest['step']}, in a folder of another step.")
    for name in sorted(entries.keys() | manifest["files"].keys()):
        if name == MANIFEST:
            continue
        if name not in manifest["files"]:
            raise Refused(f"{path / name}: not a file of this checkpoint; remove it.")
        with open(open_regular(path / name), "rb") as file:
            size, told = file.seek(0, 2), manifest["files"][name]["bytes"]
        if size != told:
            raise Refused(f"{path / name}: damaged, it has {size:,} bytes and the manifest says {told:,}.")
    return Checkpoint(path, manifest)


def verify(path: Path) -> Checkpoint:
    """A checkpoint of which every byte has been checked.

    Args:
        path: the checkpoint's folder.

    Raises:
        Refused: naming the first file that is changed, missing, not the checkpoint's or a link.
    """
    checkpoint = open_checkpoint(path)
    for name in sorted(checkpoint.files):
        checkpoint.check_file(name)
    checkpoint.read_state()
    return checkpoint


def _read_manifest(path: Path) -> dict[str, Any]:
    raw = read_file(path, LARGEST_JSON)
    content = parse_json(raw, path)
    if content.get("format") not in READ:
        formats = " or ".join(map(str, READ))
        raise Refused(f"{path}: not of format {formats}, which this version reads.")
    try:
        sound = render(content) == raw
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise Refused(f"{path}: damaged, its bytes are not those that its own digest was taken of.")
    reason = _faults(content)
    if reason:
        raise Refused(f"{path}: {reason}.")
    return content


def _faults(content: dict[str, Any]) -> str:
    """What in a manifest cannot be; "" where nothing is amiss. A digest proves no good intent: anybody can make one."""
    if content.keys() != {"format", "step", "world", "files", "tensors", "digest"}:
        return "it lacks entries or has others than this version writes"
    if not (_whole(content["step"]) and _whole(content["world"]) and isinstance(content["files"], dict)):
        return "its step, world or files are not what they should be"
    for name, facts in content["files"].items():
        if name != STATE and not _TENSOR_FILE.fullmatch(name):
            return f"it names {name!r}, which is no file of a checkpoint"
        fits = isinstance(facts, dict) and facts.keys() - {"piece"} == {"bytes", "sha256"} and _whole(facts["bytes"])
        if fits and "piece" in facts:
            piece = facts["piece"]
            fits = content["format"] > 2 and _whole(piece) and SMALLEST_PIECE <= piece <= LARGEST_PIECE
        if not fits or not isinstance(facts["sha256"], str) or not _DIGEST.fullmatch(facts["sha256"]):
            return f"it does not give the bytes and SHA-256 of {name}"
    if STATE not in content["files"]:
        return f"it does not name {STATE}"
    tensors = content["tensors"]
    if not isinstance(tensors, dict) or tensors.keys() != set(KINDS):
        return "its tensors are not weights and optimizer"
    for kind in KINDS:
        if not isinstance(tensors[kind], dict):
            return "its tensors are not weights and optimizer"
        for name, entry in tensors[kind].items():
            if not _sound_entry(name, entry, kind, content["files"]):
                return f"what it says of {name!r} does not make one whole tensor"
    return ""


def _sound_entry(name: str, entry: Any, kind: str, files: dict[str, Any]) -> bool:
    """Whether a tensor's pieces lie inside of it and are together as large, each under its name in a file there is."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "pieces"} or entry["dtype"] not in DTYPES:
        return False
    shape, pieces = entry["shape"], entry["pieces"]
    if not _wholes(shape) or not isinstance(pieces, list):
        return False
    elements, places = 0, set()
    for piece in pieces:
        if not isinstance(piece, dict) or piece.keys() != {"file", "key", "at", "size"}:
            return False
        at, size = piece["at"], piece["size"]
        if not (_wholes(at) and _wholes(size) and len(at) == len(size) == len(shape)):
            return False
        if any(a + n > whole for a, n, whole in zip(at, size, shape, strict=True)):
            return False
        known = isinstance(piece["file"], str) and piece["file"] in files and piece["file"].startswith(f"{kind}-")
        if not known or piece["key"] != tensor_key(name, shape, at, size):
            return False
        elements += prod(size)
        places.add(tuple(at))
    return elements == prod(shape) and len(places) == len(pieces)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _wholes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 16 and all(_whole(value) for value in values)
