"""`lss plan`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lss.cli.main import split_config
from lss.cli.plan_out import make_folder, plan_row, write_plans
from lss.cli.plan_plot import picture_file, write_picture
from lss.config import Config, load_config
from lss.config.errors import refuse

if TYPE_CHECKING:
    from lss.planner import Plan

PARTS = {
    "attention": "scores and values, forward and backward",
    "matrices": "all other matrix products, with what is computed again",
    "bubbles": "waiting for the rank that has most of the scores",
    "exchange": "keys and their gradients, as far as attention does not hide them",
    "gradients": "summing them, as far as backward does not hide it",
    "offload": "copies to the host and back, as far as the above does not hide them",
    "update": "of the weights",
}


def plan(options: argparse.Namespace) -> int:
    """Print what a config will take on so many devices; 1 where it does not fit."""
    config = planned(options)  # first: it needs no torch
    picture = picture_file(options.plot) if options.plot is not None else None
    folder = None if options.out is None else make_folder(options.out)

    from lss.planner import CLASSES, Traces, find_hardware, make_plan, plan_curve
    from lss.planner.remedies import remedies, size

    hardware, traces = find_hardware(options.gpu), Traces()
    found = make_plan(config, hardware, traces)
    parallel = config.parallel
    print(f"{config.name} on {found.ranks:,} x {hardware.name}: cp={parallel.cp}, dp={parallel.dp}, {parallel.strategy}, "
          f"{config.train.batch_size:,} x {config.data.seq_len:,} tokens a step")  # fmt: skip
    verdict = "fits" if found.fits else "does not fit"
    print(f"memory: {size(found.peak.bytes)} of {size(found.room)} at the peak, in {found.peak.phase}: {verdict}")
    for name, count in found.peak.classes.items():
        print(f"  {name:<14} {size(count):>12}  {CLASSES[name]}")
    if found.peak.host:
        print(f"  {'host':<14} {size(found.peak.host):>12}  {CLASSES['host']}")
    if not found.fits:
        label = max(found.peak.classes, key=found.peak.classes.__getitem__)
        print(f"  of {label} less is needed with {remedies(label, config)}")
    _print_time(found)
    _print_cost(found, options)
    told = "measured" if hardware.measured else "taken from data sheets, none of them measured"
    print(f"rates: {told}; {hardware.source}")
    if picture is not None or folder is not None:
        curve = plan_curve(config, hardware, traces)
        if picture is not None:
            write_picture(picture, curve, hardware)
        if folder is not None:
            write_plans(folder, [plan_row(config, found, split_config(options.config)[1], curve=curve)])
    return 0 if found.fits else 1


def plannable(path: str | None, overrides: list[str]) -> Config:
    """The config as it is read.

    Raises:
        Refused: by its own checks, or a model that is not planned.
    """
    config = load_config(path, overrides)
    if config.model.hf:
        raise refuse("model.hf", config.model.hf, "models of transformers are not planned; give its shape in [model]")
    if config.model.kind == "encoder_decoder":
        raise refuse("model.kind", '"encoder_decoder"', 'no time is known of its two attentions; use "decoder" or "encoder"')
    return config


def devices(config: Config, options: argparse.Namespace) -> int:
    """How many are planned for: as many as are asked for, or as the config needs."""
    cp = config.parallel.cp
    return options.gpus or config.parallel.dp * (cp if isinstance(cp, int) else 1)


def planned(options: argparse.Namespace) -> Config:
    """The config for so many devices: dp is what cp leaves of them, and the batch has a sequence for each dp rank at least.

    Raises:
        Refused: by the config's own checks, or a number of devices that cp does not divide.
    """
    path, overrides = split_config(options.config)
    config = plannable(path, overrides)
    ranks = devices(config, options)
    given = {override.split("=", 1)[0] for override in overrides}
    cp = config.parallel.cp
    if "parallel.dp" not in given and isinstance(cp, int):
        if ranks % cp:
            raise refuse("--gpus", ranks, f"parallel.cp={cp} does not divide it; use a multiple of {cp}")
        overrides = [*overrides, f"parallel.dp={ranks // cp}"]
        share = ranks // cp * config.train.accumulate
        if "train.batch_size" not in given and config.train.batch_size % share:
            overrides.append(f"train.batch_size={share * max(1, config.train.batch_size // share)}")
    return load_config(path, overrides).resolved(ranks)


def _print_time(found: Plan) -> None:
    rate, part = found.tokens / found.step, 100 * found.mfu
    print(f"time: {found.step:.3g} s a step, {rate:,.0f} tokens/s, {part:.1f} % of the peak by model FLOPs")
    for name, seconds in found.seconds.items():
        print(f"  {name:<14} {seconds:>10.3f} s  {PARTS[name]}")
    shown = ", ".join(f"{purpose} {size / 2**20:,.1f} MiB" for purpose, size in found.payload.items() if size >= 2**20)
    print(f"collectives of a rank and step: {shown or 'less than a MiB'}")


def _print_cost(found: Plan, options: argparse.Namespace) -> None:
    hours = found.ranks * 1e9 / found.tokens * found.step / 3600
    joules = found.ranks * found.hardware.watts * found.step / found.tokens
    cost = "" if options.price is None else f", {hours * options.price:,.0f} at {options.price:g} an hour"
    print(f"a billion tokens: {hours:,.1f} device hours{cost}, {1e9 * joules / 3.6e6:,.0f} kWh by the devices' rated power")
    if options.tokens is not None:
        days = options.tokens / found.tokens * found.step / 86400
        print(f"{options.tokens:.3g} tokens: {days:,.2f} days")
