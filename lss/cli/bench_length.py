"""`lss bench length`: asks trials of processes of their own, one after another, and writes what they come to."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lss.cli.main import split_config
from lss.cli.ranks import share_cores
from lss.config import Config, show
from lss.config.errors import Failed, refuse
from lss.environment import rank_environment

if TYPE_CHECKING:
    from lss.bench.length import Trial

GRANULE = {"cuda": 1024, "cpu": 64}
UPTO = 1 << 24
WHY = 200  # characters of what an allocator says


@dataclass(frozen=True)
class Candidate:
    """One thing whose longest sequence is looked for: a variant of ours, or an entry of the rivals by its number."""

    text: str
    config: Config
    entry: int | None = None
    rival: str | None = None
    name: str = ""


class Parent:
    """Starts trials: each a command of its own, whose result comes back in a file."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder, self._count = options, folder, 0
        self.path, self.overrides = split_config(options.config)

    def ask(self, **wanted: Any) -> dict[str, Any]:
        """Have a trial made; returns its result, of which "status" is always there."""
        options, self._count = self._options, self._count + 1
        file = self._folder / f"{self._count}.json"
        wanted |= {"rivals": options.rivals, "steps": options.steps, "path": self.path, "overrides": self.overrides}
        wanted["memory"] = None if options.memory is None else int(options.memory * 2**30)
        file.write_text(json.dumps(wanted))
        line = [sys.executable, "-m", "lss", "bench", "length", "--trial", str(file)]
        line += ["--nproc", str(options.nproc)] if options.nproc else []
        try:
            done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=options.trial_seconds)
        except subprocess.TimeoutExpired:
            return {"status": f"failed: a trial took longer than {options.trial_seconds:g} s"}
        with suppress(OSError, ValueError):
            return json.loads(_result(file).read_text())
        if done.returncode in (-9, 137):  # by the system, which had no memory left
            return {"status": "oom"}
        said = [words for words in done.stderr.strip().splitlines() if words.strip()]
        return {"status": f"failed: exit status {done.returncode}{f', {said[-1][:200]}' if said else ''}"}


def bench_length(options: argparse.Namespace, ranks: int, command: str) -> int:
    """Search for every variant and rival; 1 where something of ours failed otherwise than for want of memory."""
    from lss.bench import Results
    from lss.bench.rows import full_row

    if rank_environment() is not None:
        raise refuse("bench length", "under a launcher", "it starts ranks of its own, again and again; start it alone and "
                     "say --nproc N")  # fmt: skip
    layers, variants = _layers(options.layers), options.variants.split(";")
    configs = _configs(options, variants, ranks)
    _refuse_layers(layers, configs[0].config)
    results = Results(Path(options.out) if options.out else None, writes=True, retry=options.retry)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        parent = Parent(options, Path(folder))
        facts = parent.ask(kind="facts", variant=configs[0].text, tokens=None)
        if facts["status"] != "ok":
            raise Failed(f"no trial can be made: {facts['status'].removeprefix('failed: ')}.")
        words = [word.strip() for word in options.only.split(",") if word.strip()]
        for candidate in [*configs, *_rivals(facts["entries"], configs[0])]:
            known = _known(candidate, options, layers)
            row = full_row(known, facts["facts"] | {"command": command})
            if results.done(row) or (words and not any(word in candidate.name for word in words)):
                continue
            row |= _search(parent, candidate, options, layers, GRANULE[facts["device"]])
            results.add(row)
            rows.append(row)
            _show(row)
    from rich.console import Console

    from lss.bench import read_rows
    from lss.cli.bench_table import rich_table

    console = Console()
    (console if console.is_terminal else Console(width=150)).print(rich_table(rows or read_rows([results.path])))  # type: ignore[list-item]
    print(f"{len(rows)} measured{'' if results.path is None else f'; rows: {results.path}'}")
    return int(any(row["rival"] is None and row["status"].startswith("failed") for row in rows))


def _configs(options: argparse.Namespace, variants: Sequence[str], ranks: int) -> list[Candidate]:
    from lss.bench.train_step import plan_configs

    path, overrides = split_config(options.config)
    found = plan_configs(path, overrides, variants, [], ranks)
    return [Candidate(text, config, name=f"{config.parallel.strategy} {text}") for text, config in found]


def _rivals(entries: Sequence[Sequence[Any]], first: Candidate) -> list[Candidate]:
    return [
        Candidate("", first.config, number, label, name=f"{label} {variant or ''}")
        for number, (label, variant) in enumerate(entries)
    ]


def _layers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words and (len(words) > 2 or not all(word.isdecimal() and 0 < int(word) < 1 << 16 for word in words)):
        raise refuse("--layers", show(text), "give one or two numbers of layers, 1,2 for one")
    return [int(word) for word in words]


def _refuse_layers(layers: Sequence[int], config: Config) -> None:
    whole = config.model.n_layers
    if len(layers) == 1 and layers[0] != whole:
        fit = f"one point makes no line to the model's {whole} layers; give two numbers, 1,2 for one, or none"
        raise refuse("--layers", layers[0], fit)
    if len(layers) == 2 and len(set(config.model.layers)) > 1:
        fit = f'layers of several kinds, model.layers="{config.model.layers}", make no line; give none'
        raise refuse("--layers", f"{layers[0]},{layers[1]}", fit)
    if len(layers) == 2 and not layers[0] < layers[1] <= whole:
        raise refuse("--layers", f"{layers[0]},{layers[1]}", f"give the smaller first, and at most the model's {whole}")


def _known(candidate: Candidate, options: argparse.Namespace, layers: Sequence[int]) -> dict[str, Any]:
    from lss.bench.train_step import config_row

    told: dict[str, str] = dict(word.split("=", 1) for word in candidate.text.split())
    told |= {"memory": f"{options.memory:g} GiB"} if options.memory is not None else {}
    told |= {"layers": ",".join(map(str, layers))} if len(layers) == 2 else {}
    row = config_row(candidate.config, told, {}) | {"bench": "length", "tokens": None}
    if candidate.entry is not None:
        variant = candidate.name.removeprefix(f"{candidate.rival} ")
        row |= {"strategy": variant or None, "kernel": None, "order": None, "rival": candidate.rival}
    return {key: value for key, value in row.items() if value is not None}


def _search(
    parent: Parent, candidate: Candidate, options: argparse.Namespace, layers: Sequence[int], granule: int
) -> dict[str, Any]:
    from lss.bench.length import Bounds, Trial, confirm, length_row, longest, of_layers

    whole = candidate.config.model.n_layers
    cut, peaks = list(layers) or [whole], {}

    def attempt(tokens: int, count: int) -> Trial:
        told = parent.ask(kind="steps", variant=candidate.text, tokens=tokens, layers=count, entry=candidate.entry)
        trial = Trial(tokens, told["status"], told.get("peak_bytes"), told.get("limit_bytes"), told.get("ms"))
        peaks[tokens, count] = trial.peak_bytes
        peak = "" if trial.peak_bytes is None else f", {trial.peak_bytes / 2**30:.3f} GiB"
        why = f" ({told['why']})" if trial.status == "oom" and "why" in told else ""  # other reasons are the status itself
        print(f"  {candidate.name}: {tokens:,} tokens, {count} layers: {trial.status}{why}{peak}", flush=True)
        return trial

    granule = options.granule or granule
    bounds = Bounds(granule, options.start or 8 * granule, options.upto or UPTO)
    found = longest(of_layers(attempt, cut, whole), bounds)
    confirmed = None
    if found.best is not None and found.failure is None and options.confirm and cut != [whole]:
        confirmed = confirm(functools.partial(_whole, attempt, whole), found.best.tokens, bounds)
    slope = None
    if len(cut) == 2 and found.best is not None:
        a, b = (peaks[found.best.tokens, count] for count in cut)
        tokens = -(-found.best.tokens // (parent_ranks(options) // candidate.config.parallel.dp))
        slope = (b - a) / (cut[1] - cut[0]) / tokens
    return length_row(candidate.config, found, confirmed, cut, slope)


def _whole(attempt: Callable[[int, int], Trial], layers: int, tokens: int) -> Trial:
    return attempt(tokens, layers)


def parent_ranks(options: argparse.Namespace) -> int:
    """Ranks of a trial."""
    return options.nproc or 1


def _show(row: dict[str, Any]) -> None:
    from lss.bench.tables import label

    what = f"{row['tokens']:>12,}" if row["tokens"] else f"{'':>12}"
    how = "confirmed" if row["confirmed"] else "by an estimate" if row["status"] == "ok" else row["status"]
    print(f"{what} tokens  {label(row):44} {how}", flush=True)


# -- inside a trial ------------------------------------------------------------------------------------------------------


def trial(options: argparse.Namespace) -> int:
    """One trial, as one of its ranks: the result goes to the file beside the one that says what is wanted."""
    file = Path(options.trial)
    wanted = json.loads(file.read_text())
    from lss.bench.timing import status_of

    try:
        result = _try(wanted)
    except Exception as error:
        # the first rank to run short says so; what the others then lose is told by none
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:WHY]
        _tell(file, {"status": status_of(error), "why": why})
        sys.stdout.flush()
        os._exit(1)  # the others may wait for this rank in a collective, which nothing else would end
    if (environment := rank_environment()) is None or environment.rank == 0:
        _tell(file, result)
    return 0


def _try(wanted: dict[str, Any]) -> dict[str, Any]:
    import torch

    from lss.bench import Clock, load_rivals
    from lss.bench.length import step_of, take_steps
    from lss.bench.rows import run_facts
    from lss.bench.train_step import plan_configs, rival_entries
    from lss.cli.bench import HANG
    from lss.comm import cp_communicator
    from lss.hosts import free_memory
    from lss.mesh import close, init_mesh, world_size
    from lss.planner import Ledger

    share_cores()
    free = free_memory() // world_size()
    mesh = init_mesh(cp=world_size(), timeout=HANG)
    lengths = [wanted["tokens"]] if wanted["tokens"] else []
    ((_, config),) = plan_configs(wanted["path"], wanted["overrides"], [wanted["variant"]], lengths, mesh.size())
    cuda = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    clock, rivals = Clock(cp_communicator(mesh), device), load_rivals(wanted["rivals"])
    if wanted["kind"] == "facts":
        entries = [entry[:2] for entry in rival_entries(rivals, config, clock)]
        result = {"status": "ok", "device": device.type, "facts": run_facts(device, mesh.size(), ""), "entries": entries}
    else:
        meshes = functools.cache(lambda cp, dp: init_mesh(cp=cp, dp=dp))
        build = step_of(config, wanted["layers"], wanted["entry"], rivals, clock, meshes)
        counting = functools.partial(Ledger, 1, 0)
        result = take_steps(
            build, clock, steps=wanted["steps"], memory=wanted["memory"], free=free, counting=counting
        )
    close()
    return result


def _result(file: Path) -> Path:
    return file.with_suffix(".result")


def _tell(file: Path, result: dict[str, Any]) -> None:
    """Write a result, unless there is one; whole at once."""
    aside = file.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(result))
    with suppress(FileExistsError):
        os.link(aside, _result(file))
