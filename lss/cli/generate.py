"""`lss generate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lss.cli.letters import Letters, letters_of
from lss.cli.ranks import launch, must_launch, planned_ranks, rendezvous_timeout, share_cores, told_once
from lss.cli.target import Target, open_target, settings_of
from lss.config.errors import refuse

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

MOST_PROMPT = 1 << 30  # bytes


def generate(options: argparse.Namespace, arguments: list[str]) -> int:
    """Generate as one rank, or start the ranks that do."""
    rendezvous, ranks = rendezvous_timeout(options), planned_ranks(options.nproc)
    with told_once():
        target = open_target(options.model, settings_of(options.config), ranks)
        letters, ids = _refuse_early(target, options)
    if must_launch(options.nproc):
        return launch(options.nproc, arguments)
    return _generate(target, options, letters, ids, rendezvous)


def _refuse_early(target: Target, options: argparse.Namespace) -> tuple[Letters, list[int]]:
    """What can be refused before ranks meet; how text becomes ids, and the prompt's."""
    config = target.config
    _sampling(options)
    if config.model.kind != "decoder":
        raise refuse("model.kind", f'"{config.model.kind}"', "decoders say the next token, and generate")
    if config.parallel.dp > 1:
        raise refuse("parallel.dp", config.parallel.dp, "one text is generated, over all ranks; use 1")
    if config.data.prefix:
        fit = "a prompt whose tokens see each other is not read so here; give data.prefix=0 to read it as a decoder does"
        raise refuse("data.prefix", config.data.prefix, fit)
    letters = letters_of(target, options.tokenizer)
    setting, text = _prompt(options)
    ids = letters.encode(text, setting)
    if not ids:
        raise refuse(setting, "''", "a prompt has one token or more; give some text")
    return letters, ids


def _prompt(options: argparse.Namespace) -> tuple[str, bytes]:
    """(the option that gave it, the prompt)."""
    if (options.prompt is None) == (options.prompt_file is None):
        given = "both" if options.prompt is not None else "none"
        raise refuse("--prompt, --prompt-file", given, "give one of them")
    if options.prompt is not None:
        return "--prompt", options.prompt.encode("utf-8", "surrogateescape")
    path = Path(options.prompt_file).expanduser()
    try:
        if not path.is_file() or path.stat().st_size > MOST_PROMPT:
            raise refuse("--prompt-file", path, f"give a file of at most {MOST_PROMPT:,} bytes")
        return "--prompt-file", path.read_bytes()
    except OSError as error:
        raise refuse("--prompt-file", path, f"cannot be read ({error.strerror})") from None


def _sampling(options: argparse.Namespace) -> Any:
    from lss.infer import Sampling

    return Sampling(options.temperature, options.top_k, options.top_p, options.seed)


def _generate(
    target: Target, options: argparse.Namespace, letters: Letters, ids: list[int], rendezvous: timedelta
) -> int:
    from lss.mesh import close, init_mesh

    share_cores()
    assert isinstance(target.config.parallel.cp, int)
    mesh = init_mesh(cp=target.config.parallel.cp, rendezvous=rendezvous)
    try:
        with told_once(mesh):
            _continue(target, options, letters, ids, mesh)
    finally:
        close()  # when the model is gone, whose groups would else outlive it
    return 0


def _continue(target: Target, options: argparse.Namespace, letters: Letters, ids: list[int], mesh: DeviceMesh) -> None:
    import torch

    from lss.context_parallel import AttentionOptions
    from lss.infer import generate as generated
    from lss.train.steps import autocast

    parallel, dtype = target.config.parallel, target.config.train.dtype
    # however it was trained: what each rank holds of the prompt decides, and all strategies compute the same
    attention = AttentionOptions(kernel=parallel.kernel, transport=parallel.transport, scan_kernel=parallel.scan_kernel)
    order = "head_tail" if parallel.order == "balanced" else parallel.order
    told = _Told(options, letters, mesh.get_rank() == 0)
    model = target.load_plain(mesh)
    prompt = torch.tensor([ids], device=mesh.device_type)
    told.begin(target, len(ids))
    found = generated(
        model, prompt, mesh, max_new_tokens=options.max_new_tokens, sampling=_sampling(options), order=order,
        options=attention, end=letters.end, autocast=lambda: autocast(dtype, mesh.device_type), seen=told.token,
    )  # fmt: skip
    told.finish(target, found[0].tolist())


class _Told:
    """What the first rank prints: the prompt and what follows it as it comes, or one line of JSON."""

    def __init__(self, options: argparse.Namespace, letters: Letters, first: bool) -> None:
        self._json, self._letters, self._first = options.json, letters, first
        self._prompt = options.prompt or ""
        self._text, self._times, self._length = "", [], 0

    def begin(self, target: Target, length: int) -> None:
        self._length = length
        self._times.append(time.perf_counter())
        if self._first and not self._json:
            print(f"{target.describe()}; a prompt of {length:,} tokens", file=sys.stderr)
            print(self._prompt, end="", flush=True)

    def token(self, tokens: torch.Tensor, _logits: torch.Tensor) -> None:
        if not self._first:
            return
        self._times.append(time.perf_counter())
        if int(tokens[0]) == self._letters.end:
            return
        text = self._letters.more([int(tokens[0])])
        self._text += text
        if not self._json:
            print(_shown(text) if sys.stdout.isatty() else text, end="", flush=True)

    def finish(self, target: Target, ids: list[int]) -> None:
        if not self._first:
            return
        reading = self._times[1] - self._times[0]
        later = self._times[-1] - self._times[1]
        rate = (len(ids) - 1) / later if later > 0 else 0.0
        if self._json:
            parallel = target.config.parallel
            facts = {"model": target.name, "step": None if target.checkpoint is None else target.checkpoint.step,
                     "prompt_tokens": self._length, "tokens": ids, "text": self._text, "cp": parallel.cp,
                     "seconds_to_first": reading, "tokens_per_s": rate}  # fmt: skip
            print(json.dumps(facts), flush=True)
            return
        print(flush=True)
        print(f"{len(ids)} tokens; the first after {reading:.2f} s, then {rate:,.1f} a second", file=sys.stderr)


def _shown(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)
