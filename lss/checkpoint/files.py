"""Files of a checkpoint: written, hashed and flushed in one pass; read with bounds, and never through a link."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lss.checkpoint.digest import PieceDigest, hash_descriptor
from lss.config.errors import Refused

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK = 4 << 20
LARGEST_HEADER = 100_000_000  # bytes; what the safetensors library allows too
LARGEST_JSON = 64 << 20


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], digest: PieceDigest) -> tuple[int, str]:
    """Write tensors of the host as a safetensors file and flush it to disk; returns its bytes and its digest.

    Each part is given to `digest`, a new one, whose threads hash it while it and the next are written.
    Memory: none of its own; the tensors are read where they lie, those that are not contiguous copied one at a time.

    Raises:
        OSError: the disk is full, or the file is there already.
    """
    # the widest first, so that every tensor begins at a multiple of its elements' size
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, at = {}, 0
    for key, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for data in (len(raw).to_bytes(8, "little") + raw, *(_bytes_of(tensor) for _, tensor in ordered)):
            for start in range(0, len(data), CHUNK):
                chunk = memoryview(data)[start : start + CHUNK]
                digest.update(chunk)
                write_bytes(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return 8 + len(raw) + at, digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview | bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def write_bytes(descriptor: int, data: memoryview | bytes) -> None:
    """Write all of it: a single call may write less than it is given."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def write_file(path: Path, data: bytes) -> tuple[int, str]:
    """Write a small file and flush it to disk, in place of any other; returns its bytes and SHA-256."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_bytes(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return len(data), hashlib.sha256(data).hexdigest()


def flush_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading -------------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> int:
    """A descriptor of a plain file for reading. Raises `Refused` for anything else, links among them, by name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        why = "a symbolic link, which a checkpoint has none of" if error.errno == errno.ELOOP else (
            "missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})")  # fmt: skip
        raise Refused(f"{path}: {why}.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused(f"{path}: not a plain file.")
    return descriptor


def read_file(path: Path, largest: int = LARGEST_JSON) -> bytes:
    """All of a plain file of at most `largest` bytes; nothing is read of a larger one.

    Raises:
        Refused: missing, not a plain file, or larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise Refused(f"{path}: {size:,} bytes, and more than {largest:,} are not read.")
        return file.read(largest)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from bytes. Raises `Refused` where they are none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Refused(f"{path}: damaged, not a JSON object.")
    return value


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, by key; its length is held against the file's before anything is allocated.

    Raises:
        Refused: not a safetensors file, or with a header beyond the file or over 100 MB.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            fit = f"its header would have {length:,} bytes, and the file has {size:,} (at most {LARGEST_HEADER:,} are read)"
            raise Refused(f"{path}: damaged, {fit}.")
        return parse_json(file.read(length), path)


def hash_file(path: Path, piece: int = 0) -> str:
    """SHA-256 of a plain file, in hexadecimal; with `piece` its digest by pieces of so many bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        if piece:
            return hash_descriptor(file.fileno(), piece)
        return hashlib.file_digest(file, "sha256").hexdigest()
