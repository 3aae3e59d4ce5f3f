"""The options of `lss bench`; nothing here imports torch, since every verb's start builds all parsers."""

from __future__ import annotations

import argparse
from typing import Any

DTYPES = ("float64", "float32", "float16", "bfloat16")


def add_bench(verbs: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add the verb and its actions."""
    bench = verbs.add_parser("bench", help="time attention and training steps, beside rivals",
                             description="Time what these ranks compute; results are held to the truth first.")  # fmt: skip
    actions = bench.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=parser_class)

    attention = actions.add_parser("attention", help="one layer's attention, forward and backward")
    attention.add_argument("--lengths", metavar="S,S", help="tokens (default 8192 to 131072; 256,512 on a CPU)")
    attention.add_argument("--heads", metavar="N/KxH,...", help="query heads/key heads x size (default 32/8x128; 4/2x16)")
    attention.add_argument("--strategies", default="lss,ring,ulysses", metavar="NAMES", help="default lss,ring,ulysses")
    attention.add_argument("--yardsticks", default="", metavar="NAMES",
                           help="kernels on one device to compare with; default every fused one")  # fmt: skip
    attention.add_argument("--kernels", default="auto", metavar="NAMES", help="default auto; flash4,sdpa_cudnn for one")
    attention.add_argument("--options", action="append", default=[], metavar="NAME=VALUE;...",
                           help='one more variant, "head_chunks=8;regather=false" for one; may be repeated')  # fmt: skip
    attention.add_argument("--check-upto", type=int, default=131072, metavar="S",
                           help="tokens up to which dk and dv are held to float64 too (default 131072)")  # fmt: skip
    attention.add_argument("--graphs-upto", type=int, default=0, metavar="S",
                           help="tokens up to which ours is measured again as CUDA graphs (default 0: never)")  # fmt: skip
    _layer_arguments(attention)
    _run_arguments(attention)

    _add_scan(actions)

    train = actions.add_parser("train", help="whole optimizer steps of a config's model on random tokens")
    train.add_argument("config", nargs="*", metavar="CONFIG.toml | key=value", help="as for lss train")
    train.add_argument("--lengths", metavar="S,S", help="tokens a sequence (default the config's data.seq_len)")
    train.add_argument("--variants", default="", metavar="KEY=VALUE ...;...",
                       help="sets of overrides, ';' between sets and spaces within; an empty one is the config as it is; "
                            "'parallel.strategy=lss;parallel.strategy=tp' for one")  # fmt: skip
    train.add_argument("--plain", action="store_true", help="also the model without parallelize, on one device")
    train.add_argument("--repeat", type=int, default=5, metavar="N", help="steps that are timed (default 5)")
    _run_arguments(train)

    _add_length(actions)

    plot = actions.add_parser("plot", help="pictures of result files")
    plot.add_argument("files", nargs="+", metavar="FILE.jsonl")
    plot.add_argument("--out", default=".", metavar="DIR", help="folder (default the current one)")
    plot.add_argument("--format", default="svg", help="svg or png (default svg)")

    table = actions.add_parser("table", help="Markdown tables of result files, or a page's tables made anew")
    table.add_argument("files", nargs="*", metavar="FILE.jsonl")
    table.add_argument("--page", metavar="FILE.md", help="fill this page's marked tables instead of printing")
    table.add_argument("--results", metavar="DIR", default="benchmarks/results",
                       help="where the page's result files lie (default benchmarks/results)")  # fmt: skip


def _add_scan(actions: Any) -> None:
    scan = actions.add_parser("scan", help="one recurrence, forward and backward, beside attention of its width")
    scan.add_argument("--lengths", metavar="S,S", help="tokens (default 65536 to 1048576; 512,1024 on a CPU)")
    scan.add_argument("--sizes", metavar="N/KxPxH", help="heads/groups x state x size (default 32/1x128x64; 4/1x16x16)")
    scan.add_argument("--heads", metavar="N/KxH", help="of attention (default 16/4x128; 4/2x16)")
    scan.add_argument("--attention-window", type=int, metavar="W",
                      help="of windowed attention beside it, 0 for none (default 4096; 64)")  # fmt: skip
    scan.add_argument("--attention-upto", type=int, default=131072, metavar="S",
                      help="tokens up to which full attention is measured, 0 for never (default 131072)")  # fmt: skip
    scan.add_argument("--kernels", default="auto", metavar="NAMES", help="of the recurrence (default auto)")
    scan.add_argument("--check-upto", type=int, default=4096, metavar="S",
                      help="tokens at which results are held to float64 at most (default 4096)")  # fmt: skip
    _layer_arguments(scan)
    _run_arguments(scan, rivals=False)


def _add_length(actions: Any) -> None:
    length = actions.add_parser("length", help="the longest sequence whose whole training step fits")
    length.add_argument("config", nargs="*", metavar="CONFIG.toml | key=value", help="as for lss train")
    length.add_argument("--variants", default="", metavar="KEY=VALUE ...;...", help="as for lss bench train")
    length.add_argument("--memory", type=float, metavar="GIB", help="of each rank (default what is free)")
    length.add_argument("--layers", default="", metavar="L,L",
                        help="try the model cut to these, 1,2 for one, and draw their peaks out")  # fmt: skip
    length.add_argument("--confirm", action="store_true", help="with --layers: then take steps with the whole model")
    length.add_argument("--granule", type=int, metavar="S", help="lengths are multiples of it (default 1024; 64 on a CPU)")
    length.add_argument("--start", type=int, metavar="S", help="the first length tried (default 8 granules)")
    length.add_argument("--upto", type=int, metavar="S", help="try none longer (default 2^24)")
    length.add_argument("--steps", type=int, default=2, metavar="N",
                        help="steps of a trial; the first has no state of the optimizer yet (default 2)")  # fmt: skip
    length.add_argument("--trial-seconds", type=float, default=3600.0, metavar="T",
                        help="a trial that takes longer has failed (default 3600)")  # fmt: skip
    _run_arguments(length)
    length.add_argument("--trial", default="", help=argparse.SUPPRESS)


def _layer_arguments(parser: argparse.ArgumentParser) -> None:
    """What all benches of one layer take."""
    parser.add_argument("--orders", default="head_tail", metavar="NAMES", help="default head_tail")
    parser.add_argument("--dtype", metavar="DTYPE", help=f"one of {', '.join(DTYPES)} (default bfloat16; float32)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences (default 1)")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="T",
                        help="fewer rounds, but 3, for what would take longer than this (default 30)")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="rounds (default 7)")
    parser.add_argument("--no-plots", action="store_true", help="write rows only")


def _run_arguments(parser: argparse.ArgumentParser, rivals: bool = True) -> None:
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this machine")
    if rivals:
        parser.add_argument("--rivals", default="none", metavar="DIR", help="folder of rivals' adapters (default none)")
    parser.add_argument("--out", metavar="FILE.jsonl", help="append rows to this file; what it has already is skipped")
    parser.add_argument("--only", default="", metavar="WORDS", help="only what has one of these words in its name")
    parser.add_argument("--retry", action="store_true", help="measure again what the file has as failed")
    # what the user typed, for the rows of the ranks that it started
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
