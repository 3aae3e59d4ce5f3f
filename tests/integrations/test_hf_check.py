"""`lss check --hf`: the verdict on sound models, and on planted faults."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from lss.cli import main
from tests.distributed.pool import mesh
from tests.integrations.hf_cases import CASES, classes
from tests.integrations.ranks import hf_pool as pool

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


def checked(name, folder, cp, dp=1, fault=None, overrides=()):
    """The verdict, every probe and the worst gradient, with a fault planted in this process."""
    from lss.check import check_hf
    from lss.config import load_config
    from lss.integrations.hf import batch, interface

    made, cls = classes(name)
    folder = folder / str(mesh(cp, dp).get_rank())  # ranks write at the same time
    settings = CASES[name].settings | {"architectures": [cls.__name__]}
    made(**settings).save_pretrained(folder)
    config = load_config(None, ["train.dtype=float64", f"parallel.cp={cp}", f"parallel.dp={dp}", *overrides])
    kept = interface.Rules, batch.Adapter._positions
    if fault == "window":
        interface.Rules = lambda causal, window, *rest, **more: kept[0](causal, None, *rest, **more)
    if fault == "causal":
        interface.Rules = lambda causal, *rest, **more: kept[0](False, *rest, **more)
    if fault == "positions":
        batch.Adapter._positions = lambda self, segment, given, device: segment.positions[None] * 0 + 1
    try:
        result = check_hf(str(folder), config, mesh(cp, dp))
    finally:
        interface.Rules, batch.Adapter._positions = kept
    probes = [(probe.name.split(":")[0], probe.leaked, probe.affected) for at in result.lengths for probe in at.probes]
    errors = [at.gradients[at.worst][0] for at in result.lengths]
    return result.ok, probes, errors, [(at.labels, at.labels_one) for at in result.lengths]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "mixtral", "bert"])
def test_sound_models_pass(name, tmp_path):
    results = pool(2).run(checked, name, tmp_path / name, 2)
    assert all(ok for ok, *_ in results)
    _, probes, errors, labels = results[0]
    assert len(errors) == 2
    assert all(found == one > 0 for found, one in labels)
    names = {name for name, *_ in probes}
    assert names == {"documents", "attention_mask"} | (set() if name == "bert" else {"future"})
    assert all(leaked == 0 and affected > 0 for _, leaked, affected in probes)


def test_data_parallel_ranks_pass(tmp_path):
    assert all(ok for ok, *_ in pool(4).run(checked, "qwen3", tmp_path, 2, 2))


@pytest.mark.parametrize("fault", ["window", "causal", "positions"])
def test_planted_faults_are_found(fault, tmp_path):
    results = pool(2).run(checked, "mistral", tmp_path, 2, fault=fault)
    assert not any(ok for ok, *_ in results)
    _, probes, errors, _ = results[0]
    assert min(errors) > 1e-3
    if fault == "causal":
        assert any(name == "future" and leaked for name, leaked, _ in probes)


@pytest.mark.parametrize("arguments, words", [
    (["--hf", "nowhere"], "no such folder"),
    (["--hf", "{folder}"], "transformers cannot load it"),
    (["--hf", "{folder}", "model.d_model=64"], "model.d_model=64"),
    (["--hf", "{folder}", "train.dtype=bfloat16"], "train.dtype=bfloat16"),
])  # fmt: skip
def test_what_cannot_be_checked_is_refused(arguments, words, tmp_path, capsys):
    assert main(["check", *(a.format(folder=tmp_path) for a in arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]


def saved(folder):
    """A model as `save_pretrained` writes it."""
    import torch

    made, cls = classes("llama")
    torch.manual_seed(0)
    cls(made(**CASES["llama"].settings)).save_pretrained(folder)


def five_lines(folder):
    """The page's lines as they stand; the norm of the gradient that they leave."""
    import torch

    import lss
    from tests.test_house import ROOT

    tokens = torch.randint(96, (1, 45), generator=torch.Generator().manual_seed(0))
    code = (ROOT / "docs" / "huggingface.md").read_text().split("<!-- five lines -->\n```python\n")[1].split("```")[0]
    space = {"FOLDER": str(folder), "tokens": tokens}
    exec(code, space)  # noqa: S102
    return float(lss.clip_grad_norm_(space["model"], 0.0))


def test_the_pages_five_lines_run_and_give_the_same_on_two_ranks(tmp_path):
    pool(1).run(saved, tmp_path)
    (alone,) = pool(1).run(five_lines, tmp_path)
    for found in pool(2).run(five_lines, tmp_path):
        assert found == pytest.approx(alone, rel=1e-5)
