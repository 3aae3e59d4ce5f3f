"""`lss plan --calibrate`: a profile of this machine, which plans are made by; and profiles that are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lss.cli import main
from lss.config.errors import Refused
from lss.planner import HARDWARE, calibrate, find_hardware
from lss.planner.profile import load_profile, save_profile
from tests.distributed.pool import mesh, pool

LEAST = calibrate.LEAST_START
TINY = ["model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.d_mlp=48", "data.seq_len=256"]


def measured(seconds: float):
    """What two ranks measure at sizes of next to nothing."""
    import torch

    from lss.comm import cp_communicator

    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in (("LENGTHS", (64, 128)), ("WIDTHS", (32, 64)), ("MESSAGES", (1 << 10, 1 << 14))):
            patch.setattr(calibrate, name, {"cpu": sizes})
        patch.setattr(calibrate, "COPY_BYTES", {"cpu": 1 << 16})
        lines = []
        bench = calibrate.Bench(cp_communicator(mesh(2)), torch.device("cpu"), seconds, lines.append)
        return bench.hardware("made up"), lines


def test_every_rate_is_measured_and_the_same_on_all_ranks(tmp_path):
    (first, lines), (second, _) = pool(2).run(measured, 60.0)
    assert first.matrices == second.matrices
    assert {size: [tokens for tokens, _ in points] for size, points in first.attention.items()} == {
        64: [64, 128], 128: [64, 128]
    }  # fmt: skip
    rates = [rate for points in first.attention.values() for _, rate in points]
    assert all(rate > 0 for rate in [*rates, first.matrices, first.bandwidth, first.link, first.memory])
    assert LEAST <= first.start < 1.0
    assert first.per_host == 2
    assert first.measured
    assert len(lines) == 4 + 2 + 2 + 1
    save_profile(first, tmp_path / "here.json", {"date": "today"})
    assert load_profile(tmp_path / "here.json") == first


def test_when_time_is_over_one_length_is_enough():
    (hardware, _), _ = pool(2).run(measured, 0.0)
    assert [len(points) for points in hardware.attention.values()] == [1, 1]


def test_plans_are_made_by_a_profile(tmp_path, capsys):
    path = tmp_path / "slow.json"
    h100 = HARDWARE["h100"]
    save_profile(replace(h100, name="half an H100", matrices=h100.matrices / 2), path, {})
    assert find_hardware(str(path)).name == "half an H100"
    assert main(["plan", *TINY, "--gpu", str(path)]) == 0
    assert "half an H100" in capsys.readouterr().out


def test_a_profile_without_latencies_has_the_usual_ones(tmp_path):
    path, h100 = tmp_path / "old.json", HARDWARE["h100"]
    save_profile(replace(h100, start=1.0, hop=1.0), path, {})
    found = json.loads(path.read_text())
    assert load_profile(path).start == 1.0
    path.write_text(json.dumps({key: value for key, value in found.items() if key not in ("start", "hop", "network_hop")}))
    assert load_profile(path) == h100


@pytest.mark.parametrize("change, said", [
    ({"format": 2}, "not a profile"), ({"link": None}, "link="), ({"link": -1.0}, "link=-1.0"),
    ({"memory": "much"}, "memory="), ({"per_host": 2.5}, "per_host="), ({"measured": 1}, "measured="),
    ({"name": 3}, "name="), ({"attention": {}}, "no rates"),
    ({"attention": {"64": [[128, 1.0], [64, 1.0]]}}, "longer and longer"),
    ({"attention": {"64": [[1]]}}, "heads of 64"), ({"attention": {"x": [[1, 1.0]]}}, "heads of x"),
    ({"bandwidth": True}, "bandwidth="), ({"peak": ...}, "peak is missing"),
])  # fmt: skip
def test_a_damaged_profile_is_refused_by_what_is_wrong(tmp_path, change, said):
    path = tmp_path / "profile.json"
    save_profile(HARDWARE["h100"], path, {})
    found = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    with pytest.raises(Refused) as refusal:
        load_profile(path)
    assert said in str(refusal.value)


def test_what_is_no_profile_at_all(tmp_path, capsys):
    path = tmp_path / "profile.json"
    assert main(["plan", *TINY, "--gpu", str(path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    path.write_text("{")
    assert main(["plan", *TINY, "--gpu", str(path)]) == 2
    assert "not a profile" in capsys.readouterr().err


@pytest.mark.parametrize("line, said", [
    (["--calibrate", "profile.txt"], "--calibrate"), (["--calibrate", "no/such/folder/p.json"], "--calibrate"),
    (["--calibrate", "p.json", "model.n_layers=2"], "CONFIG"),
])  # fmt: skip
def test_refusals(capsys, line, said):
    assert main(["plan", *line]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1
