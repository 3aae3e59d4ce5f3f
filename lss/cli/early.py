"""What can be refused before ranks meet and a model is built: settings, files, folder and memory."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lss.config import Config
from lss.config.errors import Refused, refuse
from lss.environment import rank_environment

if TYPE_CHECKING:
    from lss.integrations.hf.source import Source


def refuse_options(config: Config, nproc: int | None, source: Source | None = None) -> None:
    """Refuse what this machine cannot hold, and a kernel that it cannot run; of GPUs the ranks say it, not their launcher.

    Args:
        source: the model of transformers that `config` has the shape of.

    Raises:
        Refused: in the words of `refuse_too_large` and `pick_kernel`.
    """
    import torch

    from lss.kernels import pick_kernel
    from lss.mesh import pick_device_type
    from lss.train.memory import refuse_too_large
    from lss.train.optim import check_optimizer
    from lss.train.steps import DTYPES

    check_optimizer(config.optim)
    environment = rank_environment()
    here = environment.local_world_size if environment else nproc or 1
    device_type = pick_device_type(here)
    if device_type == "cpu" or environment or here == 1:
        parameters = None if source is None else sum(shape.numel() for shape in source.parameters().values())
        refuse_too_large(config, device_type, here, parameters)
        # attention would say it of its first queries, in step 1
        head_size = config.model.d_model // config.model.n_heads if source is None else source.head_size()
        queries = torch.empty(1, 1, 1, head_size, dtype=DTYPES[config.train.dtype], device=device_type)
        pick_kernel(config.parallel.kernel, queries)


def refuse_folder(out: Path | str) -> None:
    """Refuse a run's folder that cannot be made or written into; leaves nothing behind.

    Raises:
        Refused: naming the folder and the system's reason.
    """
    if not str(out).strip():
        raise refuse("--out", "''", "give a folder")
    out = Path(out)
    try:
        above = next(p for p in (out, *out.absolute().parents) if os.path.lexists(p))
        if not above.is_dir():
            what = "a file of this name is there" if above == out else f"{above} is a file"
            raise refuse("--out", out, f"{what}; give a folder")
        with suppress(FileNotFoundError):
            os.stat(out / "checkpoints" / "step_1000000000" / "manifest.json")  # a name too long, for one
        # asking for permission tells too little: the superuser has it on a read-only disk as well
        with tempfile.TemporaryFile(dir=above) as probe:
            probe.write(b"\0")
            probe.flush()
    except Refused:
        raise
    except OSError as error:
        fit = f"cannot be written ({error.strerror}); give a folder on a disk that can"
        raise refuse("--out", _shown(out), fit) from None
    except ValueError:  # what Python says of a NUL in a name
        raise refuse("--out", _shown(out), "not the name of a folder; give one") from None


def refuse_data(config: Config, scan: bool = True, out: Path | None = None) -> None:
    """Refuse data that the config cannot be trained on. `scan`: read all token ids, each rank of a host its share.

    Text and genomes are looked at once their tokens are in the run's folder `out`.

    Raises:
        Refused: by file and byte, or the split and the length that would fit.
    """
    from lss.data import EvalLoader, Loader, open_corpus
    from lss.data.prepare import is_prepared
    from lss.data.sources import find_files
    from lss.segment import make_segment
    from lss.train.steps import loader_kind

    train, parallel = config.train, config.parallel
    if out is not None and not is_prepared(config, out):
        find_files(config.data.path)
        return
    corpus = open_corpus(config, out)
    training, held_out = corpus.split(config.data.held_out)
    assert isinstance(parallel.cp, int)
    if not config.data.packing:
        for part, _ in training.split_parts():
            part.samples(config.data.seq_len)  # before anything of the sequence's length is made
    segment = make_segment(config.data.seq_len, cp=parallel.cp, rank=0, order=parallel.order)
    shared = {"seq_len": config.data.seq_len, "dp": parallel.dp, "dp_rank": 0, "segment": segment}
    kind = loader_kind(config, None)
    Loader(training, batch_size=train.batch_size, accumulate=train.accumulate, seed=train.seed, **shared, **kind)
    if train.eval_every:
        EvalLoader(held_out, samples=train.eval_samples, rows_per_batch=1, **shared, **kind)
    if scan:
        environment = rank_environment()
        corpus.scan(*((environment.local_rank, environment.local_world_size) if environment else (0, 1)))


def _shown(text: object) -> str:
    text = repr(str(text))
    return text if len(text) < 300 else f"{text[:57]}...'"


def warn_of_memory(config: Config) -> None:
    """Say on the first rank, in one sentence, that a step will hardly fit into the memory that is free now.

    Raises nothing: what cannot be estimated is tried. A model of transformers is not estimated.
    """
    environment = rank_environment()
    if config.model.hf:
        return
    if environment is not None and environment.rank:
        return
    import torch

    from lss.hosts import free_memory
    from lss.mesh import pick_device_type
    from lss.planner import warning

    here = environment.local_world_size if environment else 1
    device = torch.device(pick_device_type(here))
    there = torch.cuda.mem_get_info()[0] if device.type == "cuda" else free_memory() // here
    try:
        text = warning(config, there, device)
    except Exception as error:
        text = f"whether a step fits could not be estimated ({type(error).__name__}: {error})"
    if text is not None:
        print(f"lss: {text}", file=sys.stderr, flush=True)


def plan_beside(config: Config) -> Callable[[dict[str, Any]], list[str]]:
    """What tells, a few steps later, how far the run is from its plan: on the first rank, on a GPU whose rates are known."""
    import torch

    from lss.mesh import pick_device_type
    from lss.planner import Against, known_hardware, plan_of_run

    environment = rank_environment()
    here = environment.local_world_size if environment else 1
    if (environment is not None and environment.rank) or pick_device_type(here) != "cuda":
        return lambda row: []
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        plan = plan_of_run(config, known_hardware(device.name, device.total_memory, here))
    except Exception as error:  # a run does not fail for want of its plan
        text = f"no plan: {type(error).__name__}: {error}"
        return lambda row: [text] if row["step"] == 1 else []
    return Against(plan) if plan is not None else lambda row: []
