"""Downloading a known corpus, checked to the byte."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lss.config.errors import Refused, refuse


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is, what the archive's member is called, and what its bytes must hash to."""

    url: str
    member: str
    size: int
    sha256: str


# enwik8: the first 10^8 bytes of the English Wikipedia dump of 2006-03-03, Matt Mahoney's Large Text Compression
# Benchmark (mattmahoney.net/dc/textdata.html); the digest is of the unpacked file.
CORPORA = {
    "enwik8": Corpus(
        "https://mattmahoney.net/dc/enwik8.zip",
        "enwik8",
        100_000_000,
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    )
}
_TIMEOUT = 20  # seconds without an answer
_BLOCK = 1 << 20


def fetch(name: str, folder: Path, corpora: dict[str, Corpus] = CORPORA) -> Path:
    """Download a corpus into `folder`, unpack it and check size and SHA-256; returns the file.

    A file that is there already and has the right digest is left as it is; one with another digest is refused.

    Raises:
        Refused: an unknown name, no network, a broken transfer, or other bytes than expected.
    """
    if name not in corpora:
        raise refuse("data fetch", name, f"unknown corpus; known: {', '.join(corpora)}")
    corpus, target = corpora[name], folder / name
    if target.exists():
        _verify(target, corpus)
        return target
    archive = folder / f".{name}.zip.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _download(corpus.url, archive, name, target)
        unpacked = folder / f".{name}.part"
        _unpack(archive, corpus, unpacked)
        _verify(unpacked, corpus)
        os.replace(unpacked, target)
    except OSError as error:
        raise refuse("--to", folder, f"cannot be written ({error.strerror or error})") from error
    finally:
        for leftover in (archive, folder / f".{name}.part"):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
    return target


def _download(url: str, archive: Path, name: str, target: Path) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, archive.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0) or None
            columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            with Progress(*columns) as progress:
                task = progress.add_task(name, total=total)
                while block := answer.read(_BLOCK):
                    file.write(block)
                    progress.advance(task, len(block))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise Refused(
            f"{url} cannot be reached ({reason}): there is no network here, or not to that host; download it elsewhere and "
            f"put the unpacked file at {target}."
        ) from error


def _unpack(archive: Path, corpus: Corpus, unpacked: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as files, files.open(corpus.member) as source, unpacked.open("wb") as file:
            written = 0
            while block := source.read(_BLOCK):
                written += len(block)
                if written > corpus.size:  # the archive is not the one expected: do not let it fill the disk
                    break
                file.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Refused(f"{corpus.url}: not the archive expected ({error}); try again.") from error


def _verify(file: Path, corpus: Corpus) -> None:
    digest = hashlib.sha256()
    _blocks(file, digest.update)
    if digest.hexdigest() != corpus.sha256:
        raise Refused(
            f"{file}: SHA-256 is {digest.hexdigest()}, not {corpus.sha256} ({file.stat().st_size:,} of {corpus.size:,} "
            "bytes); remove it and fetch again."
        )


def _blocks(file: Path, use: Callable[[bytes], object]) -> None:
    with file.open("rb") as source:
        while block := source.read(_BLOCK):
            use(block)
