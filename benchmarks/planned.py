"""Plans beside what steps took: `python benchmarks/planned.py --page docs/planner.md` writes its table anew.

Every training step of this library in `benchmarks/results` (rows of `lss bench train` and `lss bench length`) is planned by
the config and the settings of its row's command, on the GPU that it ran on. A step of `lss bench length --steps 1` has no
optimizer's state yet, which is left out of its plan. Ends with how many are within the bounds.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

from lss.config import Config, load_config
from lss.planner import HARDWARE, Hardware, Plan, Traces, make_plan

BEGIN, END = "<!-- table of plans -->", "<!-- end of plans -->"
TIME_BOUND, MEMORY_BOUND = 0.15, 0.10
HEAD = ("", "GPUs", "tokens", "s a step, planned", "measured", "", "GiB at the peak, planned", "measured", "")
# peaks that had leftovers of the models before them (docs/benchmarks.md): (file, GPUs)
BESIDE_LEFTOVERS = {("small-2xh100.jsonl", 2)}
SECTION = re.compile(r"(data|memory|model|optim|parallel|train)\.\w+=")


def config_of(row: dict) -> Config:
    """What a row's command trained."""
    words = shlex.split(row["command"])
    (file,) = [word for word in words if word.endswith(".toml")]
    given = [word for word in words if SECTION.match(word) and " " not in word and ";" not in word]
    varied = [f"{key}={value}" for key, value in row["options"].items() if "." in key]
    return load_config(file, [*given, *varied, f"data.seq_len={row['tokens']}"]).resolved(row["world_size"])


def hardware_of(row: dict) -> Hardware:
    """The GPU that it ran on."""
    return HARDWARE["h200" if "H200" in row["gpu"] else "h100"]


def name_of(row: dict, config: Config) -> str:
    """What tells this row from the others."""
    parts = [row["model"], f"{row['layers']} layers", f"checkpointing {config.memory.checkpointing}"]
    parts += ["residual in bfloat16"] * (config.model.residual == "compute")
    parts += ["activations on the host"] * (config.memory.offload == "host")
    parts += [f"{config.memory.offload_gib:g} GiB of it"] if config.memory.offload_gib != "auto" else []
    parts += ["optimizer on the host"] * (config.memory.optimizer == "host")
    parts += ["not compiled"] * (not config.train.compile)
    parts += ["a first step"] * ("--steps 1" in row["command"]) + ["H200"] * ("H200" in row["gpu"])
    return ", ".join(parts)


def bytes_of(row: dict, plan: Plan) -> int:
    """The plan's peak, of a step like the row's."""
    return plan.peak.bytes - ("--steps 1" in row["command"]) * plan.peak.classes.get("optimizer", 0)


def main() -> None:
    """Plan every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="benchmarks/results")
    parser.add_argument("--page", help="put the table between this page's marks (default: print it)")
    options = parser.parse_args()
    lines, traces = [f"| {' | '.join(HEAD)} |", "|---|" + "---:|" * (len(HEAD) - 1)], Traces()
    times, peaks = list[float](), list[float]()
    for file in sorted(Path(options.results).glob("*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            if row.get("bench") not in ("train", "length") or row["strategy"] != "lss" or row["rival"] or not row["ms"]:
                continue
            config = config_of(row)
            plan = make_plan(config, hardware_of(row), traces)
            times.append(plan.step / (row["ms"] / 1e3) - 1)
            cells = [name_of(row, config), row["world_size"], f"{row['tokens']:,}", f"{plan.step:.4g}",
                     f"{row['ms'] / 1e3:.4g}", f"{times[-1]:+.0%}", f"{bytes_of(row, plan) / 2**30:.1f}"]  # fmt: skip
            if (file.name, row["world_size"]) in BESIDE_LEFTOVERS:
                cells += ["", ""]
            else:
                peaks.append(bytes_of(row, plan) / row["peak_bytes"] - 1)
                cells += [f"{row['peak_bytes'] / 2**30:.1f}", f"{peaks[-1]:+.0%}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], flush=True)
    within = [sum(abs(x) <= bound for x in found) for found, bound in ((times, TIME_BOUND), (peaks, MEMORY_BOUND))]
    lines += ["", f"Seconds are within {TIME_BOUND:.0%} in {within[0]} of {len(times)}, bytes within {MEMORY_BOUND:.0%} in "
                  f"{within[1]} of {len(peaks)}."]  # fmt: skip
    table = "\n".join(lines)
    print(table if not options.page else lines[-1])
    if options.page:
        page = Path(options.page)
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    main()
