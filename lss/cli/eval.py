"""`lss eval`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lss.cli.ranks import launch, must_launch, planned_ranks, rendezvous_timeout, share_cores, told_once
from lss.cli.target import Target, open_target, settings_of
from lss.config.errors import Failed, Refused, refuse

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lss.data.sources import Split
    from lss.train.evaluate import Score

PARTS = ("all", "held-out", "training")
SECONDS = 30.0  # between lines of progress where there is no terminal


def evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    """Evaluate as one rank, or start the ranks that do."""
    rendezvous, ranks = rendezvous_timeout(options), planned_ranks(options.nproc)
    with told_once():
        target = open_target(options.model, settings_of(options.config), ranks)
        _refuse_early(target, options)
    if must_launch(options.nproc):
        return launch(options.nproc, arguments)
    return _evaluate(target, options, rendezvous)


def _refuse_early(target: Target, options: argparse.Namespace) -> None:
    """What can be refused before ranks meet."""
    from lss.data.prepare import PREPARED
    from lss.data.sources import find_files
    from lss.train.token_losses import refuse_losses_file

    config = target.config
    if config.model.kind != "decoder":
        raise refuse("model.kind", f'"{config.model.kind}"', "perplexity is of models that say the next token, decoders")
    if config.data.prefix:
        fit = "tokens that see each other cannot be scored; give data.prefix=0"
        raise refuse("data.prefix", config.data.prefix, fit)
    if options.part not in (None, *PARTS):
        raise refuse("--part", options.part, f"use {', '.join(PARTS)}")
    if _part(target, options) == "all" and config.data.weights:
        raise refuse("--part", "all", "data.weights names several corpora; use held-out or training, or evaluate one")
    if options.per_token is not None:
        refuse_losses_file(Path(options.per_token))
    # of text and genomes tokens are made later
    if config.data.source in PREPARED:
        find_files(config.data.path)
    elif options.window is not None or options.stride is not None or not must_launch(options.nproc):
        _window(target, _split(target, options, None), options)


def _part(target: Target, options: argparse.Namespace) -> str:
    """What of the corpus is evaluated: of the run's own what it was not trained on, of another all."""
    return options.part or ("held-out" if target.own_data else "all")


def _split(target: Target, options: argparse.Namespace, folder: Path | None) -> Split:
    """The part that is evaluated; `folder`: where the tokens of text and genomes are."""
    from lss.data import Split, open_corpus

    corpus = open_corpus(target.config, folder)
    _refuse_other_bins(target, corpus)
    part = _part(target, options)
    if part == "all":
        return Split(corpus, 0, len(corpus), "whole")  # type: ignore[arg-type]  (one corpus: weights are refused)
    training, held_out = corpus.split(target.config.data.held_out)
    return held_out if part == "held-out" else training


def _refuse_other_bins(target: Target, corpus: Any) -> None:
    """Ids of a series mean what the bins say that the model was trained with."""
    from lss.data.bins import same_bins

    trained, here = target.bins, getattr(corpus, "bins", None)
    if trained is not None and (here is None or not same_bins(trained, here)):
        fit = "its ids are not of the bins that the model was trained with; make them by lss data tokenize --bins-of"
        raise refuse("data.path", repr(target.config.data.path), fit)


def _window(target: Target, split: Split, options: argparse.Namespace) -> tuple[int, int]:
    from lss.train.evaluate import window_and_stride

    window, stride = window_and_stride(target.config, split, options.window, options.stride)
    if target.config.model.positions == "learned" and window > target.rows:
        setting = "data.seq_len" if options.window is None else "--window"
        raise refuse(setting, window, f"the model's position table has {target.rows} rows; use {target.rows} or less")
    return window, stride


def _evaluate(target: Target, options: argparse.Namespace, rendezvous: timedelta) -> int:
    from lss.mesh import close, init_mesh

    share_cores()
    parallel = target.config.parallel
    assert isinstance(parallel.cp, int)
    mesh = init_mesh(cp=parallel.cp, dp=parallel.dp, rendezvous=rendezvous)
    try:
        with told_once(mesh):
            _score(target, options, mesh)
    finally:
        close()  # when the model is gone, whose groups would else outlive it
    return 0


def _score(target: Target, options: argparse.Namespace, mesh: DeviceMesh) -> None:
    from lss.comm import control
    from lss.train.evaluate import score
    from lss.train.token_losses import LossesFile

    first = mesh.get_rank() == 0
    with ExitStack() as scope:
        split = _split(target, options, _tokens(target, mesh, scope))
        _scan(split, mesh)
        window, stride = _window(target, split, options)
        target = target.at(window)
        model = target.load(mesh)
        files: list[LossesFile] = []

        def keep(reader: Any) -> Callable:
            files.append(LossesFile(Path(options.per_token), reader, model, mesh))
            return files[0].write

        found = score(model, split, target.config, stride, keep=keep if options.per_token else None,
                      progress=_progress(split.corpus.unit) if first else lambda done, total: None)  # fmt: skip
        for file in files:
            file.close()
        if first:
            _show(target, split, found, options)
        control(mesh, "data").gather("")  # a folder of tokens stays until all are done with it


def _tokens(target: Target, mesh: DeviceMesh, scope: ExitStack) -> Path | None:
    """The folder that has the tokens of text and genomes: the run's own, or one that is gone at the end.

    Collectives: where tokens are made, two gathers, host to host.
    """
    from lss.cli.data import show_progress
    from lss.comm import control
    from lss.data.prepare import FOLDER, PREPARED, is_prepared, prepare
    from lss.data.token_folder import INDEX

    config = target.config
    if config.data.source not in PREPARED:
        return None
    if target.own_data and target.run is not None and is_prepared(config, target.run):
        return target.run
    told, talk = ["", ""], control(mesh, "data")
    if mesh.get_rank() == 0:
        try:
            told[0] = scope.enter_context(tempfile.TemporaryDirectory(prefix="lss-eval-"))
            named = replace(config, model=replace(config.model, hf=target.tokenizer))
            prepare(named, Path(told[0]), show_progress("tokenising"), target.bins)
        except (Refused, Failed) as error:
            told[1] = str(error)
    folder, reason = json.loads(talk.gather(json.dumps(told))[0])
    if not reason and not (Path(folder) / FOLDER / INDEX).is_file():
        fit = "the first rank's host has its tokens; make them by lss data tokenize and give data.source=tokens"
        reason = f'data.source="{config.data.source}": {fit}.'
    reason = next((text for text in talk.gather(reason) if text), "")
    if reason:
        raise Refused(reason)
    return Path(folder)


def _scan(split: Split, mesh: DeviceMesh) -> None:
    """Look for ids that the model has not, each rank in its share. Collectives: one gather, host to host."""
    from lss.comm import control

    reason = ""
    try:
        split.corpus.scan(mesh.get_rank(), mesh.size())
    except Refused as error:
        reason = str(error)
    reason = next((text for text in control(mesh, "data").gather(reason) if text), "")
    if reason:
        raise Refused(reason)


def _progress(unit: str) -> Callable[[int, int], None]:
    """A bar on a terminal, a line now and then elsewhere; both on standard error, which results do not go to."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task, said = bar.add_task("evaluating", total=None), time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()
        elif not console.is_terminal and time.monotonic() - said >= SECONDS:
            said = time.monotonic()
            console.print(f"{done:,} of {total:,} {unit}", highlight=False)

    return show


def _facts(target: Target, split: Split, found: Score, options: argparse.Namespace) -> dict[str, Any]:
    from lss.data.text_bytes import text_bytes
    from lss.data.windows import runs_of_items

    config = target.config
    count = text_bytes(split, runs_of_items(split, config.data.packing), target.tokenizer)
    return {
        "model": target.name,
        "step": None if target.checkpoint is None else target.checkpoint.step,
        "data": split.corpus.name,
        "part": _part(target, options),
        "unit": split.corpus.item,
        "tokens": len(split),
        "mode": "full" if options.window is None else "windowed",
        "window": found.window,
        "stride": found.stride,
        "scored": found.scored,
        "text_bytes": count,
        "nats": found.nats,
        "nats_per_token": found.nats_per_token,
        "bits_per_token": found.bits_per_token,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte(count),
        "cp": config.parallel.cp,
        "dp": config.parallel.dp,
        "order": config.parallel.order,
        "dtype": config.train.dtype,
        "seconds": found.seconds,
        "tokens_per_s": found.scored / found.seconds,
    }


def _show(target: Target, split: Split, found: Score, options: argparse.Namespace) -> None:
    facts = _facts(target, split, found, options)
    if options.json:
        print(json.dumps(facts, allow_nan=False), flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    # a line of its own: a title is wrapped to the table's width
    console.print(target.describe(), soft_wrap=True, markup=False, highlight=False)
    table = Table("", "", show_header=False)
    how = (f"sequences of {found.window:,}" if facts["mode"] == "full"
           else f"windows of {found.window:,}, {found.stride:,} apart: context of {found.window - found.stride:,} or more")
    unit, item = split.corpus.unit, split.corpus.item
    rows = {
        "data": f"{split.corpus.name}, {facts['part']}: {len(split):,} {unit}",
        "read in": how,
        "scored": f"{found.scored:,} {unit}",
        f"nats per {item}": f"{found.nats_per_token:.6f}",
        f"bits per {item}": f"{found.bits_per_token:.6f}",
        "perplexity": "too large to show" if found.perplexity is None else f"{found.perplexity:,.4f}",
        "bits per byte": "not known" if facts["bits_per_byte"] is None else
        f"{facts['bits_per_byte']:.6f} of {facts['text_bytes']:,} bytes",
        "ranks": f"cp {facts['cp']} x dp {facts['dp']}, {facts['order']}, {facts['dtype']}",
        "time": f"{found.seconds:.1f} s, {facts['tokens_per_s']:,.0f} {unit}/s",
    }  # fmt: skip
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, markup=False)
