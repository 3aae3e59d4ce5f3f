"""`lss plan`: what it draws out is what a trace at full size says, and what a run on GPUs took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from lss.cli import main
from lss.comm.counter import Tally
from lss.config import load_config
from lss.planner import HARDWARE, drawn, find_hardware, make_plan, trace_step, tracers
from lss.planner.drawn import SHORT, Drawn
from lss.planner.estimate import step_drawn
from lss.planner.exchange import seconds_of
from lss.planner.hardware import attention_rate
from lss.planner.plan import _attention_flops, _exposed, attention_seconds
from tests.test_house import ROOT

SMALL = ["model.d_model=32", "model.n_layers=5", "model.n_heads=4", "model.n_kv_heads=2", "model.d_mlp=48",
         "train.dtype=float32"]  # fmt: skip


@pytest.mark.parametrize("overrides", [
    ["memory.checkpointing=full", "parallel.order=contiguous"], ["parallel.strategy=tp", "model.n_kv_heads=4"],
    ["memory.checkpointing=attention", "parallel.regather=false", "parallel.dp=2"],
])  # fmt: skip
def test_what_is_drawn_out_is_what_a_whole_trace_says(overrides):
    world = 4 if "parallel.dp=2" in overrides else 2
    config = load_config(None, [*SMALL, "train.batch_size=2", f"data.seq_len={3 * SHORT * 2}", *overrides]).resolved(world)
    found, whole = step_drawn(config), Drawn.of(trace_step(config))
    assert (found.products, found.payload) == (whole.products, whole.payload)


@pytest.mark.parametrize("model, tokens", [("llama-3.2-1b", 131072), ("llama-3.2-1b", 262144), ("llama-3.1-8b", 131072)])
def test_time_and_memory_of_a_step_on_two_gpus(model, tokens):
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/train-2xh100.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if (row["strategy"], row["model"], row["tokens"]) == ("lss", model, tokens)]
    shape = [f"model.preset={model}", f"model.n_layers={row['layers']}", f"data.seq_len={tokens}"]
    config = load_config(str(ROOT / "configs/llama-1b.toml"), shape).resolved(row["world_size"])
    plan = make_plan(config, HARDWARE["h100"])
    assert plan.fits
    assert plan.step == pytest.approx(row["ms"] / 1e3, rel=0.15)
    assert plan.mfu == pytest.approx(row["mfu"], rel=0.15)
    assert plan.peak.bytes == pytest.approx(row["peak_bytes"], rel=0.10)


def test_a_gpu_keeps_the_keys_of_a_short_sequence():
    """As a run there would choose by its whole length, which no trace has."""

    def calls(tokens: int, *more: str, on: str = "h100") -> int:
        config = load_config(str(ROOT / "configs/llama-1b.toml"), [f"data.seq_len={tokens}", "model.n_layers=3", *more])
        return make_plan(config.resolved(2), HARDWARE[on]).calls["kv"]

    assert calls(1 << 16) == 3  # 8 heads of 64: 128 MiB
    assert calls((1 << 16) + 2) == 6
    assert calls(1 << 16, "parallel.regather=true") == 6
    assert calls((1 << 16) + 2, "parallel.regather=false") == 3
    assert calls(1 << 12, on="cpu") == 6


def test_a_cpu_is_planned_with_its_own_kernels_and_memory():
    overrides = [*SMALL, "train.dtype=bfloat16", "data.seq_len=4096", "memory.checkpointing=full"]
    config = load_config(None, overrides).resolved(2)
    plan, here = make_plan(config, HARDWARE["cpu"]), step_drawn(config)
    assert plan.peak == here.peak
    assert plan.peak.bytes != make_plan(config, HARDWARE["h100"]).peak.bytes
    assert plan.fits
    hosted = replace(config, memory=replace(config.memory, offload="host"))
    assert not make_plan(hosted, HARDWARE["cpu"]).fits  # there is no other memory to take it


def test_a_bounded_room_in_host_memory_costs_what_it_makes_blocks_compute_again():
    """At 1,048,576 tokens 16 inputs take 64 GiB and an attention's output and lse 4.125: nine of 16 find room in 104."""
    settings = ["data.seq_len=1048576", "model.residual=compute", "memory.checkpointing=attention", "memory.offload=host"]

    def seconds(*more):
        config = load_config(str(ROOT / "configs/llama-1b.toml"), [*settings, *more]).resolved(1)
        return attention_seconds(config, HARDWARE["h100"])

    whole, again = seconds("memory.offload_gib=1000"), seconds("memory.checkpointing=full")
    assert again / whole == pytest.approx(4.5 / 3.5)
    assert seconds("memory.offload_gib=104") == pytest.approx(whole + 7 / 16 * (again - whole))
    # "auto" is half of a GPU's part of the host's memory: of a DGX H100's 250 GB here, that is 12 of 16
    assert seconds() == pytest.approx(whole + 4 / 16 * (again - whole))
    assert seconds("memory.offload_gib=60") == pytest.approx(again)
    assert seconds("memory.offload=disk", "memory.offload_gib=60") == whole


@pytest.mark.parametrize("strategy, tokens, cp, chunks", [
    ("lss", 1 << 17, 16, 1), ("lss", 1 << 21, 16, 4), ("lss", 1 << 24, 16, 8 * 4), ("lss_2d", 1 << 24, 16, 1),
    ("ring", 1 << 24, 16, 1),
])  # fmt: skip
def test_many_gathers_leave_the_first_of_them_to_wait_for(strategy, tokens, cp, chunks):
    overrides = [f"parallel.strategy={strategy}", f"data.seq_len={tokens}"]
    config = load_config(str(ROOT / "configs/llama-1b.toml"), overrides).resolved(cp)
    assert drawn.count_chunks(config, 8) == chunks
    calls = {("all_gather", "kv", "across"): Tally(chunks, 0, 1 << 40)}
    if strategy != "ring":
        whole = seconds_of(HARDWARE["h100"], calls, cp, "kv".__eq__)
        assert _exposed(config, HARDWARE["h100"], calls, 1e9) == pytest.approx(whole / chunks)


def test_the_last_rank_of_a_contiguous_cut_sets_the_time():
    orders = {order: load_config(None, [*SMALL, f"parallel.order={order}", "data.seq_len=4096"]).resolved(4)
              for order in ("head_tail", "contiguous")}  # fmt: skip
    flops = {order: _attention_flops(config, 0.0) for order, config in orders.items()}
    more = 4 * (1 - 0.75**2)
    assert flops["contiguous"] / flops["head_tail"] == pytest.approx(more, rel=1e-3)
    balanced, waiting = (make_plan(orders[order], HARDWARE["h100"]).seconds for order in ("head_tail", "contiguous"))
    assert balanced["bubbles"] == pytest.approx(0.0, abs=1e-12)
    assert waiting["attention"] == pytest.approx(balanced["attention"], rel=1e-6)
    assert waiting["bubbles"] / waiting["attention"] == pytest.approx(more - 1, rel=1e-3)


def test_rates_lie_between_those_that_were_measured():
    h100 = find_hardware("H100")
    rates = [attention_rate(h100, 128, tokens) for tokens in (1024, 8192, 12000, 16384, 50000, 131072, 1 << 20)]
    assert rates == sorted(rates)
    assert rates[0] == rates[1] == 533e12
    assert rates[-1] == rates[-2] == 612e12


def test_the_command(capsys):
    line = ["plan", *SMALL, "parallel.cp=144", "data.seq_len=50112", "--gpus", "3456", "--gpu", "v100"]
    assert main([*line, "--price", "2", "--tokens", "1e12"]) == 0
    told = capsys.readouterr().out
    assert "3,456 x V100" in told
    assert "cp=144, dp=24" in told
    assert "24 x 50,112 tokens a step" in told
    assert "fits" in told
    assert "at 2 an hour" in told
    assert "days" in told
    assert "none of them measured" in told


@pytest.mark.parametrize("ranks, overrides", [
    (3456, ["parallel.cp=144", "data.seq_len=50112", "--gpu", "v100"]), (131072, ["data.seq_len=134217728"]),
])  # fmt: skip
def test_a_plan_of_many_devices_takes_a_minute_and_4_gib_at_most(ranks, overrides):
    line = [sys.executable, "-m", "lss", "plan", str(ROOT / "configs/llama-1b.toml"), *overrides, "--gpus", str(ranks)]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    told = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 1)  # it fits, or not
    assert f"on {ranks:,} x " in told
    assert used.ru_maxrss * 1024 < 4 << 30  # a third of a GiB
    assert used.ru_utime + used.ru_stime < 60  # 6 s and 12 s


def test_what_does_not_fit_is_told_with_what_would_help(capsys):
    assert main(["plan", "model.preset=llama-3.1-8b", "model.n_layers=2", "data.seq_len=4096", "--gpu", "v100"]) == 1
    told = capsys.readouterr().out
    assert "does not fit" in told
    assert "less is needed with" in told


@pytest.mark.parametrize("line, said", [
    (["--gpu", "h10"], "--gpu='h10'"), (["parallel.cp=3", "--gpus", "8"], "--gpus=8"), (["--gpus", "0"], "--gpus=0"),
    (["model.hf=somebody/model"], "model.hf"), (["model.preset=tiny-encoder-decoder"], "model.kind"),
])  # fmt: skip
def test_refusals(capsys, line, said):
    assert main(["plan", *SMALL, *line]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1


KEYS = ["model.n_layers=2", "train.batch_size=1", "memory.tiles=64"]  # of which gathered keys are the largest part


@pytest.mark.parametrize("overrides, name, few", [
    ([], "MANY_HOSTS", 4), (["parallel.strategy=lss_2d"], "MANY_HOSTS", 4), (["parallel.strategy=ring"], "MANY_IN_RING", 4),
    (["parallel.token_chunks=2"], "IN_RUNS", 2),
    (["parallel.token_chunks=4", "parallel.regather=false"], "IN_RUNS", 2),
])  # fmt: skip
def test_many_ranks_are_drawn_out_from_few(monkeypatch, overrides, name, few):
    """On hosts of two: sixteen ranks as they are, and as drawn out from fewer."""
    settings = [*SMALL, *KEYS, f"data.seq_len={16 * SHORT}", *overrides]
    config = load_config(None, settings).resolved(16)
    for constant, value in (("MANY_HOSTS", 64), ("MANY_IN_RING", 64), ("IN_RUNS", 64), ("RUNS", 64), ("HOSTS", (2, 4))):
        monkeypatch.setattr(drawn, constant, value)
    whole = step_drawn(config, granularity=512, ranks_per_node=2)
    monkeypatch.setattr(drawn, "RUNS", 2)
    monkeypatch.setattr(drawn, name, few)
    taken = []
    monkeypatch.setattr(tracers, "trace_step", lambda config, **more: taken.append(config) or trace_step(config, **more))
    found = step_drawn(config, granularity=512, ranks_per_node=2)
    assert max(few.parallel.cp for few in taken) <= 8
    assert (found.products, found.collectives) == (whole.products, whole.collectives)
    if name != "MANY_IN_RING":
        assert whole.peak.classes["gathered keys"] > 0.1 * whole.peak.bytes
    near = 0.15 if "parallel.regather=false" in overrides else 0.03
    assert found.peak.bytes == pytest.approx(whole.peak.bytes, rel=near)
    for label, size in whole.peak.classes.items():
        assert found.peak.classes.get(label, 0) == pytest.approx(size, abs=near * whole.peak.bytes), label


def test_runs_of_tokens_beyond_two_are_counted_from_two():
    chunked = [*KEYS, "data.seq_len=8192"]
    few, many = (load_config(None, [*SMALL, *chunked, f"parallel.token_chunks={n}"]).resolved(8) for n in (2, 8))
    found, whole = step_drawn(many), Drawn.of(trace_step(many))
    assert (found.payload, found.calls) == (whole.payload, whole.calls)
    assert found.peak.bytes == pytest.approx(whole.peak.bytes, rel=0.05)
    assert found.peak.bytes < step_drawn(few).peak.bytes
