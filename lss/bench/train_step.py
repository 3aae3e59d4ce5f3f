"""`lss bench train`: whole optimizer steps of a config's model on random tokens, by the trainer's own functions.

A step is forward, backward, clipping and the update. Variants run one after another, since two models of the size that
matters do not fit beside each other; each takes warm-up steps first. The loss of the last warm-up step, which tells of the
updates before it, must agree among our variants and the plain model; that the gradients do is `lss check`'s to prove.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from lss.bench.rival import Rival
from lss.bench.rows import Results, Row, full_row, run_facts
from lss.bench.timing import Clock, spread_of
from lss.comm import Communicator, count_collectives
from lss.config import Config, load_config
from lss.config.errors import refuse
from lss.config.hybrid import attention_layers, state_numbers
from lss.context_parallel.loss import global_linear_cross_entropy
from lss.data.reader import Batch
from lss.flops import model_flops, peak_flops
from lss.kernels import single_attention
from lss.kernels.dropout import fold
from lss.model import ModelOps, Transformer
from lss.parallel import clip_grad_norm_, layout_of
from lss.parallel.activation import make_pieces, softmax_of
from lss.segment import make_segment
from lss.train.models import build_model, matrix_parameters
from lss.train.optim import build_optimizer
from lss.train.steps import accumulate_gradients, autocast, model_inputs, parameter_dtype

PLAIN = "plain"
# Largest relative difference of a loss after updates from the first variant's.
LOSS_BOUNDS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-2}
Step = Callable[[], float]


@dataclass(frozen=True)
class TrainPlan:
    """What to measure.

    Attributes:
        configs: (overrides as text, resolved config) of every variant at every length.
        plain: also the model without `parallelize`, the whole batch on one device, with the first variant's settings.
        warm_up: steps before those that are timed, 2 or more, the bytes of the last one counted.
    """

    configs: Sequence[tuple[str, Config]]
    rivals: Sequence[Rival] = ()
    plain: bool = False
    warm_up: int = 2
    repeat: int = 5
    only: Sequence[str] = ()


@dataclass(frozen=True)
class Variant:
    """One thing to measure: `build` makes its step; `ranks` share it; `checked`: its losses are comparable."""

    name: str
    row: Row
    ranks: int
    config: Config
    build: Callable[[], Step] | None
    checked: bool = True
    missing: str | None = None


def plan_configs(
    path: str | None, overrides: Sequence[str], variants: Sequence[str], lengths: Sequence[int], ranks: int
) -> list[tuple[str, Config]]:
    """The config of each variant (spaces between its overrides, "" for none) at each length (none: the config's own).

    Raises:
        Refused: an override or a config that does not fit, or one that a bench on random tokens cannot run.
    """
    found = []
    for length in lengths or [0]:
        for variant in variants or [""]:
            extra = variant.split()
            longer = [f"data.seq_len={length}"] if length else []
            config = load_config(path, [*overrides, *longer, *extra]).resolved(ranks)
            if config.model.hf:
                raise refuse("model.hf", config.model.hf, "lss train takes it; a bench times the reference decoder")
            if config.model.kind != "decoder":
                raise refuse("model.kind", f'"{config.model.kind}"', 'the bench makes random text; use "decoder"')
            if config.data.packing:
                raise refuse("data.packing", "true", "the bench makes one random text a sequence; use false")
            found.append((" ".join(extra), config))
    return found


def bench_train(
    plan: TrainPlan, mesh_of: Callable[[int, int], DeviceMesh], clock: Clock, results: Results, command: str,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:  # fmt: skip
    """Measure all that the plan wants and the results lack; returns the new rows, the same on every rank.

    Args:
        mesh_of: the mesh of a config's (cp, dp).
        clock: over all ranks.

    Raises:
        Failed: the ranks fell out of step.
    """
    facts = run_facts(clock.device, clock.comm.size, command)
    clock.barrier()  # no rank writes before all have read
    new: list[Row] = []
    losses: dict[tuple, float] = {}
    for variant in _variants(plan, mesh_of, clock, facts):
        label = f"{variant.name} {variant.row['tokens']}"
        if results.done(variant.row) or (plan.only and not any(word in label for word in plan.only)):
            continue
        row = variant.row | _measure(variant, plan, clock, results, losses)
        clock.tidy()
        results.add(row)
        on_row(row)
        new.append(row)
    return new


def _variants(plan: TrainPlan, mesh_of: Callable[[int, int], DeviceMesh], clock: Clock, facts: Row) -> list[Variant]:
    found, seen = [], set()
    for text, config in plan.configs:
        S = config.data.seq_len
        if S not in seen:
            seen.add(S)
            if plan.plain:
                row = config_row(config, {}, facts) | {"strategy": PLAIN, "order": None, "world_size": 1}
                found.append(Variant(PLAIN, row, 1, config, partial(_plain_step, config, clock.device)))
            for label, variant, step, missing in rival_entries(plan.rivals, config, clock):
                row = config_row(config, {}, facts) | {"strategy": variant, "kernel": None, "order": None, "rival": label}
                build = None if step is None else partial(_given, step)
                name = f"{label} {variant or ''}"
                found.append(Variant(name, row, clock.comm.size, config, build, checked=False, missing=missing))
        options = dict(word.split("=", 1) for word in text.split())
        named = f"{config.parallel.strategy} {config.parallel.kernel} {text}"
        build = partial(our_step, config, mesh_of, clock.device)
        found.append(Variant(named, config_row(config, options, facts), clock.comm.size, config, build))
    return found


def _given(step: Step) -> Step:
    return step


def rival_entries(
    rivals: Sequence[Rival], config: Config, clock: Clock
) -> list[tuple[str, str | None, Step | None, str | None]]:
    """(rival, variant, step, why it is missing) of all entries for this config."""
    found: list[tuple[str, str | None, Step | None, str | None]] = []
    comm = clock.comm
    for rival in rivals:
        if not rival.offers("train"):
            continue
        failure, made = f"failed: {rival.missing}" if rival.missing else None, None
        if failure is None:
            given = (config.to_dict(), comm.group, comm.rank, comm.size, clock.device)
            made, failure = clock.attempt(partial(rival.entries, "train", *given))
        if failure is not None:
            found.append((rival.label, None, None, failure.removeprefix("failed: ")))
        found += [(rival.label, variant, step, None) for variant, step in (made if isinstance(made, list) else [])]
    return found


def config_row(config: Config, options: dict[str, str], facts: Row) -> Row:
    """What a row tells of a config."""
    model, parallel = config.model, config.parallel
    known = {
        "bench": "train", "strategy": parallel.strategy, "kernel": parallel.kernel, "order": parallel.order,
        "options": options, "model": model.preset, "layers": model.n_layers, "tokens": config.data.seq_len,
        "batch": config.train.batch_size, "dtype": config.train.dtype,
        "heads": f"{model.n_heads}/{model.n_kv_heads}x{model.d_model // model.n_heads}",
    }  # fmt: skip
    return full_row(known, facts)


# -- steps -------------------------------------------------------------------------------------------------------------


def random_batches(config: Config, rows: range, places: torch.Tensor, device: torch.device) -> list[Batch]:
    """Micro-batches of random tokens at these places of the sequence; a row's tokens are the same in any layout."""
    S, accumulate = config.data.seq_len, config.train.accumulate
    texts = []
    for row in rows:
        generator = torch.Generator().manual_seed(fold(config.train.seed, row))
        texts.append(torch.randint(config.model.vocab_size, (S + 1,), generator=generator))
    whole, beyond = torch.stack(texts), places >= S
    at = places.clamp(max=S - 1)
    tokens = whole[:, at].masked_fill(beyond, 0).to(device)
    labels = whole[:, at + 1].masked_fill(beyond, -100).to(device)
    slots = torch.tensor(list(rows), device=device)
    parts = zip(tokens.chunk(accumulate), labels.chunk(accumulate), slots.chunk(accumulate), strict=True)
    return [Batch(ids, targets, at.to(device), slot, slot) for ids, targets, slot in parts]


def our_step(config: Config, mesh_of: Callable[[int, int], DeviceMesh], device: torch.device) -> Step:
    """One step of the config's model at each call, laid out over the mesh of its (cp, dp), on random tokens."""
    assert isinstance(config.parallel.cp, int)
    model = build_model(config, mesh_of(config.parallel.cp, config.parallel.dp))
    layout, optimizer = layout_of(model), build_optimizer(model, config.optim, config.memory.optimizer)
    mine = config.train.batch_size // layout.dp.size
    rows = range(layout.dp.rank * mine, (layout.dp.rank + 1) * mine)
    batches = random_batches(config, rows, layout.segment(config.data.seq_len).positions, device)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss, _ = accumulate_gradients(model, batches, config, step=1)
        norm = clip_grad_norm_(model, config.optim.clip)
        value, _ = torch.stack((loss, norm.to(loss.device))).tolist()  # the trainer's one wait for the device
        optimizer.step()
        return value

    return step


def _plain_step(config: Config, device: torch.device) -> Step:
    """The model without `parallelize`: whole sequences, torch's own clipping."""
    model = Transformer(config.model, config.data.seq_len, seed=config.train.seed)
    model.to(device=device, dtype=parameter_dtype(config.train.dtype))
    optimizer = build_optimizer(model, config.optim, config.memory.optimizer)
    batches = random_batches(config, range(config.train.batch_size), torch.arange(config.data.seq_len), device)
    whole = make_segment(config.data.seq_len, cp=1, rank=0)
    attention = partial(single_attention, segment=whole, kernel=config.parallel.kernel)
    memory = config.memory
    pieces = make_pieces(
        memory.checkpointing, tiles=memory.tiles, width=config.model.d_mlp, compiling=config.train.compile
    )
    # whole sequences on one rank: the global loss over a group of one is the plain one
    loss = partial(global_linear_cross_entropy, comm=Communicator(), tiles=memory.tiles, softmax=softmax_of(pieces))
    ops = ModelOps(attention=attention, pieces=pieces, loss=loss)
    count = sum(batch.labels.numel() for batch in batches)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            with autocast(config.train.dtype, device.type):
                inputs = model_inputs(batch, config, device, cut=False)
                loss = model(**inputs, num_items_in_batch=count, dropout_seed=fold(config.train.seed, 1), ops=ops).loss
            loss.backward()
            total += loss.detach().double()
        if config.optim.clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        return float(total)

    return step


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(variant: Variant, plan: TrainPlan, clock: Clock, results: Results, losses: dict[tuple, float]) -> Row:
    if variant.missing is not None or variant.build is None:
        return {"status": f"failed: {variant.missing}"}
    if results.killed(variant.row):
        return {"status": "failed: the last two runs ended in one of its steps, where a rank hung or died"}
    results.begin(variant.row)
    cuda, found, times = clock.device.type == "cuda", {}, []
    step, failure = clock.attempt(variant.build)
    loss, counted = math.nan, (math.nan, 0, 0)
    for _ in range(plan.warm_up):
        if failure is None:
            counted, failure = clock.attempt(partial(_counted, step))  # type: ignore[arg-type]
    if failure is None:
        loss, payload, calls = counted
        found = {"payload_bytes": payload, "calls": calls} if variant.checked else {}
    if failure is None and variant.checked:
        failure = _disagreement(variant, clock.largest([loss])[0], losses)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(plan.repeat):
        if failure is None:
            clock.barrier()
            timed, failure = clock.attempt(partial(clock.time, step))  # type: ignore[arg-type]
            times += [timed[0]] if failure is None else []  # type: ignore[index]
    results.end()
    peak = torch.cuda.max_memory_allocated() if cuda else None
    getattr(step, "close", lambda: None)()  # a rival's model would stay with its entry
    if failure is not None:
        return {"status": failure}
    found["peak_bytes"] = peak
    return _numbers(variant, clock, found, times)


def _counted(step: Step) -> tuple[float, int, int]:
    """A step's loss, and the payload and the calls of its collectives."""
    with count_collectives() as counter:
        return step(), counter.bytes(), counter.calls()


def _disagreement(variant: Variant, loss: float, losses: dict[tuple, float]) -> str | None:
    config = variant.config
    first = losses.setdefault((config.data.seq_len, config.train.dtype, config.train.batch_size), loss)
    if abs(loss - first) <= LOSS_BOUNDS[config.train.dtype] * abs(first):
        return None
    return f"failed: error of the loss after updates, {loss:.6f} where the first variant had {first:.6f}"


def _numbers(variant: Variant, clock: Clock, found: Row, times: list[float]) -> Row:
    names = [name for name, value in found.items() if value is not None]
    largest = clock.largest([*times, *(float(found[name]) for name in names)])
    times, most = largest[: len(times)], largest[len(times) :]
    config, ms = variant.config, statistics.median(times)
    tokens = config.data.seq_len * config.train.batch_size
    peak = peak_flops(variant.row["gpu"])
    rate = _flops(config) / (1e-3 * ms) / variant.ranks
    return found | {name: int(value) for name, value in zip(names, most, strict=True)} | {
        "status": "ok", "ms": round(ms, 3), "spread": round(spread_of(times), 4), "rounds": len(times),
        "tokens_per_s": round(1e3 * tokens / ms, 1), "tflops": float(f"{rate / 1e12:.4g}"),
        "mfu": round(rate / peak, 4) if peak else None,
    }  # fmt: skip


def _flops(config: Config) -> float:
    """Model FLOPs of a step, all layers causal over the whole sequence."""
    model, S, rows = config.model, config.data.seq_len, config.train.batch_size
    with torch.device("meta"):
        matrices = matrix_parameters(Transformer(model, S))
    scores = rows * len(attention_layers(model)) * S * S / 2
    return model_flops(matrices, model.d_model, S, rows, scores, state_numbers(model))
