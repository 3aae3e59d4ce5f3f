"""`lss plan` with a question: --search, --longest, --fewest."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lss.cli.main import split_config
from lss.cli.plan import devices, plannable
from lss.cli.plan_out import make_folder, plan_row, write_plans
from lss.config import Config, load_config
from lss.config.errors import refuse

if TYPE_CHECKING:
    from lss.planner import Tried


def search(options: argparse.Namespace) -> int:
    """Answer the question by trying plans; 1 where nothing fits."""
    path, overrides = split_config(options.config)
    config = plannable(path, overrides)
    if options.fewest and options.gpus is not None:
        raise refuse("--gpus", options.gpus, "how many is what --fewest looks for; leave it out")
    ranks = devices(config, options)
    folder = None if options.out is None else make_folder(options.out)  # before minutes of work

    from rich.console import Console

    from lss.planner import Search, find_hardware
    from lss.planner.tracers import Tracers

    def build(settings: Sequence[str], ranks: int) -> Config:
        found = load_config(path, [*overrides, *settings])
        return found.resolved(ranks) if ranks else found

    hardware, console, began = find_hardware(options.gpu), Console(), time.monotonic()
    fixed = {override.split("=", 1)[0] for override in overrides}
    # processes are forked before the console's thread begins
    with Tracers() as tracers, console.status("planning") as status:
        count = 0

        def note(tried: Tried) -> None:
            nonlocal count
            count += 1
            status.update(f"{count} planned; {' '.join(tried.settings)}")

        looking = Search(build, hardware, fixed, note, tracers)
        if options.search:
            tried, what = looking.best(ranks), f"the fastest on {ranks:,} x {hardware.name}"
        elif options.longest:
            found, tokens = looking.longest(ranks)
            tried, what = [found] if found else [], f"{tokens:,} tokens are the longest on {ranks:,} x {hardware.name}"
        else:
            found, ranks = looking.fewest()
            tried, what = [found] if found else [], f"{ranks:,} x {hardware.name} are the fewest, of powers of two"
    if folder is not None and tried:
        name = {"plan": config.name}
        rows = [plan_row(build(t.settings, ranks), t.plan, t.settings, t.why) if t.plan is not None else
                name | {"settings": " ".join(t.settings), "fits": False, "why": t.why} for t in tried]  # fmt: skip
        write_plans(folder, rows)
    if not tried or not tried[0].fits:
        _print_table(tried, console)
        print("nothing fits; give more devices, a shorter data.seq_len or a smaller model")
        return 1
    print(f"{config.name}: {what}, by {count} plans in {time.monotonic() - began:.0f} s")
    _print_table(tried, console)
    print("settings: " + " ".join(tried[0].settings))
    if options.fewest:
        print("the most frugal settings; --search on so many devices finds the fastest")
    return 0


def _print_table(tried: Sequence[Tried], console: object) -> None:
    from rich.console import Console
    from rich.table import Table

    from lss.planner.remedies import size

    assert isinstance(console, Console)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("settings", "s a step", "tokens/s", "MFU", "device", "host", "why not"):
        table.add_column(title, justify="left" if title in ("settings", "why not") else "right", overflow="fold")
    for candidate in tried:
        plan, cells = candidate.plan, ["", "", "", "", ""]
        if plan is not None:
            cells = [f"{plan.step:.3g}", f"{plan.tokens / plan.step:,.0f}", f"{100 * plan.mfu:.1f} %", size(plan.peak.bytes),
                     size(plan.peak.host) if plan.peak.host else ""]  # fmt: skip
        table.add_row(" ".join(candidate.settings), *cells, candidate.why)
    # where nobody looks on, lines are as long as they come
    (console if console.is_terminal else Console(width=240)).print(table)
