"""Curves of several runs in one SVG, by the names that are given them.

    python benchmarks/curves.py curves.svg loss "1 rank=runs/one" "2 ranks=runs/two"
    python benchmarks/curves.py held-out.svg eval_loss "1 rank=runs/one"          # any number of metrics.jsonl
    python benchmarks/curves.py bits.svg loss --scale 1.4427 --label "bits per base" genome=runs/ecoli
"""

import argparse
import json
from pathlib import Path

from lss.report.plots import Curve, line_plot


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("key")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--label")
    options = parser.parse_args(arguments)
    curves = []
    for number, given in enumerate(options.runs):
        name, _, run = given.partition("=")
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if options.key in row]
        values = [row[options.key] * options.scale for row in rows]
        curves.append(Curve(name, [row["step"] for row in rows], values, number, points=len(rows) < 20))
    Path(options.out).write_text(line_plot(curves, options.label or options.key))


if __name__ == "__main__":
    main()
