"""`lss train model.hf=...`: the same curve for any cut, and resumes to the bit, without the model's folder."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest
import torch

from lss.checkpoint import verify
from tests.integrations.ranks import hf_pool as pool
from tests.integrations.train_jobs import save_model, train_hf

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


def saved(tmp_path, name):
    pool(1).run(save_model, name, str(tmp_path / name), str(tmp_path / "ids"))
    return str(tmp_path / name), f"data.path={tmp_path / 'ids'}"


@pytest.mark.parametrize("name, overrides", [
    ("llama", ["train.accumulate=2"]),
    ("qwen3", ["parallel.order=contiguous", "memory.checkpointing=full"]),
    ("gpt2", ["parallel.strategy=ulysses"]),
    ("mistral", ["data.packing=true", "train.accumulate=4", "optim.name=sgd", "optim.lr=0.2"]),
])  # fmt: skip
def test_curves_do_not_depend_on_the_cut(tmp_path, name, overrides):
    folder, path = saved(tmp_path, name)
    options = ["train.steps=20", path, "train.eval_every=20", *overrides]
    (one,) = pool(1).run(train_hf, 1, folder, str(tmp_path / "one"), options)
    two = pool(2).run(train_hf, 2, folder, str(tmp_path / "two"), options)
    assert one["losses"][-1] < one["losses"][0]
    for result in two:
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-10)
        assert result["eval"] == pytest.approx(one["eval"], rel=1e-10)
        assert result["losses"] == two[0]["losses"]
        for key, weight in one["weights"].items():
            assert (result["weights"][key] - weight).norm() <= 1e-9 * weight.norm()
            assert torch.equal(result["weights"][key], two[0]["weights"][key])


@pytest.mark.parametrize("overrides", [[], ["memory.checkpointing=full"]], ids=["kept", "recomputed"])
def test_sharded_over_four_ranks_is_one(tmp_path, overrides):
    folder, path = saved(tmp_path, "llama")
    options = ["train.steps=6", path, "train.eval_every=3"]
    (one,) = pool(1).run(train_hf, 1, folder, str(tmp_path / "one"), options)
    sharded = [*options, *overrides, "parallel.dp=2", "parallel.fsdp=true", "train.accumulate=2"]
    for result in pool(4).run(train_hf, 4, folder, str(tmp_path / "four"), sharded):
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-11)
        assert result["eval"] == pytest.approx(one["eval"], rel=1e-11)
        for key, weight in one["weights"].items():
            assert (result["weights"][key] - weight).norm() <= 1e-9 * weight.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_resume_goes_on_to_the_bit_without_the_models_folder(tmp_path, name):
    folder, path = saved(tmp_path, name)
    options = ["train.steps=6", path, "checkpoint.every=3"]
    straight = pool(2).run(train_hf, 2, folder, str(tmp_path / "straight"), options)
    out = str(tmp_path / "broken")
    pool(2).run(train_hf, 2, folder, out, options, stop_after=3)
    shutil.rmtree(folder)
    for ranks, more in ((2, []), (4, ["parallel.dp=2", "parallel.fsdp=true"])):
        copy = f"{out}-{ranks}"
        shutil.copytree(out, copy)
        resumed = pool(ranks).run(train_hf, ranks, folder, copy, [*options, *more])
        assert resumed[0]["from"] == 3
        if ranks == 2:
            assert resumed[0]["losses"] == straight[0]["losses"][3:]
        else:
            assert resumed[0]["losses"] == pytest.approx(straight[0]["losses"][3:], rel=1e-11)
        for key, weight in straight[0]["weights"].items():
            assert (resumed[0]["weights"][key] - weight).norm() <= (0 if ranks == 2 else 1e-9) * weight.norm()
    assert verify(tmp_path / "broken-4" / "checkpoints" / "step_6").read_state()["hf"]["class"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_trains_close_to_float32(tmp_path, name):
    folder, path = saved(tmp_path, name)
    losses = [pool(2).run(train_hf, 2, folder, str(tmp_path / dtype), [path, "train.steps=8", f"train.dtype={dtype}"])
              for dtype in ("bfloat16", "float32")]  # fmt: skip
    assert losses[0][0]["losses"] == pytest.approx(losses[1][0]["losses"], rel=0.02)
    assert losses[0][0]["losses"] != losses[1][0]["losses"]
    assert losses[0][0]["losses"] == losses[0][1]["losses"]


def stretched(folder, kind, out=None):
    """What a run makes of the model's config, and the logits of its model against those of transformers' own."""
    from lss.config import load_config
    from lss.train.models import find_model
    from tests.integrations.hf_cases import build

    overrides = [f"model.hf={folder}", "data.source=tokens", "data.path=x", f"model.rope_scaling={kind}",
                 "model.rope_factor=4", "data.seq_len=300"]  # fmt: skip
    source = find_model(load_config(None, overrides)).source
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    settings = {"rope_parameters": rope, "max_position_embeddings": 128 if kind == "dynamic" else 512}
    ids = torch.arange(300)[None] % 96
    ours = source.build(dtype=torch.float64).eval()(ids).logits
    theirs = build("llama", torch.float32, **settings).double().eval()(ids).logits
    return float((ours - theirs).abs().max()), source.config.to_dict()


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_rotary_positions_are_stretched_as_transformers_does(tmp_path, kind):
    folder, path = saved(tmp_path, "llama")
    ((error, config),) = pool(1).run(stretched, folder, kind)
    assert error < 1e-12
    assert config["rope_parameters"]["rope_type"] == kind
    options = [path, "train.steps=3", "data.seq_len=200", "model.rope_factor=4", f"model.rope_scaling={kind}"]
    (one,) = pool(1).run(train_hf, 1, folder, str(tmp_path / "one"), options)
    outcomes = pool(2).outcomes(train_hf, 2, folder, str(tmp_path / "two"), options)
    if kind == "dynamic":  # its frequencies depend on the longest position at hand, beyond the model's own length
        assert all("rope_type=dynamic" in outcome[1] for _, outcome in outcomes)
        return
    for ok, result in outcomes:
        assert ok, result
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-11)


@pytest.mark.parametrize("overrides, words", [
    (["model.rope_scaling=yarn"], "model.rope_factor=1.0"), (["model.rope_factor=2"], "model.rope_factor=2.0"),
])  # fmt: skip
def test_a_stretch_without_its_other_half_is_refused(overrides, words):
    from lss.config import Refused, load_config

    with pytest.raises(Refused, match=words):
        load_config(None, ["model.hf=x", "data.source=tokens", "data.path=x", *overrides])
