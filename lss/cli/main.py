"""Parsing the command line and turning outcomes into exit statuses.

0 done; 1 failed; 2 refused (bad config, data or environment: one sentence, no traceback); 130 and 143 stopped by
SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any

from lss.cli.bench_options import add_bench
from lss.cli.use_options import add_eval, add_generate, rank_arguments
from lss.config import LARGEST, show
from lss.config.errors import Failed, FailedElsewhere, Refused, SaidElsewhere, Stopped, refuse
from lss.train.signals import Signals, is_first_rank

# What the numbers among the options may be, lowest and highest.
RANGES = {
    "--nproc": (1, 1 << 16),
    "--max-restarts": (0, 1 << 16),
    "--rendezvous-timeout": (0.001, 86400),
    "--seq-len": (1, LARGEST),
    "--batch": (1, LARGEST),
    "--repeat": (1, 1 << 20),
    "--seconds": (0, 86400),
    "--processes": (1, 1024),
    "--check-upto": (0, LARGEST),
    "--memory": (1e-6, 1 << 20),
    "--gpus": (1, 1 << 24),
    "--price": (0, 1e9),
    "--tokens": (1, 1e18),
    "--granule": (1, LARGEST),
    "--start": (1, LARGEST),
    "--upto": (1, LARGEST),
    "--steps": (1, 1 << 20),
    "--trial-seconds": (1, 1 << 24),
    "--window": (1, LARGEST),
    "--attention-window": (0, LARGEST),
    "--attention-upto": (0, LARGEST),
    "--stride": (1, LARGEST),
    "--max-new-tokens": (1, LARGEST),
    "--top-k": (0, LARGEST),
    "--seed": (0, LARGEST),
}
VERBS = ("train", "check", "eval", "generate", "plan", "bench", "data", "export", "verify", "report")


class _Parser(argparse.ArgumentParser):
    """Argparse with refusals of one sentence."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise Refused(f"{self.prog}: {message[0].lower()}{message[1:]} (see {self.prog} --help).")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(prog="lss", description="Train transformers on sequences too long for one device, exactly.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    train = verbs.add_parser("train", help="train a model", description="Train a model; ranks share each sequence.")
    _config_arguments(train)
    train.add_argument("--out", metavar="DIR", help="the run's folder (default runs/NAME-of-config)")
    train.add_argument("--max-restarts", type=int, default=0, metavar="K",
                       help="with --nproc: start all ranks again up to K times where one is lost (default 0)")  # fmt: skip

    check = verbs.add_parser(
        "check",
        help="prove your config: one rank against N",
        description="Compare loss and every gradient of your config, at a short length, on one rank and on all.",
    )
    _config_arguments(check)
    check.add_argument("--hf", metavar="MODEL", help="a Hugging Face model instead: a folder, or OWNER/NAME on the Hub")

    add_eval(verbs)
    add_generate(verbs)
    _add_plan(verbs)
    add_bench(verbs, _Parser)

    data = verbs.add_parser("data", help="fetch or describe data")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Parser)
    fetch = actions.add_parser("fetch", help="download a known corpus and check its SHA-256")
    fetch.add_argument("name", help="enwik8")
    fetch.add_argument("--to", metavar="DIR", default="data", help="folder to put it in (default data)")
    info = actions.add_parser("info", help="counts and a sample of a file, folder or glob")
    info.add_argument("path", nargs="?", default="", help="default: the running Python's standard library sources")
    info.add_argument("--seq-len", type=int, default=512, metavar="S", help="sequence length (default 512)")
    info.add_argument("--token-bytes", type=int, default=2, choices=(2, 4), help="of an id in .bin files (default 2)")
    _tokenize_arguments(actions.add_parser("tokenize", help="make token files of text, JSON lines, Parquet or genomes"))

    export = verbs.add_parser("export", help="write a checkpoint's weights as one safetensors file, or for transformers")
    export.add_argument("checkpoint", metavar="CKPT", help="a folder such as runs/tiny/checkpoints/step_300, or a run's")
    export.add_argument("-o", "--output", required=True, metavar="FILE", help="the file to write, or the folder")
    export.add_argument("--format", default="safetensors",
                        help="safetensors (default); hf: a folder for from_pretrained; adapter: one for peft")  # fmt: skip

    verify = verbs.add_parser("verify", help="check every byte of a checkpoint")
    verify.add_argument("checkpoint", metavar="CKPT", help="a folder such as runs/tiny/checkpoints/step_300, or a run's")

    report = verbs.add_parser("report", help="make one HTML page of runs, benches and plans")
    report.add_argument("folders", nargs="+", metavar="DIR",
                        help="of a run, or of rows by lss bench or lss plan --out; or a .jsonl of such")  # fmt: skip
    report.add_argument("-o", "--output", metavar="FILE", help="default DIR/report.html of the first")
    return parser


def _tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or globs")
    parser.add_argument("--tokenizer", required=True, metavar="NAME",
                        help="a folder or OWNER/NAME of a Hugging Face tokenizer, nucleotide, or series")  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the token files")
    parser.add_argument("--format", default="auto", help="auto (by the files' names), text, jsonl, parquet or fasta")
    parser.add_argument("--columns", default="", metavar="A,B", help="of a series: names or numbers (default all)")
    parser.add_argument("--bins", type=int, default=64, metavar="N", help="of a series: bins of each column (default 64)")
    parser.add_argument("--binning", default="quantile", choices=("quantile", "uniform"),
                        help="of a series: bins of equally many training values (default), or of equal width")  # fmt: skip
    parser.add_argument("--nan", action="store_true", help="of a series: NaN has an id of its own; else it is refused")
    parser.add_argument("--held-out", type=float, default=0.05, metavar="X",
                        help="of a series: fraction at its end on which no bins are fitted (default 0.05)")  # fmt: skip
    parser.add_argument("--bins-of", metavar="DIR", help="of a series: take the bins of this folder of tokens")
    parser.add_argument("--field", default="", metavar="NAME", help="a record's text (default text, with --chat messages)")
    parser.add_argument("--chat", action="store_true",
                        help="records are conversations, or prompt and completion; only answers are trained on")  # fmt: skip
    parser.add_argument("--processes", type=int, default=None, metavar="N", help="default: one a core")


def _add_plan(verbs: Any) -> None:
    plan = verbs.add_parser("plan", help="what a config will take: memory, time, cost",
                            description="Say what a step takes, on devices that need not be here.")  # fmt: skip
    plan.add_argument("config", nargs="*", metavar="CONFIG.toml | key=value", help="as for lss train")
    plan.add_argument("--gpus", type=int, metavar="N", help="devices; sets parallel.dp, and train.batch_size to it at least")
    plan.add_argument("--gpu", default="h100", metavar="NAME",
                      help="h100 (default), h200, a100, v100, mi300x, cpu or FILE.json")  # fmt: skip
    plan.add_argument("--price", type=float, metavar="P", help="of a device and hour, in your money")
    plan.add_argument("--tokens", type=float, metavar="T", help="say how long training on so many takes")
    question = plan.add_mutually_exclusive_group()
    question.add_argument("--search", action="store_true", help="find the fastest settings; key=value stay as given")
    question.add_argument("--longest", action="store_true", help="find the longest sequence that fits")
    question.add_argument("--fewest", action="store_true", help="find the fewest devices that data.seq_len fits on")
    question.add_argument("--calibrate", metavar="FILE.json", help="measure this machine, and write what --gpu then reads")
    plan.add_argument("--nproc", type=int, metavar="N", help="with --calibrate: start N ranks on this machine")
    plan.add_argument("--seconds", type=float, default=600.0, metavar="T", help="of --calibrate: nothing long starts later")
    question.add_argument("--compare", action="store_true", help="every strategy, over ranks (to --gpus) and lengths")
    plan.add_argument("--out", metavar="DIR",
                      help="write plans as rows there, for lss report; with --compare also tables and plots")  # fmt: skip
    plan.add_argument("--plot", metavar="FILE", help="draw memory over the moments of a step, as .svg or .png")


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="*", metavar="CONFIG.toml | key=value",
                        help="a config file and overrides such as optim.lr=1e-3")  # fmt: skip
    rank_arguments(parser)


def split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Tell the config file from the overrides: an override has a '=' and names no file."""
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise refuse("CONFIG", files[1], f"one config file is read, and {files[0]} came first; overrides are key=value")
    return (files[0] if files else None), [a for a in arguments if "=" in a]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
            near = difflib.get_close_matches(arguments[0], VERBS, n=1)
            raise refuse("VERB", arguments[0], f"unknown; {f'nearest is {near[0]}' if near else 'use ' + ', '.join(VERBS)}")
        _refuse_threads()
        # intermixed, so that overrides may stand before and after options
        options = _parse(arguments)
        return _run(options, arguments)
    except SaidElsewhere:
        return 2
    except Refused as refusal:
        print(f"lss: {refusal}", file=sys.stderr)
        return 2
    except FailedElsewhere:
        return 1
    except Failed as failure:
        print(f"lss: {failure}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if str(stopped):
            print(f"lss: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # whoever read the output, `head` for one, wants no more of it; the interpreter's own last flush must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _refuse_threads() -> None:
    """Refuse an OMP_NUM_THREADS that the OpenMP library would complain of, when torch loads it, and pass over."""
    text = os.environ.get("OMP_NUM_THREADS")
    if text is None:
        return
    if not all(part.strip().isascii() and part.strip().isdigit() and 0 < int(part) < 1 << 16 for part in text.split(",")):
        raise refuse("OMP_NUM_THREADS", repr(text[:60]), "give a whole number of threads, 1 or more, or unset it")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [a for a in rest if a.startswith("-") or not hasattr(options, "config")]
    if unknown:
        parser.error(f"unrecognized argument {unknown[0]}")
    for option, (low, high) in RANGES.items():
        value = getattr(options, option[2:].replace("-", "_"), None)
        if value is not None and not low <= value <= high:
            raise refuse(option, show(value), f"give a number from {low} to {high}")
    if rest:
        options.config = [*options.config, *rest]
    return options


def _expand_segments() -> None:
    """Let CUDA's allocator grow its blocks, unless the user has set its options, where there is a driver for GPUs.

    Sequences of other lengths, tiles' last ones and gathers of other sizes otherwise leave gaps that nothing fits into. Read
    when the allocator is first used, so it is set before torch is loaded; started ranks inherit it. Symmetric memory is not
    concerned: torch allocates it apart, by `lss.comm.symmetric`'s own calls, and this allocator never sees it.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
    if os.path.exists("/proc/driver/nvidia/version") and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def _plan(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.out is not None and options.calibrate:
        raise refuse("--out", options.out, "--calibrate writes its own file; leave it out")
    asked = [name for name in ("search", "longest", "fewest", "calibrate", "compare") if getattr(options, name)]
    if options.plot is not None and asked:
        raise refuse("--plot", options.plot, f"it draws one plan, not --{asked[0]}; leave one of the two out")
    if options.calibrate:
        from lss.cli.plan_calibrate import calibrate

        return calibrate(options, arguments)
    if options.compare:
        from lss.cli.plan_compare import compare

        return compare(options)
    if options.search or options.longest or options.fewest:
        from lss.cli.plan_search import search

        return search(options)
    from lss.cli.plan import plan

    return plan(options)


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.verb in ("train", "bench", "eval", "generate"):
        _expand_segments()
    # each verb's room is imported only when it is asked for: torch alone takes seconds
    if options.verb == "train":
        # read when torch is loaded: where a rank is lost, its warnings of broken connections would bury what the watch says
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # one rank of many speaks for all
        with Signals(say=is_first_rank(os.environ)) as signals:
            from lss.cli.train import train

            return train(options, arguments, signals)
    if options.verb == "check":
        from lss.cli.check import check

        return check(options, arguments)
    if options.verb == "eval":
        from lss.cli.eval import evaluate

        return evaluate(options, arguments)
    if options.verb == "generate":
        from lss.cli.generate import generate

        return generate(options, arguments)
    if options.verb == "plan":
        return _plan(options, arguments)
    if options.verb == "bench":
        from lss.cli.bench import bench

        return bench(options, arguments)
    if options.verb == "data":
        from lss.cli.data import data

        return data(options)
    if options.verb == "export":
        from lss.cli.export import export

        return export(options)
    if options.verb == "verify":
        from lss.cli.verify import verify

        return verify(options)
    from lss.cli.report import report

    return report(options)
