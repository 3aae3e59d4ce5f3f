"""`lss plan --plot`: memory over the moments of a step is that of a whole trace, and its highest point the planned peak."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lss.cli import main
from lss.config import load_config
from lss.planner import HARDWARE, Ledger, Traces, make_plan, plan_curve, trace_step
from lss.planner.curve import ON_DEVICE, _drawn_out, curve_of
from lss.planner.drawn import SHORT
from lss.planner.estimate import curve_drawn
from tests.planner.test_plan import SMALL
from tests.test_house import ROOT

LARGE = str(ROOT / "configs/llama-1b.toml")


def test_where_a_deep_model_peaks_elsewhere_than_one_of_three_blocks_plan_and_picture_have_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    config = load_config(LARGE, ["data.seq_len=4096"]).resolved(1)
    ledger = Ledger(512, config.model.vocab_size)
    whole = trace_step(replace(config, parallel=replace(config.parallel, kernel="traced")), granularity=512, ledger=ledger)
    plan = make_plan(config, HARDWARE["h100"])
    assert plan.peak.bytes == plan_curve(config, HARDWARE["h100"]).peak == pytest.approx(whole.peak.bytes, rel=0.001)
    assert plan.peak.phase == whole.peak.phase == "backward"
    assert plan.peak.classes == pytest.approx(whole.peak.classes, rel=0.01, abs=1 << 20)
    picture = tmp_path / "memory.svg"
    assert main(["plan", LARGE, "data.seq_len=4096", "--plot", str(picture)]) == 0
    assert f"written: {picture}" in capsys.readouterr().out


def end_of(curve, name):
    """Bytes by class at the end of a part."""
    starts = [first for _, first in curve.parts] + [len(curve.live)]
    (part,) = [i for i, (phase, _) in enumerate(curve.parts) if phase == name]
    return curve.live[starts[part + 1] - 1]


@pytest.mark.parametrize("overrides", [
    ["memory.checkpointing=full"], ["memory.checkpointing=none"], ["model.layers=as", "model.n_layers=8"],
    ["parallel.strategy=tp", "model.n_kv_heads=4"], ["parallel.dp=2", "parallel.fsdp=true", "memory.checkpointing=full"],
    ["train.accumulate=2", "parallel.strategy=ring"], ["memory.offload=host", "memory.checkpointing=full"],
])  # fmt: skip
def test_every_moment_is_that_of_a_whole_trace(overrides):
    """Of the same blocks, of which only two and three are traced."""
    world = 4 if "parallel.dp=2" in overrides else 2
    settings = [*SMALL, "model.n_layers=7", "train.batch_size=2", f"data.seq_len={2 * SHORT}", *overrides]
    config = load_config(None, settings).resolved(world)
    ledger = Ledger(1, config.model.vocab_size)
    peak = trace_step(config, ledger=ledger).peak
    found, whole = curve_drawn(config), curve_of([ledger])
    assert whole.peak == peak.bytes
    assert found.parts == whole.parts
    assert found.live.shape == whole.live.shape
    # but for tables of the run's own, which a cache keeps
    assert int((found.live - whole.live).abs().max()) < 0.01 * peak.bytes


def test_half_a_round_of_layers_has_half_of_its_changes():
    config = load_config(None, [*SMALL, "model.layers=as", f"data.seq_len={SHORT}"])
    peaks = [curve_drawn(replace(config, model=replace(config.model, n_layers=n)).resolved(1)).peak for n in (6, 7, 8)]
    assert peaks[1] == pytest.approx((peaks[0] + peaks[2]) / 2, rel=0.001)


def test_a_long_step_peaks_and_ends_forward_as_a_whole_trace_of_it():
    config = load_config(None, [*SMALL, "train.batch_size=2", f"data.seq_len={3 * SHORT * 2}"]).resolved(2)
    ledger = Ledger(1, config.model.vocab_size)
    peak = trace_step(config, ledger=ledger).peak
    found, whole = curve_drawn(config), curve_of([ledger])
    assert found.peak == pytest.approx(peak.bytes, rel=0.01)
    assert end_of(found, "loss").tolist() == pytest.approx(end_of(whole, "loss").tolist(), abs=0.01 * peak.bytes)


@pytest.mark.parametrize("world, overrides", [
    (1, ["data.seq_len=262144"]), (2, []), (2, ["memory.checkpointing=none", "data.seq_len=16384"]),
    (2, ["parallel.fsdp=true", "memory.checkpointing=full"]), (2, ["memory.offload=host", "data.seq_len=524288"]),
])  # fmt: skip
def test_the_highest_point_is_the_planned_peak(world, overrides):
    config, traces = load_config(LARGE, overrides).resolved(world), Traces()
    plan = make_plan(config, HARDWARE["h100"], traces)
    curve = plan_curve(config, HARDWARE["h100"], traces)
    assert curve.peak == pytest.approx(plan.peak.bytes, rel=0.01)
    assert int(curve.live.min()) >= 0
    assert torch.equal(sum(curve.of(name) for name in ON_DEVICE), curve.total)
    highest = curve.live[int(curve.total.argmax())]
    for name, size in plan.peak.classes.items():
        assert int(highest[ON_DEVICE.index(name)]) == pytest.approx(size, abs=0.01 * curve.peak), name


@pytest.mark.parametrize("blocks", [2, 3, 16])
def test_activations_rise_once_a_block_and_fall_as_often(blocks):
    """Of a block computed again its input alone stays."""
    config = load_config(LARGE, ["memory.checkpointing=full", "data.seq_len=65536", f"model.n_layers={blocks}"]).resolved(2)
    curve = plan_curve(config, HARDWARE["h100"])
    kept = 65536 // 2 * config.model.d_model * 4  # the residual stream is float32
    bounds = dict(curve.parts)
    steps = curve.of("activations").diff().tolist()
    forward, backward = steps[: bounds["loss"]], steps[bounds["backward"] : bounds["update"]]
    assert forward.count(kept) == blocks + 3  # and before the first and after the last one
    assert backward.count(-kept) >= blocks
    assert int(curve.of("activations")[bounds["loss"]]) >= blocks * kept
    assert int(curve.of("activations")[bounds["update"]]) < kept


def test_where_activations_go_to_the_host_they_do_not_rise():
    held = {}
    for offload in ("none", "host"):
        settings = ["memory.checkpointing=full", "data.seq_len=262144", f"memory.offload={offload}"]
        curve = plan_curve(load_config(LARGE, settings).resolved(2), HARDWARE["h100"])
        held[offload] = int(curve.of("activations").max())
    assert held["host"] < 0.4 * held["none"]


def changes(*sizes, by="op"):
    return [(by if size > 0 else "", (("weights", size),)) for size in sizes]


@pytest.mark.parametrize("rounds, between", [
    (1.0, [7, -4]), (3.0, [7, -4, 7, -4, 7, -4]), (1.5, [7, -4, 3.5, -2]), (0.5, [3.5, -2]),
])  # fmt: skip
def test_what_a_block_adds_comes_again_for_each(rounds, between):
    found = _drawn_out(changes(1, 20, 30, 2), changes(1, 20, 7, -4, 30, 2), rounds)
    assert found.sum(1).tolist() == [1, 20, *between, 30, 2]


@pytest.mark.parametrize("rounds", [0.5, 1.0, 3.0, 3.5])
def test_what_grows_by_a_block_grows_by_each_and_what_is_replaced_is_there_once(rounds):
    few = [*changes(1), *changes(20, by="cat"), *changes(2, -23)]
    more = [*changes(1), *changes(25, by="cat"), *changes(2, -28)]
    grown = 20 + 5 * rounds
    assert _drawn_out(few, more, rounds).sum(1).tolist() == [1, grown, 2, -grown - 3]
    replaced = _drawn_out(changes(1, 20, 30, 2), [*changes(1), *changes(50, by="other"), *changes(2)], rounds).sum(1)
    assert float(replaced.sum()) == 53
    assert float(replaced.cumsum(0).max()) <= 53


@pytest.mark.parametrize("form", ["svg", "png"])
def test_the_picture(tmp_path, capsys, form):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"memory.{form}"
    assert main(["plan", *SMALL, "data.seq_len=4096", "--plot", str(file)]) == 0
    assert f"written: {file}" in capsys.readouterr().out
    picture = file.read_bytes()
    if form == "png":
        assert picture.startswith(b"\x89PNG")
        return
    told = re.findall(r"<text[^>]*>([^<]*)</text>", picture.decode())
    assert {"forward", "loss", "backward", "update", "weights", "activations", "H100 SXM 80GB", "GiB"} <= set(told)
    assert len(picture) < 150_000


@pytest.mark.parametrize("more, said", [
    (["--plot", "memory.pdf"], "--plot=memory.pdf"), (["--plot", "nowhere/memory.svg"], "there is no folder nowhere"),
    (["--plot", "folder.svg"], "it is a folder"), (["--plot", "m.svg", "--search"], "--search"),
    (["--plot", "m.svg", "--longest"], "--longest"), (["--plot", "m.svg", "--fewest"], "--fewest"),
    (["--plot", "m.svg", "--compare"], "--compare"), (["--plot", "m.svg", "--calibrate", "c.json"], "--calibrate"),
])  # fmt: skip
def test_refusals(tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    assert main(["plan", *SMALL, *more]) == 2
    told = capsys.readouterr().err
    assert "--plot" in told
    assert said in told
    assert len(told.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]


def test_a_length_whose_moments_are_not_known_is_refused(tmp_path, capsys):
    line = [*SMALL, "model.layers=as", "data.seq_len=65536", "--plot", str(tmp_path / "memory.svg")]
    assert main(["plan", *line]) == 2
    assert "data.seq_len=65536" in capsys.readouterr().err
