"""Files to token files: in parts, by several processes, resumable, with a SHA-256 of every file.

A folder of tokens holds, for each part, `part-00000.bin` (ids), `part-00000.ends` (int64: so many tokens of the part come
up to the end of each document) and, for conversations, `part-00000.trained` (a byte a token, 1 where it is trained on);
and `tokens.json` (see `lss.data.token_folder`). A part is renamed to its name when it is whole, and `.part-00000.json`
says so; tokens.json comes last.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing as mp
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from lss.config.errors import Failed, Refused, refuse
from lss.data.bins import Bins, Series, fit_bins
from lss.data.documents import FORMATS, Span, fingerprint, format_of, records, sequences, split_files, texts
from lss.data.sources import find_files
from lss.data.tables import open_table
from lss.data.token_folder import FORMAT, INDEX, read_index
from lss.data.tokenizer import END, NUCLEOTIDE, NUCLEOTIDE_IDS, NUCLEOTIDES, SERIES, Tokenizer

Piece = tuple[Sequence[int] | np.ndarray, Sequence[bool] | None, bool]  # ids, which are trained on, a document's end


@dataclass(frozen=True)
class Recipe:
    """How files become tokens.

    Attributes:
        tokenizer: a folder, OWNER/NAME, "nucleotide", or "series" for numbers in columns.
        format: "auto" goes by the files' names.
        field: of a record of JSON lines or Parquet, its text, or with `chat` its messages.
        chat: records are conversations, of which the assistant's words alone are trained on; or have `prompt` and
            `completion`.
    """

    tokenizer: str
    format: str = "auto"
    field: str = "text"
    chat: bool = False
    series: Series | None = None
    given: Bins | None = None

    def plan(self) -> dict[str, Any]:
        """What a folder of tokens is told apart by."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def tokenize(
    inputs: Sequence[str],
    recipe: Recipe,
    out: Path,
    *,
    processes: int | None = None,
    most_ids: int | None = None,
    setting: str = "--tokenizer",
    out_setting: str = "-o",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the tokens of some files, folders or globs into a folder; returns what its tokens.json says.

    A folder that holds the same work, finished or broken off, is gone on with; other work is refused. The result is the
    same to the byte for any number of processes.

    Args:
        processes: by default one a core, at most one a part.
        most_ids: of a numeric series: how many ids there may be.
        setting, out_setting: what tokenizer and folder were given by, for refusals.
        progress: called with (bytes done, bytes in all).

    Memory: about the tokens of one part a process.

    Raises:
        Refused: the inputs, the recipe or the folder do not fit, by file and place.
    """
    if recipe.tokenizer == SERIES:
        recipe = replace(recipe, format=SERIES, series=recipe.series or Series())
    if recipe.format not in ("auto", *FORMATS):
        raise refuse("--format", recipe.format, f"use auto, {', '.join(FORMATS)}")
    files, names = [], []
    for given in inputs:
        base, found = find_files(given)
        files += found
        names += [file.relative_to(base).as_posix() for file in found]
    _refuse_mixture(files, recipe)
    parts = split_files(files, recipe.format)
    if not parts:
        raise refuse("INPUT", " ".join(inputs) or "''", "holds no bytes")
    plan = recipe.plan() | {"format_version": FORMAT, "names": names, "fingerprint": fingerprint(files)}
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    if (out / INDEX).exists():
        index = read_index(out)
        if index["plan"] != digest:
            raise refuse(out_setting, out, "it holds the tokens of other files, or made otherwise; choose another folder")
        return index
    if recipe.series:
        recipe = replace(recipe, given=_bins(files, recipe, most_ids))
    try:
        _begin(out, digest, out_setting)
        facts = _make_all(parts, recipe, out, processes, setting, progress)
    except BrokenProcessPool:
        raise Failed("A process that tokenised was ended from outside, for want of memory perhaps; start again, with fewer "
                     "--processes, and it goes on where it was.") from None
    except OSError as error:
        raise refuse(out_setting, out, f"cannot be written ({error.strerror or error})") from None
    index = _index(facts, recipe, digest, names)
    if not index["tokens"]:
        raise refuse("INPUT", " ".join(inputs), "holds no text")
    aside = out / f".{INDEX}"
    aside.write_text(json.dumps(index, indent=1) + "\n")
    os.replace(aside, out / INDEX)
    for number in range(len(parts)):
        (out / f".{_name(number)}.json").unlink()
    (out / ".plan").unlink()
    return index


def _refuse_mixture(files: Sequence[Path], recipe: Recipe) -> None:
    formats = {format_of(file) if recipe.format == "auto" else recipe.format for file in files}
    genome = recipe.tokenizer == NUCLEOTIDE
    if genome and formats - {"fasta"}:
        others = ", ".join(sorted(formats - {"fasta"}))
        fit = f"it reads FASTA and FASTQ, and there are files of {others}; use --format fasta"
        raise refuse("--tokenizer", recipe.tokenizer, fit)
    if not genome and "fasta" in formats:
        raise refuse("--tokenizer", recipe.tokenizer, f'FASTA is read by the tokenizer "{NUCLEOTIDE}"')
    if SERIES in formats and recipe.tokenizer != SERIES:
        raise refuse("--format", SERIES, f'numbers are read by the tokenizer "{SERIES}"')
    if recipe.chat and formats - {"jsonl", "parquet"}:
        raise refuse("--chat", "true", "conversations are records of JSON lines or Parquet; use --format jsonl")


def _bins(files: Sequence[Path], recipe: Recipe, most_ids: int | None) -> Bins:
    """Those that are given, held against the files; else fitted on them."""
    series, bins = recipe.series, recipe.given
    assert series is not None
    kept = [file for file in files if file.stat().st_size]
    if bins is None:
        return fit_bins(kept, series, most_ids)
    for file in kept:
        names = open_table(file, series.chosen).names
        if len(names) != len(bins.channels):
            fit = f"{file} has {', '.join(names)[:200]}, and the bins are of {', '.join(bins.channels)[:200]}"
            raise refuse("data.columns", series.columns or "''", f"{fit}; choose as many, in their order")
    return bins


def _begin(out: Path, digest: str, setting: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    plan = out / ".plan"
    if plan.exists() and plan.read_text() != digest:
        raise refuse(setting, out, "it holds the beginning of other work; remove it or choose another folder")
    if not plan.exists() and any(out.glob("*.bin")):
        raise refuse(setting, out, "it holds token files of other work; choose another folder")
    plan.write_text(digest)


def _make_all(
    parts: list[list[Span]],
    recipe: Recipe,
    out: Path,
    processes: int | None,
    setting: str,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    sizes = [sum(span.size for span in part) for part in parts]
    facts: dict[int, dict[str, Any]] = {number: _done(out, number) for number in range(len(parts))}
    left = [number for number, found in facts.items() if not found]
    done = sum(sizes) - sum(sizes[number] for number in left)
    progress(done, sum(sizes))
    count = min(processes or len(os.sched_getaffinity(0)), len(left))
    if count > 1:
        # spawned: a fork of a process with threads may hang
        context = mp.get_context("spawn")
        with ProcessPoolExecutor(count, context) as pool:
            waiting = {pool.submit(_make_here, parts[n], recipe, out, n, setting): n for n in left}
            for future in as_completed(waiting):
                number = waiting[future]
                facts[number] = future.result()
                done += sizes[number]
                progress(done, sum(sizes))
    elif left:
        tokenizer = open_tokenizer(recipe.tokenizer, setting)
        for number in left:
            facts[number] = _make(parts[number], recipe, out, number, tokenizer)
            done += sizes[number]
            progress(done, sum(sizes))
    return [facts[number] for number in range(len(parts))]


def _done(out: Path, number: int) -> dict[str, Any]:
    """What a part that is there already says of itself; empty where it is not there, or not whole."""
    try:
        facts = json.loads((out / f".{_name(number)}.json").read_text())
        whole = all((out / name).stat().st_size == entry["bytes"] for name, entry in facts["files"].items())
        return facts if whole else {}
    except (OSError, ValueError, KeyError):
        return {}


def open_tokenizer(name: str, setting: str = "--tokenizer") -> Tokenizer | None:
    """The tokenizer of this name; None for nucleotides and numbers, which need none."""
    return None if name in (NUCLEOTIDE, SERIES) else Tokenizer(name, setting)


def _make_here(part: list[Span], recipe: Recipe, out: Path, number: int, setting: str) -> dict[str, Any]:
    return _make(part, recipe, out, number, _opened(recipe.tokenizer, setting))


@cache
def _opened(name: str, setting: str) -> Tokenizer | None:
    """A worker process's tokenizer, read once."""
    return open_tokenizer(name, setting)


def _name(number: int) -> str:
    return f"part-{number:05}"


def _make(part: list[Span], recipe: Recipe, out: Path, number: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Write one part; returns its facts."""
    bins = recipe.given
    vocab = bins.ids if bins else NUCLEOTIDES if tokenizer is None else tokenizer.vocab_size
    least = "<u2" if vocab <= 1 << 16 else "<u4"
    dtype = np.dtype("u1" if tokenizer is None and vocab <= 256 else least)
    if bins:
        pieces = partial(_numbers, recipe=recipe, bins=bins)
    else:
        pieces = _nucleotides if tokenizer is None else partial(_pieces, recipe=recipe, tokenizer=tokenizer)
    tokens, ends, length = 0, [], 0
    suffixes = [".bin", ".ends", *([".trained"] if recipe.chat else [])]
    digests = {suffix: hashlib.sha256() for suffix in suffixes}
    with ExitStack() as stack:
        files = {s: stack.enter_context((out / f".{_name(number)}{s}").open("wb")) for s in suffixes}

        def write(suffix: str, array: np.ndarray) -> None:
            files[suffix].write(array.data)
            digests[suffix].update(array.data)

        for span in part:
            for ids, trained, end in pieces(span):
                write(".bin", np.asarray(ids, dtype))
                if recipe.chat:
                    write(".trained", np.asarray(trained, np.uint8) if trained is not None else np.ones(len(ids), np.uint8))
                tokens, length = tokens + len(ids), length + len(ids)
                if end and length:
                    ends.append(tokens)
                    length = 0
        write(".ends", np.asarray(ends, "<i8"))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    entries = {}
    for suffix in suffixes:
        path = out / f"{_name(number)}{suffix}"
        os.replace(out / f".{_name(number)}{suffix}", path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": digests[suffix].hexdigest()}
    facts = {"files": entries, "tokens": tokens, "documents": len(ends), "vocab_size": vocab, "token_bytes": dtype.itemsize}
    aside = out / f".{_name(number)}.json.part"
    aside.write_text(json.dumps(facts))
    os.replace(aside, out / f".{_name(number)}.json")
    return facts


def _nucleotides(span: Span) -> Iterator[Piece]:
    for letters, end in sequences(span):
        ids = NUCLEOTIDE_IDS[np.frombuffer(letters, np.uint8)]
        if ids.size and ids.max() == 255:
            odd = letters[int(np.argmax(ids == 255))]
            raise Refused(f"{span.file}: {chr(odd)!r} is no nucleotide; A, C, G, T, U and the codes of IUPAC are read.")
        yield ids, None, False
        if end:
            yield [END] if ids.size else [], None, True


def _numbers(span: Span, recipe: Recipe, bins: Bins) -> Iterator[Piece]:
    """The ids of a file of numbers, row by row; the file is a document."""
    assert recipe.series is not None
    for chunk in open_table(Path(span.file), recipe.series.chosen).checked(bins.nan):
        yield bins.encode(chunk), None, False
    yield [], None, True


def _pieces(span: Span, recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The ids of a stretch, each document's last one the tokenizer's mark of an end, where it has one."""
    close = [] if tokenizer.end is None else [tokenizer.end]
    if span.format == "text":
        for text, end in texts(span):
            yield [*tokenizer.encode(text), *(close if end else [])], None, end
        return
    for where, record in records(span, recipe.field):
        if recipe.chat:
            ids, trained = _conversation(where, record, recipe.field, tokenizer, close)
            yield ids, trained, True
            continue
        text = record.get(recipe.field)
        if not isinstance(text, str):
            have = ", ".join(map(str, list(record)[:10]))
            raise Refused(f"{where}: no text in the field {recipe.field!r} (--field); the record has {have}.")
        if text:
            yield [*tokenizer.encode(text), *close], None, True


def _conversation(
    where: str, record: dict[str, Any], field: str, tokenizer: Tokenizer, close: list[int]
) -> tuple[list[int], list[bool]]:
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        prompt, completion = tokenizer.encode(record["prompt"]), [*tokenizer.encode(record["completion"]), *close]
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)
    messages = record.get(field, record.get("messages"))
    sound = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not sound or not messages:
        raise Refused(f"{where}: neither prompt and completion, nor a list of messages with role and content in {field!r}.")
    assert isinstance(messages, list)
    try:
        return tokenizer.chat(messages)
    except Exception as error:  # a template is a program of its author's, and raises what it likes
        raise Refused(f"{where}: {str(error).splitlines()[0][:160].rstrip('.')}.") from None


def _index(facts: list[dict[str, Any]], recipe: Recipe, digest: str, names: list[str]) -> dict[str, Any]:
    # a part in which no token came out has no place in a corpus
    kept = [part for part in facts if part["tokens"]]
    first = facts[0]
    return {
        "format": FORMAT,
        "plan": digest,
        "tokenizer": recipe.tokenizer,
        "vocab_size": first["vocab_size"],
        "token_bytes": first["token_bytes"],
        "tokens": sum(part["tokens"] for part in kept),
        "documents": sum(part["documents"] for part in kept),
        "trained": recipe.chat,
        "inputs": len(names),
        **({"series": recipe.given.to_dict()} if recipe.given else {}),
        "files": {name: entry for part in kept for name, entry in part["files"].items()},
    }

