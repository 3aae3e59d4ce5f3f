"""Adapters: their gradients are one process's, they alone are trained and saved, and exports merge them or write them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from lss.checkpoint import read_weights, verify
from lss.cli import main
from lss.config import Refused, load_config
from tests.integrations.ranks import hf_pool as pool
from tests.integrations.train_jobs import adapter_parity, save_model, train_hf

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
# Adam divides a gradient that is 0 but for rounding by itself and eps: with 1e-8 layouts differ by 1e-9 in a few steps.
LORA = ["model.lora_rank=4", "model.lora_targets=q_proj,v_proj", "optim.lr=0.05", "optim.eps=1e-3", "train.steps=6",
        "checkpoint.every=3"]  # fmt: skip


@pytest.mark.parametrize("name, count", [("llama", 28), ("gpt2", 16)])
def test_gradients_of_adapters_are_one_processes(name, count):
    for error, parameter, trained in pool(2).run(adapter_parity, 2, name):
        assert error <= 1e-12, parameter
        assert trained == count


def test_adapters_are_trained_saved_resumed_and_exported(tmp_path, capsys):
    place, ids = tmp_path / "model", tmp_path / "ids"
    pool(1).run(save_model, "llama", str(place), str(ids))
    options = [f"data.path={ids}", *LORA]
    (one,) = pool(1).run(train_hf, 1, str(place), str(tmp_path / "one"), options)
    assert one["losses"][-1] < one["losses"][0]
    sharded = ["parallel.dp=2", "parallel.fsdp=true"]
    pool(4).run(train_hf, 4, str(place), str(tmp_path / "two"), [*options, *sharded], stop_after=3)
    resumed = pool(2).run(train_hf, 2, str(place), str(tmp_path / "two"), options)[0]
    assert resumed["from"] == 3
    assert resumed["losses"] == pytest.approx(one["losses"][3:], rel=1e-11)
    saved = read_weights(verify(tmp_path / "two" / "checkpoints" / "step_6"))
    assert len(saved) == 8  # two matrices for each of two modules in two layers
    assert all("lora_" in name for name in saved)
    for name, weight in one["weights"].items():
        assert (resumed["weights"][name] - weight).norm() <= 1e-9 * weight.norm()
    for form in ("hf", "adapter"):
        assert main(["export", str(tmp_path / "two"), "-o", str(tmp_path / form), "--format", form]) == 0
    compare_exports(place, tmp_path, saved)


def compare_exports(place, folder, saved):
    """The merged model and the base with the adapter give the same logits, and other ones than the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64).eval()
    before = base(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64).eval()
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_parameters())
    with_adapter = PeftModel.from_pretrained(base, folder / "adapter").eval()
    name = next(iter(saved))
    q = name.split(".lora_")[0]
    delta = (16 / 4) * saved[f"{q}.lora_B.default.weight"] @ saved[f"{q}.lora_A.default.weight"]
    plain = dict(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64).named_parameters())
    assert torch.allclose(dict(merged.named_parameters())[f"{q}.weight"], plain[f"{q}.weight"] + delta, atol=1e-14)
    assert (merged(ids).logits - with_adapter(ids).logits).abs().max() < 1e-5  # peft keeps adapters in float32
    assert (merged(ids).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("overrides, words", [
    (["model.lora_rank=4"], "give model.hf"), (["model.lora_alpha=3"], "model.lora_rank=0"),
    (["model.hf=x", "model.lora_targets=a", "data.source=tokens", "data.path=x"], "model.lora_rank=0"),
])  # fmt: skip
def test_settings_of_adapters_that_go_nowhere_are_refused(overrides, words):
    with pytest.raises(Refused, match=words):
        load_config(None, overrides)


def test_targets_that_are_not_there_are_refused(tmp_path):
    pool(1).run(save_model, "llama", str(tmp_path / "model"), str(tmp_path / "ids"))
    options = [f"data.path={tmp_path / 'ids'}", "model.lora_rank=2", "model.lora_targets=nothing"]
    ((ok, error),) = pool(1).outcomes(train_hf, 1, str(tmp_path / "model"), str(tmp_path / "run"), options)
    assert not ok
    assert error[0] == "Refused"
    assert "model.lora_targets='nothing'" in error[1]
