"""`lss bench`."""

from __future__ import annotations

import argparse
import functools
import shlex
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lss.cli.bench_length import bench_length, trial
from lss.cli.main import split_config
from lss.cli.ranks import launch, must_launch, planned_ranks, share_cores
from lss.config import LARGEST, show
from lss.config.errors import Refused, refuse
from lss.environment import rank_environment
from lss.mesh import pick_device_type

if TYPE_CHECKING:
    from lss.bench import AttentionPlan, ScanPlan
    from lss.bench.train_step import TrainPlan

# After this a collective that some rank does not reach ends the run; compiling a kernel takes a part of it.
HANG = timedelta(minutes=4)
# Defaults of `bench attention` by device.
LENGTHS = {"cuda": "8192,16384,65536,131072", "cpu": "256,512"}
HEADS = {"cuda": "32/8x128", "cpu": "4/2x16"}
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
# Defaults of `bench scan`.
SCAN_LENGTHS = {"cuda": "65536,131072,262144,524288,1048576", "cpu": "512,1024"}
SCAN_SIZES = {"cuda": "32/1x128x64", "cpu": "4/1x16x16"}
SCAN_HEADS = {"cuda": "16/4x128", "cpu": "4/2x16"}
SCAN_WINDOW = {"cuda": 4096, "cpu": 64}


def bench(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run one action of the bench; 1 where something of ours computed wrong results."""
    if options.action == "plot":
        return _plot([Path(file) for file in options.files], Path(options.out), options.format)
    if options.action == "table":
        return _table(options)
    if options.action == "length" and options.trial and not must_launch(options.nproc):
        return trial(options)
    ranks = planned_ranks(options.nproc)
    if options.out and Path(options.out).is_dir():
        raise refuse("--out", options.out, "a folder of this name is there; give a file such as results.jsonl")
    if options.action == "length":
        if options.trial:
            return launch(options.nproc, arguments)
        return bench_length(options, ranks, _command(arguments))
    # everything is read here, so that a mistake is told once and before any rank is started
    plan = {"attention": _attention_plan, "scan": _scan_plan, "train": _train_plan}[options.action](options, ranks)
    if must_launch(options.nproc):
        return launch(options.nproc, [*arguments, "--command", _command(arguments)])
    return _measure(options, plan, options.command or _command(arguments))


def _command(arguments: list[str]) -> str:
    """The command line as it was typed, or as a launcher runs it."""
    environment = rank_environment()
    if environment is None:
        return shlex.join(["lss", *arguments])
    ranks = environment.world_size
    start = {"torchrun": f"torchrun --nproc-per-node {environment.local_world_size}", "mpirun": f"mpirun -n {ranks}",
             "srun": f"srun -n {ranks}"}  # fmt: skip
    module = "-m lss" if environment.launcher == "torchrun" else "lss"
    return f"{start[environment.launcher]} {module} {shlex.join(arguments)}"


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _numbers(option: str, text: str | None) -> list[int]:
    words = _words(text)
    if not all(word.isdecimal() and len(word) < 20 and 0 < int(word) <= LARGEST for word in words):
        raise refuse(option, show(text), f"give whole numbers of tokens, at most {LARGEST}, with commas between them")
    return [int(word) for word in words]


def _device_type(ranks: int) -> str:
    environment = rank_environment()
    return pick_device_type(environment.local_world_size if environment else ranks)


def _attention_plan(options: argparse.Namespace, ranks: int) -> AttentionPlan:
    from lss.bench import AttentionPlan, Heads, load_rivals, parse_options
    from lss.hosts import all_memory

    device = _device_type(ranks)
    plan = AttentionPlan(
        lengths=_numbers("--lengths", options.lengths or LENGTHS[device]),
        heads=[Heads.parse(word) for word in _words(options.heads or HEADS[device])],
        strategies=_words(options.strategies), kernels=_words(options.kernels), orders=_words(options.orders),
        options=[parse_options(text) for text in options.options], rivals=load_rivals(options.rivals),
        dtype=options.dtype or DTYPE[device], batch=options.batch, repeat=options.repeat, seconds=options.seconds,
        check_upto=options.check_upto, yardsticks=_words(options.yardsticks), only=_words(options.only),
        graphs_upto=options.graphs_upto,
    )  # fmt: skip
    plan.validate(ranks)
    if plan.graphs_upto and device == "cpu":
        raise refuse("--graphs-upto", plan.graphs_upto, "a CPU has no CUDA graphs; leave it out")
    tokens, heads = max(plan.lengths) * plan.batch, max(h.N * h.H for h in plan.heads)
    if device == "cpu" and 2 * tokens * heads > all_memory():
        fit = f"its queries alone take more than the {all_memory() / 2**30:.1f} GiB of this host; use shorter ones"
        raise refuse("--lengths", max(plan.lengths), fit)
    return plan


def _scan_plan(options: argparse.Namespace, ranks: int) -> ScanPlan:
    from lss.bench import Heads, ScanPlan, Sizes
    from lss.hosts import all_memory

    device = _device_type(ranks)
    plan = ScanPlan(
        lengths=_numbers("--lengths", options.lengths or SCAN_LENGTHS[device]),
        sizes=Sizes.parse(options.sizes or SCAN_SIZES[device]), heads=Heads.parse(options.heads or SCAN_HEADS[device]),
        kernels=_words(options.kernels), orders=_words(options.orders),
        window=SCAN_WINDOW[device] if options.attention_window is None else options.attention_window,
        attention_upto=options.attention_upto,
        dtype=options.dtype or DTYPE[device], batch=options.batch, repeat=options.repeat, seconds=options.seconds,
        check_upto=options.check_upto, only=_words(options.only),
    )  # fmt: skip
    plan.validate(ranks)
    values = max(plan.lengths) * plan.batch * plan.sizes.N * plan.sizes.H
    if device == "cpu" and 8 * values > all_memory():
        fit = f"values and outputs alone take more than the {all_memory() / 2**30:.1f} GiB of this host; use shorter ones"
        raise refuse("--lengths", max(plan.lengths), fit)
    return plan


def _train_plan(options: argparse.Namespace, ranks: int) -> TrainPlan:
    from lss.bench import load_rivals
    from lss.bench.train_step import TrainPlan, plan_configs
    from lss.train.memory import refuse_too_large

    path, overrides = split_config(options.config)
    configs = plan_configs(path, overrides, options.variants.split(";"), _numbers("--lengths", options.lengths), ranks)
    if _device_type(ranks) == "cpu":
        for _, config in configs:
            refuse_too_large(config, "cpu", ranks)
    rivals = load_rivals(options.rivals)
    return TrainPlan(configs, rivals, options.plain, repeat=options.repeat, only=_words(options.only))


def _measure(options: argparse.Namespace, plan: Any, command: str) -> int:
    import torch

    from lss.bench import Clock, Results, bench_attention, bench_scan
    from lss.bench.train_step import bench_train
    from lss.comm import cp_communicator
    from lss.mesh import close, init_mesh, world_size

    share_cores()
    mesh = init_mesh(cp=world_size(), timeout=HANG)
    try:
        cuda = mesh.device_type == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        clock = Clock(cp_communicator(mesh), device)
        first = mesh.get_rank() == 0
        path = Path(options.out) if options.out else None
        results = Results(path, writes=first, retry=options.retry)
        show = _row_printer(first)
        if options.action == "attention":
            rows = bench_attention(plan, clock, results, command, show)
        elif options.action == "scan":
            rows = bench_scan(plan, clock, results, command, show)
        else:
            meshes = functools.cache(lambda cp, dp: init_mesh(cp=cp, dp=dp))
            rows = bench_train(plan, meshes, clock, results, command, show)
        if first:
            _finish(options, path, rows)
    finally:
        close()
    # by the first rank alone: a launcher ends all ranks when one fails, and the first may still be drawing
    return int(first and any(row["rival"] is None and row["status"].startswith("failed: error of") for row in rows))


def _row_printer(first: bool) -> Callable[[dict[str, Any]], None]:
    """Print each row as it comes, on the first rank."""
    from lss.bench.tables import label

    def show(row: dict[str, Any]) -> None:
        if not first:
            return
        what = f"{row['tokens']:>9,} {row['heads']:>11}  {'graph: ' if row['graph'] else ''}{label(row):44}"
        if row["status"] != "ok":
            print(f"{what} {row['status']}", flush=True)
            return
        ideal = f"  ideal {row['ideal_ms'] / row['ms']:.3f}" if row["ideal_ms"] else ""
        each = f"  {1e6 * row['ms'] / row['tokens']:.1f} ns a token" if row["bench"] == "scan" else ""
        print(f"{what} {row['ms']:>10.3f} ms ±{100 * row['spread']:.1f} %{ideal}{each}", flush=True)

    return show


def _finish(options: argparse.Namespace, path: Path | None, new: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from lss.bench import read_rows
    from lss.cli.bench_table import rich_table

    rows = read_rows([path]) if path is not None else new
    done = "" if new else "; the file has all of it, and --retry measures again what failed"
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    console.print(rich_table(new or rows))
    print(f"{len(new)} measured{done}")
    if path is None:
        return
    print(f"rows: {path}")
    if options.action in ("attention", "scan") and not options.no_plots:
        try:
            _plot([path], path.with_name(f"{path.stem}-plots"), "svg")
        except Refused as refusal:  # the rows are there; a bench does not fail for want of its plots
            print(f"no plots: {refusal}")


def _plot(files: list[Path], folder: Path, form: str) -> int:
    from lss.bench import read_rows
    from lss.bench.plots import FORMATS, plot_attention, plot_scan

    if form not in FORMATS:
        raise refuse("--format", form, f"use one of {', '.join(FORMATS)}")
    rows = read_rows(files)
    for picture in [*plot_attention(rows, folder, form), *plot_scan(rows, folder, form)]:
        print(f"plot: {picture}")
    return 0


def _table(options: argparse.Namespace) -> int:
    from lss.bench import read_rows
    from lss.bench.tables import fill_page, tables_of

    if options.page is None:
        if not options.files:
            raise refuse("FILE", "", "give result files, or --page")
        print(tables_of(read_rows([Path(file) for file in options.files])))
        return 0
    page = Path(options.page)
    try:
        page.write_text(fill_page(page.read_text(encoding="utf-8"), Path(options.results)), encoding="utf-8")
    except OSError as error:
        raise refuse("--page", page, f"cannot be read or written ({error.strerror})") from error
    print(f"page: {page}")
    return 0
