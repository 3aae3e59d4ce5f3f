"""A few steps of transformers' Trainer, on one process as it stands and on ranks with the mixin."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import lss
from lss.config import Refused
from tests.integrations.hf_cases import V, build

STEPS = 3


def samples(count=16, length=19):
    """Sequences of different many labels."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(4, V, (count, length), generator=draw)
    labels = ids.clone()
    for row in range(count):
        labels[row, : (5 * row) % 13] = -100
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def environment(rank, world, folder):
    """What torchrun tells."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "29999", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    return Path(folder)


def arguments(folder, rows, **others):
    from transformers import TrainingArguments

    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=rows, gradient_accumulation_steps=2, max_steps=STEPS,
        learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.5, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=5, dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(**settings | others)


def train(make, model, folder, rows, held_out=0, resume=None, **others):
    """(losses, norms, weights, held-out losses) of the steps; `resume` from that step's checkpoint, saved before.

    `held_out` so many sequences are evaluated after every step.
    """
    if held_out:
        others |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": rows}
    data = {"train_dataset": samples(), "eval_dataset": samples(held_out)}
    trainer = make(model=model, args=arguments(folder, rows, **others), **data)
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    told = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    trainer.save_model(str(folder / "saved"))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return [entry["loss"] for entry in told], [float(entry["grad_norm"]) for entry in told], weights, evaluated


def plain(rows, folder, others=None):
    """One process, transformers alone."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer

    try:
        return train(Trainer, build("llama", torch.float32), Path(folder), rows, **others or {})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def cut(folder, cp, rows, others=None):
    """A rank of the mesh; `rows` a cp group."""
    import torch.distributed as dist
    from transformers import Trainer

    from lss.integrations.hf.trainer import LSSTrainerMixin

    class Mixed(LSSTrainerMixin, Trainer):
        pass

    from accelerate.state import AcceleratorState

    before = dict(os.environ)
    environment(dist.get_rank(), dist.get_world_size(), folder)
    try:
        mesh = lss.init_mesh(cp=cp, dp=dist.get_world_size() // cp)
        return train(Mixed, lss.parallelize(build("llama", torch.float32), mesh), Path(folder), rows, **others or {})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)


def gathered(cp, count):
    """The numbers of `count` sequences, as a rank hears of them from `gather_for_metrics`, and what that says of objects."""
    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader

    from lss.integrations.hf.trainer import prepare_accelerator

    before = dict(os.environ)
    environment(dist.get_rank(), dist.get_world_size(), ".")
    try:
        mesh = lss.init_mesh(cp=cp, dp=dist.get_world_size() // cp)
        accelerator = Accelerator(cpu=True)
        prepare_accelerator(accelerator, lss.parallelize(build("llama", torch.float32), mesh))
        tensors, told = [], []
        for batch in accelerator.prepare(DataLoader(torch.arange(count), batch_size=2)):
            tensors += accelerator.gather_for_metrics(batch).tolist()
        for objects in ({"data": "text"}, {"data": batch, "use_gather_object": True}):
            try:
                accelerator.gather_for_metrics(objects.pop("data"), **objects)
            except Refused as refusal:
                told.append(str(refusal))
        return tensors, told
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)
