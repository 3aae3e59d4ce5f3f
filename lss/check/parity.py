"""Loss and every gradient of a config at a short length: on one rank by the plain model, and on all ranks.

The plain side is the model without `parallelize`, whole batches, one loss over all labels; the other side is the
trainer's own path. Labels are masked unevenly, since with equal counts on every rank a mean of means would pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.check.probes import Probe, leak_probes, with_length, work_ratios
from lss.comm import Communicator, count_collectives
from lss.config import Config
from lss.data.corpus import open_corpus
from lss.data.loader import Loader
from lss.data.packing import pack
from lss.data.reader import Batch
from lss.kernels.dropout import fold
from lss.mesh import axis_group
from lss.model import Transformer
from lss.parallel import AnyLayout, layout_of
from lss.parallel.local import local_part
from lss.train.models import build_model
from lss.train.steps import (
    accumulate_gradients,
    autocast,
    loader_kind,
    model_inputs,
    parameter_dtype,
    segment_of,
)

# Largest relative error of a parameter's gradient, and of the loss.
BOUNDS = {"float64": 1e-12, "float32": 2e-6}
# bfloat16 is held to one process's own bfloat16 error against float64, times this.
BFLOAT16_FACTOR = 1.25
CHECK_LEN = 64  # tokens a rank: few, but every path is taken


@dataclass
class LengthResult:
    """One length's comparison."""

    seq_len: int
    local_len: int
    loss: float
    loss_one: float
    loss_bound: float
    gradients: dict[str, tuple[float, float]]  # parameter -> (relative error, bound)
    collectives: list[tuple[str, str, int, int]]
    saved_bytes: int
    saved_bytes_one: int
    labels: int
    labels_one: int
    documents: int = 1
    probes: list[Probe] = field(default_factory=list)

    @property
    def loss_error(self) -> float:
        """Relative error of the loss."""
        return abs(self.loss - self.loss_one) / max(abs(self.loss_one), 1e-12)

    @property
    def worst(self) -> str:
        """The parameter whose gradient is nearest to its bound, or furthest beyond it."""
        return max(self.gradients, key=lambda name: _excess(*self.gradients[name]))

    @property
    def ok(self) -> bool:
        """Whether loss and all gradients are within their bounds; NaN never is."""
        fits = all(error <= bound for error, bound in self.gradients.values())
        proven = all(probe.ok for probe in self.probes)
        return fits and proven and self.loss_error <= self.loss_bound and self.labels == self.labels_one


@dataclass
class CheckResult:
    """What `lss check` found, on the first rank; other ranks hold only `ok`."""

    ok: bool
    lengths: list[LengthResult] = field(default_factory=list)
    work: dict[str, float] = field(default_factory=dict)  # order -> max/mean scores of a rank, at the config's own length


def _excess(error: float, bound: float) -> float:
    return float("inf") if error != error else error / bound


def check_config(config: Config, mesh: DeviceMesh) -> CheckResult:
    """Compare one step of the config, at one length that divides over the ranks and one that does not.

    Every rank must call; every rank gets the same verdict. The first rank computes the one-process side.
    """
    group, full_length = config.parallel.dp * config.train.accumulate, config
    rows = 1 if config.data.packing else 2
    config = replace(config, train=replace(config.train, batch_size=rows * group))
    chunks = 2 * mesh["cp"].size()
    longest = max(min(config.data.seq_len, CHECK_LEN * mesh["cp"].size()) // chunks * chunks, chunks)
    results = []
    for seq_len in dict.fromkeys((longest, max(longest - 3, 1))):
        results.append(_check_length(config, mesh, seq_len))
    first = mesh.get_rank() == 0
    work = work_ratios(full_length, _borders(full_length)) if first and config.parallel.cp != 1 else {}
    ok = torch.tensor(float(not first or all(result.ok for result in results)), device=mesh.device_type)
    ok = Communicator(axis_group(mesh, ("dp", "cp"))).broadcast(ok, "verdict").wait()
    return CheckResult(bool(ok.item()), results if first else [], work)


def _check_length(config: Config, mesh: DeviceMesh, seq_len: int) -> LengthResult:
    config = with_length(config, seq_len)
    model = build_model(config, mesh, seq_len)
    layout, train = layout_of(model), config.train
    segment = layout.segment(seq_len)
    batches = _batches(config, layout)
    with count_collectives() as counter, saved_bytes(model) as saved:
        total, counted = accumulate_gradients(model, batches, config, step=1)
        loss, labels = float(total), int(counted)
    probes = leak_probes(config, mesh, batches[0])
    found = {name: layout.whole(name, _grad(p)) for name, p in model.named_parameters()}
    if mesh.get_rank() != 0:
        return LengthResult(seq_len, segment.local_len, loss, loss, 1.0, {}, [], 0, 0, labels, labels, probes=probes)
    loss_one, expected, saved_one, labels_one = _one_process(config, seq_len, train.dtype, mesh.device_type)
    if train.dtype == "bfloat16":
        _, exact, _, _ = _one_process(config, seq_len, "float64", mesh.device_type)
        gradients = _bfloat16_errors(found, expected, exact)
        loss_bound = 1e-2
    else:
        bound = BOUNDS[train.dtype]
        gradients = {name: (error, bound) for name, error in relative_errors(found, expected).items()}
        loss_bound = bound
    documents = len(batches[0].segment.documents) - 1 if batches[0].segment else 1
    kept = (saved.bytes, saved_one, labels, labels_one, documents, probes)
    return LengthResult(seq_len, segment.local_len, loss, loss_one, loss_bound, gradients, counter.rows(), *kept)


def _batches(config: Config, layout: AnyLayout | None) -> list[Batch]:
    """The step's micro-batches, with labels masked: more of the beginning in some rows than in others.

    Packed sequences are those with most documents, since most hold one piece of a long file.
    """
    train, S = config.train, config.data.seq_len
    split, _ = open_corpus(config).split(config.data.held_out)
    dp, dp_rank = (1, 0) if layout is None else (layout.dp.size, layout.dp.rank)
    loader = Loader(
        split,
        seq_len=S,
        batch_size=train.batch_size if layout is not None or not config.data.packing else train.accumulate,
        accumulate=train.accumulate,
        dp=dp,
        dp_rank=dp_rank,
        segment=segment_of(config, layout, None),
        seed=train.seed,
        **loader_kind(config, layout),
    )
    batches = []
    for slots in _slots(config, dp, dp_rank, one_by_one=config.data.packing):
        samples = _most_documents(loader, slots) if config.data.packing else [loader.sample(slot) for slot in slots]
        batch = loader.rows(samples, slots, 0)
        assert batch.segment is not None
        places = batch.segment.positions
        border = S * (3 + batch.slots) // (6 + batch.slots)
        masked = places[None, :] < border[:, None]
        batches.append(replace(batch, labels=batch.labels.masked_fill(masked, -100)))
    return batches


def _slots(config: Config, dp: int, dp_rank: int, one_by_one: bool) -> list[range]:
    """The rows of the step's global batch that each of a rank's micro-batches takes."""
    rows = config.train.batch_size // config.train.accumulate
    mine = rows // dp
    firsts = [micro * rows + dp_rank * mine for micro in range(config.train.accumulate)]
    slots = [range(first, first + mine) for first in firsts]
    # on one process packed rows of several dp ranks come one at a time as well
    return [range(slot, slot + 1) for run in slots for slot in run] if one_by_one else slots


def _most_documents(loader: Loader, slots: range) -> list[int]:
    assert loader.packed is not None
    counts = np.diff(loader.packed.first)
    return [int(number) for number in np.argsort(-counts, kind="stable")[list(slots)]]


def _borders(config: Config) -> list[torch.Tensor | None]:
    """The documents of some of the config's sequences, at its own length; one document each without packing."""
    if not config.data.packing:
        return [None]
    split, _ = open_corpus(config).split(config.data.held_out)
    documents = split.documents()
    packed = pack(documents[:, 1] - documents[:, 0], config.data.seq_len, config.train.seed)
    return [packed.cu_seqlens(number) for number in range(min(len(packed), 16))]


def _one_process(
    config: Config, seq_len: int, dtype: str, device: str
) -> tuple[float, dict[str, torch.Tensor], int, int]:
    """Loss, every gradient, bytes kept for backward and labels counted, of the plain model on whole batches."""
    model = Transformer(config.model, seq_len, seed=config.train.seed)
    model.to(device=device, dtype=parameter_dtype(dtype))
    batches = _batches(config, None)
    count = sum(int((batch.labels != -100).sum()) for batch in batches)
    total, seed = 0.0, fold(config.train.seed, 1)
    with saved_bytes(model) as saved:
        for batch in batches:
            with autocast(dtype, device):
                inputs = model_inputs(batch, config, torch.device(device), cut=False)
                loss = model(**inputs, num_items_in_batch=max(count, 1), dropout_seed=seed).loss
            loss.backward()
            total += float(loss.detach().double())
    return total, {name: _grad(p) for name, p in model.named_parameters()}, saved.bytes, count


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """||a - b|| / max(||b||, 1e-6 x the norm of all of b) by parameter: some true gradients are 0."""
    norms = {name: float(g.double().norm()) for name, g in expected.items()}
    floor = 1e-6 * sum(norm**2 for norm in norms.values()) ** 0.5
    return {
        name: float((found[name].double() - g.double()).norm()) / max(norms[name], floor, 1e-300)
        for name, g in expected.items()
    }


def _bfloat16_errors(found, one_process, exact) -> dict[str, tuple[float, float]]:
    """Errors against float64, each bound by one process's bfloat16 error there (or over all parameters, if larger)."""
    errors, own = relative_errors(found, exact), relative_errors(one_process, exact)
    whole = {"all": torch.cat([g.flatten().double() for g in one_process.values()])}
    overall = relative_errors(whole, {"all": torch.cat([g.flatten().double() for g in exact.values()])})["all"]
    return {name: (error, BFLOAT16_FACTOR * max(own[name], overall)) for name, error in errors.items()}


@dataclass
class _Saved:
    bytes: int = 0


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[_Saved]:
    """Count the bytes that autograd keeps for backward inside the block: each storage once, parameters not."""
    seen = {local_part(p).untyped_storage().data_ptr() for p in model.parameters()}
    saved, held = _Saved(), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # a sharded parameter has another storage while it is whole
        if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(tensor)  # kept alive, so that its address is not given to another tensor
            saved.bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
