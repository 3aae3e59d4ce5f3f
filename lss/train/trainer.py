"""The training loop: batches, gradients, updates, metrics, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import DEVICE, Watch, control
from lss.config import Config
from lss.config.errors import Failed, Refused
from lss.config.hybrid import attention_layers, state_numbers
from lss.data.bins import bins_told
from lss.data.corpus import open_corpus
from lss.data.loader import EvalLoader, Loader
from lss.data.prepare import PREPARED, prepare
from lss.data.reader import Batch
from lss.flops import model_flops, peak_flops
from lss.parallel import clip_grad_norm_, layout_of
from lss.segment.documents import scores_seen
from lss.train.console import TrainConsole, make_console
from lss.train.evaluate import bits, evaluate
from lss.train.memory import NoMeter, RoomNote, StepMeter
from lss.train.metrics import MetricsWriter, peak_memory_bytes
from lss.train.models import find_model
from lss.train.optim import build_optimizer, learning_rate, set_learning_rate
from lss.train.saving import SampleLog, Saving
from lss.train.signals import Signals
from lss.train.steps import accumulate_gradients, loader_kind
from lss.train.stopping import Stopping


class Trainer:
    """Trains a config's model on its data.

    Args:
        config: resolved for this number of ranks.
        mesh: from `lss.init_mesh`, of config's cp and dp.
        out: the run's folder; the first rank writes metrics.jsonl, run.json, tensorboard/ and checkpoints/.
        on_end: called on the first rank when the run is complete, with `out`; returns lines to print last.
        on_step: called after each step with its row of metrics; returns lines to print.
        signals: what this process is told while it trains; None: nothing is listened to.
        watch: is told where this rank is; None: nobody asks.
        meter: measures where memory goes, on the first steps; what it finds is told and goes to run.json. None: nothing
            is measured.

    Raises:
        Refused: data, model or the folder's earlier run do not fit the config; before anything is written.
    """

    def __init__(
        self,
        config: Config,
        mesh: DeviceMesh,
        out: Path,
        on_end: Callable[[Path], list[str]] = lambda out: [],
        signals: Signals | None = None,
        watch: Watch | None = None,
        meter: StepMeter | None = None,
        on_step: Callable[[dict[str, Any]], list[str]] = lambda row: [],
    ) -> None:
        self.mesh, self.out, self.on_end, self.on_step = mesh, out, on_end, on_step
        self.meter: StepMeter = meter or NoMeter()
        self.memory: dict[str, Any] = {}
        self.stopping = Stopping(mesh, signals, config.train.max_bad_steps)
        self._at: Callable[[int, str], None] = watch.at if watch is not None else lambda step, phase: None
        self._at(0, "building the model")
        self.subject = find_model(config, out)
        self.config = config = self.subject.config
        self.seq_len = config.data.seq_len
        self._prepare_data()
        corpus = open_corpus(config, out)
        self.train_split, self.held_out_split = corpus.split(config.data.held_out)
        self.corpus = corpus
        self.model = self.subject.build(mesh)
        self.layout = layout_of(self.model)
        self.room = RoomNote(self.layout.offloader, config.model.n_layers)
        self.optimizer = build_optimizer(self.model, config.optim, config.memory.optimizer)
        self.loader = self._loader()
        if config.train.eval_every:
            _ = self._held_out  # text that this run has made into tokens may be too short, which is to be said before step 1
        self.first = mesh.get_rank() == 0
        self.saving = Saving(
            config, mesh, out, self.model, self.optimizer, self.layout, self.loader, facts=self.facts, say=self._say
        )
        self._at(0, "loading the newest save")
        self.done_steps = self.saving.resume()
        self.stopping.skipped = self.saving.skipped
        self.samples: SampleLog | None = None
        self.evaluations: dict[int, float] = {}

    # -- before step 1 -----------------------------------------------------------------------------------------------

    def _prepare_data(self) -> None:
        """Have the first rank make tokens of text, where they are needed and not there; the others wait.

        Collectives: where they are needed, one gather.
        """
        if self.config.data.source not in PREPARED:
            return
        reason, talk = "", control(self.mesh, "data")
        if self.mesh.get_rank() == 0:
            try:
                prepare(self.config, self.out)
            except (Refused, Failed) as error:  # the others wait, and must hear of it
                reason = str(error)
        reason = talk.gather(reason)[0]
        if reason:
            raise Refused(reason)

    def _loader(self) -> Loader:
        train = self.config.train
        return Loader(
            self.train_split,
            seq_len=self.seq_len,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            dp=self.layout.dp.size,
            dp_rank=self.layout.dp.rank,
            segment=self.layout.segment(self.seq_len),
            seed=train.seed,
            **loader_kind(self.config, self.layout),
        )

    def _flops(self, batches: list[Batch]) -> float:
        """Model FLOPs of a step; documents of packed batches are taken to be alike on all dp ranks."""
        model, S, rows = self.config.model, self.seq_len, self.config.train.batch_size
        causal = model.kind != "encoder"
        attending = attention_layers(model)
        documents = [batch.segment.documents for batch in batches if batch.segment is not None]
        scores = [scores_seen(d, causal, model.windows, attending) for d in documents]
        total = rows * sum(scores) / max(len(scores), 1)
        if model.kind == "encoder_decoder":  # the encoder's own, and those of text to source
            source = -(-S // self.config.data.source_every)
            total += rows * (scores_seen((0, source), False, model.windows, attending) + model.n_layers * S * source)
        # a causal score matrix is counted as half a square, as everywhere
        total -= rows * len(attending) * S / 2 if causal and not model.windows and not self.config.data.packing else 0
        subject, states = self.subject, state_numbers(model)
        return model_flops(subject.matrix_parameters, subject.attention_width, S, rows, total, states)

    def _say(self, line: str) -> None:
        if self.first:
            print(line, flush=True)

    def facts(self) -> dict[str, Any]:
        """What a report or a checkpoint tells of this run besides its metrics."""
        return {
            "config": self.config.to_dict(),
            "versions": {"lss": _version(), "torch": torch.__version__, "numpy": np.__version__,
                         "python": platform.python_version()},
            "mesh": {"dp": self.layout.dp.size, "cp": self.layout.cp.size, "device": _device_name(self.mesh)},
            "parameters": self.subject.parameters,
            "corpus": {"name": self.corpus.name, self.corpus.unit: len(self.corpus), "digest": self.corpus.digest},
            "skipped": self.stopping.skipped,
            **bins_told(self.corpus),
        } | self.subject.to_state(self.out)  # fmt: skip

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run to the last step; returns {"step", "loss", "eval_loss"} of the end.

        Raises:
            Stopped: the ranks were told to; the last step done is saved.
            Failed: too many steps in a row without a finite loss and gradient.
        """
        config, steps = self.config, self.config.train.steps
        if self.done_steps >= steps:
            if self.first:
                print(f"{self.out} is finished: step {self.done_steps} of {steps}; nothing to do.")
            return {"step": self.done_steps, "loss": math.nan, "eval_loss": math.nan}
        self.saving.probe()
        console = make_console(self.first, steps, self.done_steps + 1)
        metrics = None
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            self.subject.keep_tokenizer(self.out)
            self._write_run({})
            metrics = MetricsWriter(self.out, last_step=self.done_steps)
        if config.train.log_samples:
            self.samples = SampleLog(self.out, self.mesh, self.loader, last_step=self.done_steps)
        self.saving.say = console.note
        console.start(self._header())
        row: dict[str, Any] = {}
        try:
            self.stopping.begin(at_once=not config.train.compile)
            for step in range(self.done_steps + 1, steps + 1):
                row = self._step(step, console, metrics)
            self.finish_saves()
        except Failed:
            self.saving.abandon(seconds=10.0)
            raise
        finally:
            console.finish()
            for log in (metrics, self.samples):
                if log is not None:
                    log.close()
        self._finish(console, row)
        self.stopping.leave(steps, self.out, self.first)
        return row

    def _step(self, step: int, console: TrainConsole, metrics: MetricsWriter | None) -> dict[str, Any]:
        """One step, with what is due after it: evaluation, metrics, a save, the end."""
        train, every, stopping = self.config.train, self.config.checkpoint.every, self.stopping
        with self.meter.step(step, self.model, self.optimizer):
            row = self.train_step(step)
        for line in self.room.lines():
            console.note(line)
        if facts := self.meter.facts(step == train.steps):
            self.memory = facts
            for line in self.meter.table(facts):
                console.note(line)
        if train.eval_every and (step % train.eval_every == 0 or step == train.steps):
            self._at(step, "evaluating")
            row["eval_loss"] = self.evaluate()
            if stopping.stop:  # broken off: no number
                del row["eval_loss"]
            else:
                console.evaluation(step, row["eval_loss"], bits(row["eval_loss"]), self.corpus.item)
        if metrics is not None:
            metrics.write(row)
        console.step(row)
        for line in self.on_step(row):
            console.note(line)
        asked = stopping.agree()
        if asked or step == train.steps or (every and step % every == 0):
            self._at(step, "saving")
            self.save(step, waited_for=asked or step == train.steps)
            if asked and not stopping.stop:
                path = self.saving.prove(step)
                console.note(f"step {step}/{train.steps}  saved as {path}, as asked by SIGUSR1")
            # told meanwhile: the save is there, and the next step may be long
            if stopping.agree_to_stop() and step < train.steps:
                stopping.leave(step, self.saving.prove(step), self.first)
        return row

    def train_step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics."""
        config, started = self.config, time.perf_counter()
        self._at(step, "training")
        batches = [self.loader.batch(step, micro) for micro in range(config.train.accumulate)]
        if self.samples is not None:
            self.samples.write(step, batches)
        self.optimizer.zero_grad(set_to_none=True)
        loss, counted = accumulate_gradients(self.model, batches, config, step=step)
        norm = clip_grad_norm_(self.model, config.optim.clip)
        # the step's one wait for the device; the update then runs while the next batch is read
        self._at(step, DEVICE)
        loss, norm, counted = torch.stack((loss, norm.to(loss.device), counted.double())).tolist()
        lr = learning_rate(step, config.train.steps, config.optim)
        set_learning_rate(self.optimizer, lr)
        # loss and norm are the same numbers on every rank, so all ranks step or skip together
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.saving.before_update()
            self.optimizer.step()
        self.stopping.count(finite, step)
        seconds = time.perf_counter() - started
        peak = peak_flops(_device_name(self.mesh))
        return {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens_counted": int(counted),
            "tokens_per_s": config.train.batch_size * self.seq_len / seconds,
            "peak_memory_bytes": peak_memory_bytes(torch.device(self.mesh.device_type)),
            "step_time_s": seconds,
            "mfu": self._flops(batches) / (seconds * peak * self.mesh.size()) if peak else None,
            "skipped": self.stopping.skipped,
        }

    @cached_property
    def _held_out(self) -> EvalLoader:
        """The same batches in every evaluation; made once, since packing sorts all documents."""
        train = self.config.train
        rows = train.batch_size // train.accumulate // self.layout.dp.size
        return EvalLoader(
            self.held_out_split,
            seq_len=self.seq_len,
            samples=train.eval_samples,
            rows_per_batch=rows,
            dp=self.layout.dp.size,
            dp_rank=self.layout.dp.rank,
            segment=self.layout.segment(self.seq_len),
            **loader_kind(self.config, self.layout),
        )

    def evaluate(self) -> float:
        """Mean held-out loss in nats per byte or token; NaN where the ranks have agreed to stop before its end."""
        return evaluate(self.model, self._held_out, self.config, stop=self.stopping.agree_to_stop)

    def save(self, step: int, *, waited_for: bool = False) -> None:
        """Write `out/checkpoints/step_N`, unless that step has been saved; see `Saving.save`."""
        self.saving.save(step, waited_for=waited_for)

    def finish_saves(self) -> None:
        """Wait for the save under way; see `Saving.finish`."""
        self.saving.finish()

    # -- what people see ---------------------------------------------------------------------------------------------

    def _header(self) -> list[tuple[str, str]]:
        config, layout = self.config, self.layout
        segment = layout.segment(self.seq_len)
        return [
            ("model", self.subject.describe()),
            ("mesh", f"dp {layout.dp.size} x cp {layout.cp.size}, strategy {layout.strategy}, order {layout.order}, "
                     f"{'parameters sharded, ' if layout.sharding is not None else ''}on {_device_name(self.mesh)}"),
            ("sequence", f"{self.seq_len:,} tokens, {segment.local_len:,} a rank"),
            ("data", f"{self.corpus.name}: {len(self.corpus):,} {self.corpus.unit} in {len(self.corpus.files):,} files"),
            ("run", f"{config.train.steps:,} steps of {config.train.batch_size} sequences in {config.train.dtype}, from "
                    f"step {self.done_steps + 1}"),
            ("folder", str(self.out)),
        ]  # fmt: skip

    def _write_run(self, results: dict[str, Any]) -> None:
        (self.out / "run.json").write_text(json.dumps(self.facts() | {"results": results}, indent=2) + "\n")

    def _finish(self, console: Any, row: dict[str, Any]) -> None:
        if not self.first:
            return
        results = {"step": row["step"], "loss": row["loss"], "failed_saves": self.saving.failed}
        results |= {"memory": self.memory} if self.memory else {}
        lines = []
        if "eval_loss" in row:
            held_out = bits(row["eval_loss"])
            results |= {"eval_loss": row["eval_loss"], f"bits_per_{self.corpus.item}": held_out}
            lines.append(f"held-out: {held_out:.2f} bits per {self.corpus.item}")
        self._write_run(results)
        console.finish(lines + self.on_end(self.out))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    with suppress(PackageNotFoundError):
        return version("lss-transformer")
    return "unknown"


def _device_name(mesh: DeviceMesh) -> str:
    return torch.cuda.get_device_name() if mesh.device_type == "cuda" else f"cpu ({platform.machine()})"

