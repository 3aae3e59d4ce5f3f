"""A model that `lss.parallelize` laid out, in transformers' `Trainer` and in a plain loop with Accelerate.

Both hold a rank's loss for one of many that are to be averaged: they wrap the model in DistributedDataParallel, give every
rank a batch of its own, and multiply the loss by the number of ranks. Here the loss is the global one already and gradients
are summed once, by the model itself; the ranks of a cp group share a batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from lss.config.errors import Refused, refuse


def lay_out_of(model: Any) -> Any:
    """The layout of a parallelized model.

    Raises:
        Refused: it has none, or its parameters are sharded.
    """
    layout = getattr(model, "parallel", None)
    if layout is None or not hasattr(layout, "adapter"):
        raise Refused(f"{type(model).__name__}: not laid out over ranks yet; give lss.parallelize(model, mesh) first.")
    if layout.sharding is not None:
        raise refuse("fsdp", "true", "Trainer and Accelerate clip and save whole parameters; use false, or lss train")
    return layout


def prepare_accelerator(accelerator: Any, model: nn.Module) -> None:
    """Have this `Accelerator` leave gradients to the model, and share out batches over the dp axis alone.

    From then on `accelerator.prepare(model, optimizer, loader)` wraps the model in nothing, all ranks of a cp group get the
    same batches, and `accelerator.gather_for_metrics` tells what a cp group has once. Only this accelerator is changed. In
    the loop the loss is not divided: give the global `num_items_in_batch` of the whole step and
    `gradient_accumulation_steps=1` to the accelerator, and run every micro-batch but the last under `model.no_sync()`.

    Raises:
        Refused: the model is not laid out, or the accelerator splits models or batches in a way of its own.
    """
    layout, state = lay_out_of(model), accelerator.state
    if accelerator.gradient_accumulation_steps != 1:
        fit = "the loss would be divided again, by num_items_in_batch it is the whole step's; use 1, and model.no_sync()"
        raise refuse("gradient_accumulation_steps", accelerator.gradient_accumulation_steps, fit)
    if accelerator.mixed_precision == "fp16":
        raise refuse("mixed_precision", "fp16", "its scaled gradients are not summed here; use bf16, or no")
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU") or getattr(state, "parallelism_config", None) is not None:
        raise refuse("distributed_type", kind, "lss.parallelize lays the model out; leave accelerate's own parallelism off")
    if accelerator.num_processes != layout.all.size:
        fit = f"the mesh has {layout.all.size}; start both under torchrun, on as many"
        raise refuse("num_processes", accelerator.num_processes, fit)
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)  # without a wrapper
    accelerator.prepare_data_loader = partial(_over_dp, accelerator, layout)
    if layout.all.size > 1:
        accelerator.gather_for_metrics = partial(_once_a_group, accelerator, layout)


def _over_dp(accelerator: Any, layout: Any, loader: DataLoader, device_placement: bool | None = None, **_: Any) -> Any:
    """A loader's batches shared out over the dp axis, the same on every rank of a cp group."""
    from accelerate.data_loader import prepare_data_loader

    if getattr(loader, "_is_accelerate_prepared", False):
        return loader
    if isinstance(loader.worker_init_fn, partial) and "rank" in loader.worker_init_fn.keywords:
        # what workers draw must not differ within a cp group
        keywords = loader.worker_init_fn.keywords | {"rank": layout.dp.rank}
        loader.worker_init_fn = partial(loader.worker_init_fn.func, **keywords)
    prepared = prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=layout.dp.size,
        process_index=layout.dp.rank,
        split_batches=accelerator.split_batches,
        put_on_device=accelerator.device_placement if device_placement is None else device_placement,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=False,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
    )
    accelerator._dataloaders.append(prepared)
    return prepared


def _once_a_group(accelerator: Any, layout: Any, data: Any, use_gather_object: bool = False) -> Any:
    """What the first rank of each cp group has, in the order of the groups; without what filled up the last batch.

    Accelerate's own takes what all ranks have for different sequences' and cuts its end off.

    Raises:
        Refused: anything but tensors, which ranks would send as code that the others run.
    """
    from accelerate.utils import recursively_apply

    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
        tensors = not use_gather_object
    except TypeError:
        tensors = False
    if not tensors:
        raise refuse("gather_for_metrics", type(data).__name__, "objects can carry code between ranks; give tensors")
    firsts = layout.mesh["dp", "cp"].mesh[:, 0].tolist()
    state = accelerator.gradient_state
    stop = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

    def chosen(tensor: Any) -> Any:
        return tensor.unflatten(0, (layout.all.size, -1))[firsts].flatten(0, 1)[:stop]

    return recursively_apply(chosen, accelerator.gather(data))


class LSSTrainerMixin:
    """`class MyTrainer(LSSTrainerMixin, Trainer)`: transformers' `Trainer` on a model of `lss.parallelize`.

        mesh = lss.init_mesh(cp=2)
        MyTrainer(model=lss.parallelize(model, mesh), args=TrainingArguments(...), train_dataset=...).train()

    `per_device_train_batch_size` is of a cp group: the ranks of one group read the same sequences, and groups different
    ones. `num_items_in_batch` counts each label once. The loss that is logged is the global one and the norm that of
    the whole gradient, as on one process; the first rank saves. Evaluation tells the loss alone, that of one process with
    batches of all groups' sequences.

    Collectives: those of the model, and Trainer's own of counts and losses.

    Raises:
        Refused: a model that is not laid out, or arguments under which numbers would not be those of one process.
    """

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **named: Any) -> None:
        self._layout = lay_out_of(model)
        _refuse_arguments(args, named)
        super().__init__(model, args, *others, **named)  # type: ignore[call-arg]
        trainer: Any = self
        if trainer.args.n_gpu > 1:
            raise refuse("n_gpu", trainer.args.n_gpu, "one process takes one device; start as many by torchrun")
        trainer.args.prediction_loss_only = True  # logits stay on their ranks, in parts
        trainer.model_accepts_loss_kwargs = True  # the model's hooks take num_items_in_batch, whatever its class does
        prepare_accelerator(trainer.accelerator, model)
        trainer.gather_function = trainer.accelerator.gather_for_metrics

    def get_cp_size(self) -> int:
        """Ranks that read the same batch: Trainer divides counts of labels and of ranks by it."""
        return self._layout.cp.size

    def prediction_step(self, model: Any, inputs: dict[str, Any], *others: Any, **named: Any) -> Any:
        """As Trainer's, of the sequences of the data alone: those that fill up the last batch have no labels."""
        state, layout = self.accelerator.gradient_state, self._layout  # type: ignore[attr-defined]
        if layout.dp.size > 1 and state.end_of_dataloader and state.remainder > 0:
            masked = {name: inputs[name].clone() for name in ("labels", "shift_labels") if name in inputs}
            for labels in masked.values():
                labels[max(0, state.remainder - layout.dp.rank * len(labels)) :] = -100
            inputs = {**inputs, **masked}
        return super().prediction_step(model, inputs, *others, **named)  # type: ignore[misc]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The global loss, as the model gives it; Trainer's own would multiply it by the number of ranks."""
        if num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def _refuse_arguments(args: Any, named: dict[str, Any]) -> None:
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init"):
        if named.get(name) is not None:
            fit = "logits stay on their ranks, in parts, and the model gives the global loss; leave it out"
            raise refuse(name, "...", "the model is laid out before; give model" if name == "model_init" else fit)
    if args is None:
        return
    only = {"label_smoothing_factor": 0.0, "average_tokens_across_devices": True, "torch_compile": False, "fp16": False,
            "deepspeed": None, "parallelism_config": None, "auto_find_batch_size": False,
            "eval_use_gather_object": False}  # fmt: skip
    for name, value in only.items():
        if (given := getattr(args, name, value)) != value:
            raise refuse(name, given, f"not on a sequence that is cut; use {value}")
    if getattr(args, "fsdp", None):
        raise refuse("fsdp", args.fsdp, "lss.parallelize lays the model out; leave it out")
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance":
        raise refuse("train_sampling_strategy", "batch_rebalance", "it shares out batches by rank; use random")
