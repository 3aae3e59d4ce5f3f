"""`lss plan --search`, `--longest` and `--fewest`: what is found is the best of all, and losers say why."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

import pytest

from lss.cli import main
from lss.config import load_config
from lss.config.errors import Refused
from lss.planner import HARDWARE, Plan, Search, make_plan, tracers
from lss.planner import search as room
from lss.planner.drawn import Traces
from lss.planner.ledger import Peak
from tests.test_house import ROOT

SMALL = ["model.d_model=32", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=2", "model.d_mlp=48",
         "train.dtype=float32", "data.seq_len=4096"]  # fmt: skip
H100 = HARDWARE["h100"]


def build(settings, ranks):
    config = load_config(None, [*SMALL, *settings])
    return config.resolved(ranks) if ranks else config


def made_up(config, hardware, traces=None):
    """A plan by arithmetic, so that thousands are cheap: less memory costs time, and so do more ranks a sequence."""
    memory, parallel = config.memory, config.parallel
    rows = config.train.batch_size / parallel.dp
    kept = {"none": 1.0, "attention": 0.4, "full": 0.2}[memory.checkpointing]
    tokens = rows * config.data.seq_len / parallel.cp
    activations = int(kept * tokens * 1e4)
    host = activations // 2 if memory.offload == "host" else 0
    state = int(4e7 / (parallel.cp * parallel.dp if parallel.fsdp else 1))
    more = {"none": 0.0, "attention": 0.2, "full": 0.6}[memory.checkpointing]
    seconds = {"attention": tokens * 1e-6, "matrices": tokens * 1e-6 * (1 + more),
               "exchange": tokens * 1e-8 * parallel.cp * (0.7 if not parallel.regather else 1.0),
               "gradients": 1e-4 * parallel.fsdp, "offload": 0.0, "update": 1e-3}  # fmt: skip
    kv = 0 if parallel.regather or parallel.cp == 1 else int(2e3 * rows * config.data.seq_len)
    classes = {"activations": activations - host + kv, "weights": state}
    peak = Peak(sum(classes.values()), "forward", "", classes, host)
    ranks = parallel.cp * parallel.dp
    tokens = config.train.batch_size * config.data.seq_len
    return Plan(peak, int(hardware.memory), seconds, {}, 1e9, tokens, ranks, hardware)


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(room, "make_plan", made_up)
    monkeypatch.setattr(room, "attention_seconds", lambda *settings: made_up(*settings).seconds["attention"])
    monkeypatch.setattr(room, "state_bytes", lambda config: int(
        4e7 / (config.parallel.cp * config.parallel.dp if config.parallel.fsdp else 1)))  # fmt: skip


def everything(hardware, ranks):
    """Each plan that fits, of all settings that the search may give."""
    cps = [cp for cp in range(1, ranks + 1) if ranks % cp == 0]
    rungs = itertools.product(("none", "attention", "full"), ("none", "host"))
    for cp, fsdp, (kept, offload), regather, rows in itertools.product(
        cps, ("false", "true"), rungs, ("false", "true"), (1, 2)
    ):
        settings = [f"parallel.cp={cp}", f"parallel.dp={ranks // cp}", f"train.batch_size={rows * ranks // cp}",
                    f"parallel.fsdp={fsdp}", f"memory.checkpointing={kept}", f"memory.offload={offload}",
                    f"parallel.regather={regather}"]  # fmt: skip
        try:
            plan = made_up(build(settings, ranks), hardware)
        except Refused:
            continue
        if plan.fits:
            yield plan.step / plan.tokens, settings


@pytest.mark.parametrize("mib", [20, 27, 45, 60, 90, 4000])
def test_the_best_is_the_best_of_all(planned, mib):
    hardware = replace(H100, memory=mib * 2**20, host=40 * 2**20)
    found = Search(build, hardware, ()).best(16)
    all_of = sorted(everything(hardware, 16))
    if not all_of:
        assert not found[0].fits
        return
    assert found[0].fits
    assert found[0].cost == pytest.approx(all_of[0][0], rel=0.02), all_of[0]
    assert found[0].cost >= all_of[0][0] * (1 - 1e-9), "it is a candidate of the whole"
    assert not found[0].why
    assert all(tried.why for tried in found[1:])
    costs = [tried.cost for tried in found if tried.fits]
    assert costs == sorted(costs)


@pytest.mark.parametrize("key, value", [("order", "contiguous"), ("head_chunks", 1), ("head_chunks", 2)])
def test_another_order_or_other_chunks_are_taken_where_they_are_faster(planned, monkeypatch, key, value):
    def faster(config, hardware, traces=None):
        plan = made_up(config, hardware)
        half = 0.5 if getattr(config.parallel, key) == value else 1.0
        return replace(plan, seconds={name: half * seconds for name, seconds in plan.seconds.items()})

    monkeypatch.setattr(room, "make_plan", faster)
    setting = f"parallel.{key}={value}"

    def found(*given):
        looking = Search(lambda settings, ranks: build([*given, *settings], ranks), H100, [g.split("=")[0] for g in given])
        return looking.best(16)

    assert setting in found("parallel.cp=4")[0].settings
    assert not any(setting in tried.settings for tried in found("parallel.cp=4", setting))


def test_where_nothing_fits_smaller_tiles_are_tried_last(planned, monkeypatch):
    def by_tiles(config, hardware, traces=None):
        plan = made_up(config, hardware)
        return plan if config.memory.tiles == room.SMALL_TILES else replace(plan, peak=replace(plan.peak, bytes=1 << 60))

    monkeypatch.setattr(room, "make_plan", by_tiles)
    found = Search(build, H100, ()).best(4)
    assert f"memory.tiles={room.SMALL_TILES}" in found[0].settings
    assert [tried.fits for tried in found] == [True] + [False] * (len(found) - 1)
    assert not Search(build, H100, ["memory.tiles"]).best(4)[0].fits


def test_what_is_fixed_stays(planned):
    fixed = {"parallel.cp": "parallel.cp=4", "memory.checkpointing": "memory.checkpointing=full"}
    looking = Search(lambda settings, ranks: build([*fixed.values(), *settings], ranks), H100, fixed)
    for tried in looking.best(16):
        assert not {setting.split("=")[0] for setting in tried.settings} & fixed.keys()
        assert "parallel.dp=4" in tried.settings


def test_a_fixed_batch_takes_only_what_divides_it(planned):
    fixed = ["train.batch_size=2"]
    looking = Search(lambda settings, ranks: build([*fixed, *settings], ranks), H100, ["train.batch_size"])
    found = looking.best(16)
    assert {s for tried in found for s in tried.settings if ".dp=" in s} == {"parallel.dp=1", "parallel.dp=2"}
    assert not any("refused" in tried.why for tried in found)


def test_the_longest_fits_and_a_little_more_does_not(planned):
    hardware = replace(H100, memory=100 * 2**20, host=400 * 2**20)
    tried, tokens = Search(build, hardware, ()).longest(4)
    assert tried.fits
    longer = build([*tried.settings, f"data.seq_len={int(tokens * 1.03) // 4096 * 4096}"], 4)
    assert not made_up(longer, hardware).fits
    assert tokens % 4096 == 0


def test_the_fewest_fit_and_half_of_them_do_not(planned):
    hardware = replace(H100, memory=12 * 2**20)
    tried, ranks = Search(build, hardware, ()).fewest()
    assert tried.fits
    assert ranks > 1
    half = [s.replace(f"cp={ranks}", f"cp={ranks // 2}") for s in tried.settings if ranks > 2 or "fsdp" not in s]
    assert not made_up(build(half, ranks // 2), hardware).fits
    assert Search(build, replace(H100, memory=1), ()).fewest() == (None, 0)


def test_no_more_ranks_share_a_sequence_than_are_traced_in_seconds(planned):
    longer = "data.seq_len=67108864"
    looking = Search(lambda settings, ranks: build([longer, *settings], ranks), H100, ["data.seq_len"])
    settings = [setting for tried in looking.best(1 << 14) for setting in tried.settings]
    assert max(int(setting.split("=")[1]) for setting in settings if ".cp=" in setting) <= room.MOST_SHARING
    tried, _ = looking.longest(1 << 14)
    assert {"parallel.cp=4096", "parallel.dp=4"} <= set(tried.settings)


def test_the_best_of_a_thousand_devices_takes_few_traces(monkeypatch):
    """A minute on two cores is what a hundred traces take."""
    taken = []
    real = tracers.trace_step
    monkeypatch.setattr(tracers, "trace_step", lambda config, **more: taken.append(config) or real(config, **more))
    config = str(ROOT / "configs/llama-1b.toml")

    def of(settings, ranks):
        made = load_config(config, list(settings))
        return made.resolved(ranks) if ranks else made

    began = time.process_time()
    found = Search(of, H100, ()).best(1024)
    assert {"parallel.cp=4", "memory.checkpointing=none", "parallel.regather=false"} <= set(found[0].settings)
    assert len(taken) <= 60
    assert time.process_time() - began < 100  # 20 s
    slower = [tried for tried in found if tried.slower]
    assert all("at least" in tried.why for tried in slower)
    plan = make_plan(of(slower[0].settings, 1024), H100)  # what was not planned
    assert plan.step / plan.tokens >= found[0].cost


def test_no_process_is_forked_beside_a_thread_whose_locks_it_would_inherit():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with tracers.Tracers(2) as beside:
            assert beside._processes == []
            beside.ask("key", "request")
            assert beside.result("key") is None  # the one that asks takes it itself
    finally:
        stop.set()
        thread.join()


def test_processes_take_the_same_traces(monkeypatch):
    config = load_config(None, [*SMALL, "memory.checkpointing=attention"]).resolved(2)
    monkeypatch.setattr(tracers.threading, "active_count", lambda: 1)  # other tests may have left some that sleep
    with tracers.Tracers(2) as beside:
        found = make_plan(config, H100, Traces(beside))
        wrong = load_config(None, [*SMALL, "data.packing=true", "train.batch_size=1"]).resolved(1)
        beside.ask("wrong", tracers.Request(wrong, 1, None, None))
        with pytest.raises(Refused, match="documents"):
            beside.result("wrong")
        for process in beside._processes:
            process.kill()
            process.join()
        assert beside.result("never asked") is None
        assert make_plan(config, H100, Traces(beside)) == found  # taken here, now that nobody else does
    assert found == make_plan(config, H100)


def test_the_command_on_real_traces(capsys):
    assert main(["plan", *SMALL, "model.n_layers=1", "parallel.fsdp=false", "parallel.regather=true", "train.batch_size=1",
                 "--gpus", "2", "--search"]) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "the fastest on 2 x H100" in told
    assert "settings: parallel.cp=2 parallel.dp=1 memory.checkpointing=none memory.offload=none" in told


def test_nothing_fits(capsys):
    line = ["plan", *SMALL, "model.d_model=16384", "model.n_layers=2000", "--gpus", "1", "--gpu", "v100", "--longest"]
    assert main(line) == 1
    assert "nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize("line, said", [
    (["--fewest", "--gpus", "4"], "--gpus=4"), (["--search", "model.hf=some/model"], "model.hf"),
    (["--longest", "model.preset=tiny-encoder-decoder"], "model.kind"), (["--search", "--gpu", "h10"], "--gpu"),
])  # fmt: skip
def test_refusals(capsys, line, said):
    assert main(["plan", *SMALL, *line]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1
