"""The options of the commands that use a trained model: `lss eval` and `lss generate`."""

from __future__ import annotations

import argparse
from typing import Any


def add_eval(verbs: Any) -> None:
    """`lss eval`."""
    parser = verbs.add_parser(
        "eval",
        help="perplexity and bits per byte of a whole text",
        description="The loss of every token of a text, counted once, with the model's sequences cut over ranks.",
    )
    _model(parser)
    parser.add_argument("--window", type=int, metavar="W",
                        help="read windows of W tokens that overlap, instead of sequences of data.seq_len")  # fmt: skip
    parser.add_argument("--stride", type=int, metavar="T",
                        help="from a window to the next (default half of W): each token sees W - T or more")  # fmt: skip
    parser.add_argument("--part", metavar="PART",
                        help="all, held-out or training; default all, of the run's own data held-out")  # fmt: skip
    parser.add_argument("--per-token", metavar="FILE", help="write each token's loss there: a .npy or .jsonl file")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="CKPT_OR_HF",
                        help="a run, one of its checkpoints, or a Hugging Face model: a folder or OWNER/NAME")  # fmt: skip
    parser.add_argument("config", nargs="*", metavar="key=value", help="settings such as data.path=book.txt")
    rank_arguments(parser)


def rank_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command takes that runs on ranks which meet."""
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--rendezvous-timeout", type=float, default=60.0, metavar="SECONDS",
                        help="how long ranks wait for one another at the start (default 60)")  # fmt: skip


def add_generate(verbs: Any) -> None:
    """`lss generate`."""
    parser = verbs.add_parser(
        "generate",
        help="continue a prompt, however long",
        description="Continue a prompt that is cut over ranks; keys and values stay cut while tokens come.",
    )
    _model(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what to continue")
    parser.add_argument("--prompt-file", metavar="F", help="a file that has it")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="how many at most (default 100)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="logits are divided by it; 0 takes the likeliest token (default 1)")  # fmt: skip
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw from the likeliest that make the probability P together (default 1: all)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default 0)")
    parser.add_argument("--tokenizer", default="", metavar="NAME",
                        help="of token files' ids: a folder, OWNER/NAME or nucleotide (default: as recorded)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the text")
