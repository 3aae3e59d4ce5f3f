"""Downloading a known corpus, checked to the byte."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lss.config.errors import Refused, refuse


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is, what the archive's member is called, and what its bytes must hash to."""

    url: str
    member: str
    size: int
    sha256: str


# enwik8: the first 10^8 bytes of the English Wikipedia dump of 2006-03-03, Matt Mahoney's Large Text Compression
# Benchmark (mattmahoney.net/dc/textdata.html). The digest is of the unpacked file, since mirrors pack it anew, and
# is the one that public projects which pin their copy agree on (the regression tests of the compressor tamp for one).
# The archive at `url` has 36,445,475 bytes and SHA-256 547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc.
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
    # named by process, so that two that fetch at once do not write into one file
    archive, unpacked = folder / f".{name}.{os.getpid()}.zip.part", folder / f".{name}.{os.getpid()}.part"
    try:
        if target.exists():
            _verify(target, corpus)
            return target
        folder.mkdir(parents=True, exist_ok=True)
        _download(corpus, archive, name, target)
        _unpack(archive, corpus, unpacked)
        _verify(unpacked, corpus)
        os.replace(unpacked, target)
    except OSError as error:
        raise refuse("--to", folder, f"cannot be used ({error.strerror or error}: {error.filename or target})") from error
    finally:
        for leftover in (archive, unpacked):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
    return target


def _download(corpus: Corpus, archive: Path, name: str, target: Path) -> None:
    """Write what the corpus's url gives to `archive`; over http where https fails, which the digest makes safe."""
    url = corpus.url
    urls = [url, "http://" + url.removeprefix("https://")] if url.startswith("https://") else [url]
    failures = []
    for attempt in urls:
        try:
            with urllib.request.urlopen(attempt, timeout=_TIMEOUT) as answer, archive.open("wb") as file:
                _copy(answer, file, name, most=corpus.size + _BLOCK)
            return
        except urllib.error.HTTPError as error:
            failures.append(f"the server says {error.code} {error.reason}")
        except urllib.error.URLError as error:
            failures.append(f"there is no network here, or not to that host ({error.reason})")
        except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
            failures.append(f"the transfer broke off ({error or type(error).__name__})")
    raise Refused(f"{url}: {failures[0]}; download it elsewhere and put the unpacked file at {target}.")


def _copy(answer: Any, file: BinaryIO, name: str, most: int) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    length = answer.headers.get("Content-Length") or ""
    total = int(length) if length.isdecimal() else None
    with Progress(name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(name, total=total)
        # an endless answer is not the archive expected: do not let it fill the disk
        while file.tell() <= most and (block := answer.read(_BLOCK)):
            file.write(block)
            progress.advance(task, len(block))


def _unpack(archive: Path, corpus: Corpus, unpacked: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as files, files.open(corpus.member) as source, unpacked.open("wb") as file:
            written = 0
            while block := source.read(_BLOCK):
                written += len(block)
                if written > corpus.size:  # the archive is not the one expected: do not let it fill the disk
                    break
                file.write(block)
    # what zipfile raises for a broken, cut-off, encrypted or oddly packed archive, or one without the member
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, KeyError) as error:
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
