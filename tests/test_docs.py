"""The examples of docs/masks.md run as they stand, on two ranks as on one, and its configs load."""

from __future__ import annotations

import re

import pytest
import torch

import lss
from lss.config import load_config
from tests.distributed.pool import pool
from tests.test_house import ROOT

PAGE = ROOT / "docs" / "masks.md"
FENCE = re.compile(r"(<!-- setup -->\n)?^```(python|toml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language):
    """(line of the page, whether later blocks need it, code) of every block in this language."""
    page = PAGE.read_text()
    matches = [match for match in FENCE.finditer(page) if match[2] == language]
    found = [(page.count("\n", 0, match.start(3)), bool(match[1]), match[3]) for match in matches]
    assert len(found) == page.count(f"```{language}\n")
    return found


EXAMPLES = [(line, code) for line, setup, code in blocks("python") if not setup]
CONFIGS = [(line, code) for line, _, code in blocks("toml")]


def results_of(line):
    """Run the setups above this line and the example at it; what it leaves as `out`, whole, and as `loss`."""
    space: dict = {}
    for at, setup, code in blocks("python"):
        if at == line or (setup and at < line):
            # blank lines in front, so that a failure names the page's own line
            exec(compile("\n" * at + code, str(PAGE), "exec"), space)  # noqa: S102
    results = {}
    if "out" in space:
        results["out"] = lss.unshard(space["out"], space["mesh"], seg=space.get("seg"))
    if "loss" in space:
        results["loss"] = space["loss"]
        space["loss"].backward()
        results["norm"] = lss.clip_grad_norm_(space["model"], 0.0)
    for name in ("sinks", "memory"):
        if name in space and space[name].grad is not None:
            results[name] = space[name].grad
    return {name: value.detach() for name, value in results.items()}


@pytest.mark.parametrize("line", [line for line, _ in EXAMPLES])
def test_an_example_runs_and_is_the_same_on_two_ranks_as_on_one(line):
    (alone,) = pool(1).run(results_of, line)
    assert alone, "an example leaves what it computed as `out` or `loss`"
    for found in pool(2).run(results_of, line):
        assert found.keys() == alone.keys()
        for name, value in found.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, alone[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("line, code", CONFIGS, ids=[str(line) for line, _ in CONFIGS])
def test_a_config_loads_and_fits_two_ranks(line, code, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(code)
    assert load_config(path).resolved(2).parallel.cp == 2


def test_the_page_shows_every_rule_of_attention():
    code = "".join(code for _, code in EXAMPLES)
    rules = ("cu_seqlens", "window", "causal", "prefix", "attention_mask", "kv_seg", "mask_mod", "softcap", "alibi_slopes",
             "sinks", "dropout_p", "seq_len", "seg")  # fmt: skip
    assert [rule for rule in rules if f"{rule}=" not in code] == []
