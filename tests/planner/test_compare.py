"""`lss plan --compare`: rows of every strategy, what they say in words, and the refusals among them."""

from __future__ import annotations

import json

import pytest

from lss.cli import main
from lss.config import load_config
from lss.planner import HARDWARE, Plan
from lss.planner import compare as room
from lss.planner.compare import advice, compare, fastest, stages, verdicts
from lss.planner.compare_tables import fastest_table, sentences, tables
from lss.planner.ledger import Peak
from tests.test_house import ROOT

SMALL = ["model.d_model=64", "model.n_layers=3", "model.n_heads=16", "model.n_kv_heads=8", "model.d_mlp=64"]
H100 = HARDWARE["h100"]


def build(settings, ranks):
    return load_config(None, [*SMALL, *settings]).resolved(ranks)


def made_up(config, hardware, traces=None):
    """Ulysses is the fastest on few ranks, 2D on many, LSS in between; nothing fits beyond a million tokens a rank."""
    n, tokens = config.parallel.cp, config.data.seq_len
    slower = {"lss": 1.0, "lss_2d": 1.2 if n < 512 else 0.5, "ring": 2.0, "ulysses": 0.5, "tp": 1.02}
    held = 2 * int(hardware.memory) if tokens / n > 2**20 else 1000
    seconds = {"attention": slower[config.parallel.strategy] * tokens**2 / n * 1e-9, "exchange": 1e-6}
    return Plan(Peak(held, "forward", "", {}, 0), int(hardware.memory), seconds, {"kv": 10}, 1.0, tokens, n, hardware,
                {"kv": 3}, 2.0, 1.0)  # fmt: skip


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(room, "make_plan", made_up)


def test_rows_and_words(planned):
    rows = compare(build, H100, (1, 8, 64, 512), (4096, 262144, 2**24))
    by = {(r["strategy"], r["ranks"], r["tokens"]): r for r in rows}
    assert [s for s, n, t in by if n == 1] == ["lss"] * 3
    assert ("lss", 64, 4096) not in by  # segments of 64 tokens
    assert by["ulysses", 8, 4096]["status"] == "ok"
    assert by["ulysses", 64, 262144]["status"] == "cannot: of 64 ranks only 16 would have a query head to compute"
    assert "must divide it" in by["tp", 64, 262144]["status"]
    assert by["tp", 8, 4096]["status"] == "ok"
    assert by["lss", 8, 2**24]["status"] == "does not fit"
    row = by["lss", 8, 4096]
    assert (row["calls"], row["payload_bytes"], row["flat_s"], row["staged_s"]) == (3, 10, 2.0, 1.0)
    assert row["seconds"] == pytest.approx(row["attention_s"] + row["exchange_s"])
    told = verdicts(rows)
    assert told[0].startswith("8 ranks: at 4,096 to 262,144 tokens Ulysses: LSS takes 2.00 times as long")
    assert told[0].endswith("at 16,777,216 tokens nothing fits.")
    assert told[1] == "64 ranks: at 262,144 to 16,777,216 tokens LSS, or nothing is faster by 5 %."
    assert "2D (lss_2d): LSS takes 2.00 times" in told[2]
    assert "Ulysses is the one to take in 2 of these places, on 8 ranks with 512 to 32,768 tokens each." in advice(rows)
    text = tables(rows)
    assert "| 4,096 | one device 0.0168 | ulysses 0.00105 (LSS 2.00x) |  |  |" in text
    assert "- Ulysses from 64 ranks on: of 64 ranks" in text


def test_what_cannot_be_told_apart_is_lss():
    rows = [{"strategy": s, "status": "ok", "seconds": x} for s, x in (("ulysses", 1.0), ("lss", 1.04), ("ring", 1.02))]
    assert fastest(rows)["strategy"] == "lss"
    rows[1]["seconds"] = 1.06
    assert fastest(rows)["strategy"] == "ring"  # as the table has it
    assert fastest([{"strategy": "lss", "status": "does not fit", "seconds": 1.0}]) is None


@pytest.mark.parametrize("sooner, said", [
    ([False, False, True, True], "from 512 ranks on, of 8 to 4,096 ranks"), ([True, False, False, False], "come no later"),
    ([True, False, False, True], "from 4,096 ranks on"),
])  # fmt: skip
def test_two_stages_or_one_ring(sooner, said):
    rows = [{"strategy": "lss", "ranks": n, "tokens": room.WEAK * n, "staged_s": 1.0, "flat_s": 2.0 if s else 0.5}
            for n, s in zip((8, 64, 512, 4096), sooner, strict=True)]  # fmt: skip
    assert said in stages(rows)
    assert stages([row | {"flat_s": 1.0} for row in rows]) is None


def test_the_pages_words_are_those_of_its_rows():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/strategies-planned.jsonl").read_text().splitlines()]
    page = (ROOT / "docs/planner.md").read_text()
    assert {row["ranks"] for row in rows} == set(room.RANKS)
    assert {row["tokens"] for row in rows} == set(room.LENGTHS)
    for sentence in sentences(rows):
        assert f"- {sentence}\n" in page
    for line in fastest_table(rows).splitlines():
        assert f"{line}\n" in page


@pytest.mark.parametrize("line, said", [
    (["--calibrate", "p.json", "--out", "x"], "--out=x"), (["--compare", "model.hf=some/model"], "model.hf"),
    (["--compare", "--out", "/dev/null/folder"], "--out"), (["--compare", "--search"], "not allowed"),
])  # fmt: skip
def test_refusals(planned, capsys, line, said):
    assert main(["plan", *SMALL, *line]) == 2
    assert said in capsys.readouterr().err


def test_the_command_writes_rows_tables_and_plots(planned, tmp_path, capsys):
    line = ["plan", *SMALL, "--compare", "--gpus", "64", "--out", str(tmp_path)]
    assert main(line) == 0
    told = capsys.readouterr().out
    assert "### In words" in told
    rows = [json.loads(text) for text in (tmp_path / "strategies-planned.jsonl").read_text().splitlines()]
    assert {row["ranks"] for row in rows} == {1, 8, 32, 64}
    assert (tmp_path / "strategies-planned.md").read_text() in told
    for name in ("weak", "strong-32768"):
        assert (tmp_path / f"strategies-{name}.svg").read_text().startswith("<svg")


def test_traces_are_shared_between_lengths(monkeypatch):
    from lss.planner import tracers

    taken = []
    real = tracers.trace_step
    monkeypatch.setattr(tracers, "trace_step", lambda config, **more: taken.append(config) or real(config, **more))
    rows = compare(build, H100, (2,), (16384, 32768))
    lss = [row for row in rows if row["strategy"] == "lss"]
    assert len([c for c in taken if c.parallel.strategy == "lss"]) == 4
    assert lss[1]["seconds"] > lss[0]["seconds"]
