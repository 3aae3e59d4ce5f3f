"""Every command and every program that the pages show runs, at a small size, or says in its fence why it does not.

A fence is ```sh or ```python, and what is not run has `not run: REASON` behind. Blocks of a page run one after another in a
folder of their own, on one rank: `--nproc` is left out, and settings at the end make models and runs small.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import os
import re
import shlex
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest
import torch

from lss.cli import main
from tests.data.tokenizers import save_tokenizer
from tests.distributed.pool import pool
from tests.integrations.hf_cases import build
from tests.test_house import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?P<mark><!-- [^\n]* -->\n)?^```(?P<kind>sh|bash|python)(?P<info>[^\n]*)\n(?P<code>.*?)^```$",
                   re.DOTALL | re.MULTILINE)  # fmt: skip
REASON = re.compile(r" not run: \S.*")
# programs that other tests run as they stand, by the mark above them or by their page
ELSEWHERE = {"<!-- ten lines -->": "tests/test_examples.py", "<!-- five lines -->": "tests/integrations/test_hf_check.py",
             "docs/masks.md": "tests/test_docs.py"}  # fmt: skip

RUN = ["data.seq_len=64", "train.batch_size=2", "train.steps=2", "train.eval_samples=2", "train.dtype=float32",
       "parallel.dp=1"]  # fmt: skip
MODEL = ["model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_mlp=48"]
# of a plan only the depth: its traces hold no data
SMALL = {"train": [*RUN, *MODEL], "check": [*RUN, *MODEL], "plan": ["model.n_layers=2"], "data": [], "export": [],
         "report": [], "verify": [], "eval": [], "generate": []}  # fmt: skip


def blocks(page: Path):
    """(line of the page, mark, kind, what stands behind it, code) of every block."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start("code")), (m["mark"] or "").strip(), m["kind"], m["info"], m["code"])
            for m in FENCE.finditer(text)]  # fmt: skip


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def to_run(page: Path):
    """(line, kind, code) of the blocks that run here."""
    return [(line, kind, code) for line, mark, kind, info, code in blocks(page)
            if not info and mark not in ELSEWHERE and not (kind == "python" and name(page) in ELSEWHERE)]  # fmt: skip


def commands(code: str):
    """The commands of a block, as words, each with the block's line that it starts in."""
    number = 0
    for is_blank, lines in groupby(code.replace("\\\n", "\0").split("\n"), lambda text: not text.strip()):
        for text in lines:
            if not is_blank:
                yield number, shlex.split(text.replace("\0", " "), comments=True)
            number += 1 + text.count("\0")


def shrunk(words):
    """A command's words without its ranks and with the settings of a small run; wildcards and homes as a shell has them."""
    assert Path(words[0]).name == "lss", f"{words[0]} is not run here: write `not run: REASON` behind the fence's language"
    kept, following = [], iter(words[1:])
    for word in following:
        if word == "--nproc":
            next(following)
            continue
        kept += sorted(glob.glob(word)) if "*" in word and "=" not in word else [os.path.expanduser(word)]
    small = SMALL[kept[0]]
    if any(word.startswith("model.hf=") for word in kept) or "--hf" in kept:
        small = RUN
    small = [s for s in small if s != "train.batch_size=2" or not any(w.startswith("train.batch_size=") for w in kept)]
    return kept + small


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    if find_spec("transformers"):
        build("llama", torch.float32, vocab_size=290).save_pretrained(folder)
        save_tokenizer(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, model):
    """A folder with what the pages speak of: books, records, a genome, a model, configs."""
    text = "the quick brown fox jumps over the lazy dog\n" * 400
    for folder in ("books", "notes", "corpus", "OWNER"):
        (tmp_path / folder).mkdir()
    for book in ("book.txt", "books/a.txt", "books/b.txt", "notes/c.txt", "web.txt"):
        (tmp_path / book).write_text(text)
    (tmp_path / "corpus" / "a.jsonl").write_text(json.dumps({"body": text}) + "\n")
    said = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the dog"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    for genome in ("genome.fa.gz", "ecoli.fa.gz"):
        (tmp_path / genome).write_bytes(gzip.compress(b">x\n" + b"ACGGT" * 900 + b"\n"))
    for target in ("FOLDER", "OWNER/NAME"):
        (tmp_path / target).symlink_to(model)
    for target in ("configs", "examples"):
        (tmp_path / target).symlink_to(ROOT / target)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(code, page, line, folder):
    """A program as it stands, on a rank of the pool."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "__main__"})  # noqa: S102
    finally:
        os.chdir(before)


@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=name)
def test_every_block_of_a_page_runs(page, place):
    for package, sign in (("transformers", "FOLDER"), ("peft", "lora_rank=")):
        if sign in page.read_text() and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    for line, kind, code in to_run(page):
        if kind == "python":
            pool(1).run(run_python, code, page, line, place)
            continue
        for offset, words in commands(code):
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                status = main(shrunk(words))
            assert status == 0, f"{name(page)}:{line + offset + 1}: {shlex.join(words)}\n{said.getvalue()}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_not_run_says_why_and_no_command_stands_without_a_fence(page):
    text = page.read_text()
    fences = blocks(page)
    assert len(fences) == len(re.findall(r"^```(?:sh|bash|python)\b", text, re.MULTILINE))
    for line, _, _, info, _ in fences:
        assert not info or REASON.fullmatch(info), f"{name(page)}:{line}: write `not run: REASON`"
    loose = re.findall(r"^    (?:lss [a-z]|\.venv/bin/|make |torchrun |pip |srun |python ).*$", text, re.MULTILINE)
    assert [command for command in loose if not any(command in code for *_, code in fences)] == []


def test_blocks_that_run_elsewhere_do():
    for what, file in ELSEWHERE.items():
        assert what in (ROOT / file).read_text() or Path(what).name in (ROOT / file).read_text()
        assert any(what in (mark, name(page)) for page in PAGES for _, mark, *_ in blocks(page))
