"""What rank processes compute in the tests of training a model of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.distributed.pool import mesh
from tests.integrations.hf_cases import V, build

SETTINGS = ["data.source=tokens", "data.seq_len=45", "train.batch_size=4", "train.eval_samples=4", "train.eval_every=0",
            "train.dtype=float64", "optim.warmup=2"]  # fmt: skip


def save_model(name: str, folder: str, ids: str | None = None) -> None:
    """A model as `save_pretrained` writes it, and files of token ids."""
    build(name, torch.float32).save_pretrained(folder)
    if ids:
        draw = np.random.default_rng(5)
        # each id tells much of the next, so that there is something to learn
        steps = draw.choice([1, 2, 7], size=6000).cumsum() % V
        Path(ids).mkdir()
        for number, document in enumerate(np.split(steps, [100, 130, 131, 2000, 5000])):
            document.astype("<u2").tofile(f"{ids}/{number}.bin")


def train_hf(ranks: int, folder: str, out: str, overrides: list[str], stop_after: int = 0):
    """Train in this pool's ranks; losses, the step begun from, the held-out loss and all weights."""
    from lss.config import load_config
    from lss.parallel import full_state_dict
    from lss.train.trainer import Trainer

    config = load_config(None, [f"model.hf={folder}", *SETTINGS, *overrides]).resolved(ranks)
    trainer = Trainer(config, mesh(config.parallel.cp, config.parallel.dp), Path(out))
    losses, began = [], trainer.done_steps
    original = trainer.train_step

    def recorded(step):
        if stop_after and step > stop_after:
            raise InterruptedError
        row = original(step)
        losses.append(row["loss"])
        return row

    trainer.train_step = recorded
    last = {}
    try:
        last = trainer.train()
    except InterruptedError:
        trainer.finish_saves()
    weights = {name: tensor.clone() for name, tensor in full_state_dict(trainer.model).items()}
    return {"losses": losses, "from": began, "eval": last.get("eval_loss"), "weights": weights}


def adapter_parity(cp: int, name: str):
    """(worst error of an adapter's gradient against one process, parameter, how many are trained)."""
    import lss
    from lss.config import ModelConfig
    from lss.integrations.hf.adapters import add_adapters
    from tests.integrations.hf_cases import batch, gradients, reference, worst

    settings = ModelConfig(hf="x", lora_rank=3, lora_targets="all-linear")
    models = [add_adapters(build(name), settings, seed=1) for _ in range(2)]
    for model in models:
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():  # B starts at 0, and A then gets no gradient
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    inputs = batch("padded", 37, True)
    model = lss.parallelize(models[0], mesh(cp))
    model(**inputs).loss.backward()
    _, expected = reference(models[1], inputs, True)
    expected = {key: value for key, value in expected.items() if value is not None}
    assert all("lora_" in key for key in expected)
    return *worst(gradients(model), expected), len(expected)
