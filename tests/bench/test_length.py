"""The search for the longest sequence: it ends at the border, wherever that is, and its trials are real steps."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lss.bench import Clock, load_rivals, read_rows
from lss.bench.length import Bounds, Trial, confirm, drawn_out, length_row, longest, of_layers, step_of, take_steps
from lss.bench.tables import tables_of
from lss.bench.train_step import plan_configs
from lss.cli import main
from lss.comm import cp_communicator
from lss.planner import Ledger
from tests.distributed.pool import mesh, pool
from tests.test_house import ROOT

SMALL = ["model.d_model=32", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=2", "model.d_mlp=48",
         "train.batch_size=1"]  # fmt: skip
MEMORY = 12 << 20


def device_of(limit, peak):
    """Trials on a device of so much memory, whose steps take `peak(tokens)`."""
    tried = []

    def attempt(tokens):
        tried.append(tokens)
        taken = int(peak(tokens))
        return Trial(tokens, "ok", taken, limit) if taken <= limit else Trial(tokens, "oom")

    return attempt, tried


@given(
    st.integers(1, 10**6), st.integers(0, 10**9), st.integers(1, 10**5), st.sampled_from([1, 64, 1024]),
    st.integers(1, 10**5), st.integers(1, 10**6), st.floats(0.8, 1.3),
)  # fmt: skip
def test_it_ends_at_any_border(limit, fixed, each, granule, start, upto, power):
    limit, fixed = limit * 1000, fixed // 10
    attempt, tried = device_of(limit, lambda tokens: fixed + each * tokens**power)
    found = longest(attempt, Bounds(granule, start, upto))
    assert found.failure is None
    assert len(set(tried)) == len(tried), "no length is tried twice"
    assert all(tokens % granule == 0 for tokens in tried)
    best = found.best.tokens if found.best else 0
    top = max(1, upto // granule) * granule
    assert best == max((t for t in range(0, top + 1, granule) if not t or fixed + each * t**power <= limit), default=0) \
        if top // granule < 2000 else best <= top  # fmt: skip
    if best < top:
        assert fixed + each * (best + granule) ** power > limit - 1


def test_few_trials_where_memory_grows_linearly():
    attempt, tried = device_of(80 << 30, lambda tokens: (20 << 30) + 40_000 * tokens)
    found = longest(attempt, Bounds(1024, 8192, 1 << 24))
    assert found.best.tokens == (60 << 30) // 40_000 // 1024 * 1024
    assert len(tried) <= 5


def test_another_failure_ends_it():
    found = longest(lambda tokens: Trial(tokens, "ok" if tokens < 99 else "failed: why", 1, 2), Bounds(1, 50, 1000))
    assert (found.best.tokens, found.failure) == (50, "failed: why")


def test_layers_are_drawn_out_and_the_whole_model_confirms():
    def attempt(tokens, layers):
        return Trial(tokens, "ok", 1000 + layers * 10 * tokens, 60_000)

    found = longest(of_layers(attempt, [1, 2], 16), Bounds(4, 16, 1 << 20))
    assert found.best.tokens == (60_000 - 1000) // 160 // 4 * 4
    assert drawn_out([1, 2], [30, 50], 16) == 330
    # the whole takes more than the line says, by a twentieth
    whole, tried = device_of(60_000, lambda tokens: 1.05 * (1000 + 160 * tokens))
    confirmed = confirm(whole, found.best.tokens, Bounds(4, 16, 1 << 20))
    assert confirmed.ok
    assert confirmed.tokens < found.best.tokens
    row = length_row(plan_configs(None, ["model.n_layers=16"], [], [], 1)[0][1], found, confirmed, [1, 2], 10.0)
    assert (row["tokens"], row["confirmed"], row["token_layer_bytes"]) == (confirmed.tokens, True, 10.0)


def steps(ranks, tokens, layers, memory, entry=None, rivals=None):
    """A trial's status and peak, in this pool's processes."""
    from lss.bench.timing import status_of

    ((_, config),) = plan_configs(None, SMALL, [""], [tokens], ranks)
    clock = Clock(cp_communicator(mesh(ranks, 1)), torch.device("cpu"))
    build = step_of(config, layers, entry, load_rivals(rivals), clock, mesh)
    try:
        told = take_steps(build, clock, steps=2, memory=memory, free=1 << 40, counting=partial(Ledger, 1, 0))
    except Exception as error:
        return Trial(tokens, status_of(error))
    return Trial(tokens, told["status"], told["peak_bytes"], told["limit_bytes"])


def test_the_whole_model_takes_what_its_cuts_foretell():
    found = longest(of_layers(lambda tokens, layers: pool(1).run(steps, 1, tokens, layers, MEMORY)[0], [1, 2], 3),
                    Bounds(16, 256, 1 << 20))  # fmt: skip
    best = found.best
    assert best is not None
    assert found.trials[-1].status in ("ok", "oom")
    (fits,), (more,) = (pool(1).run(steps, 1, best.tokens + extra, 3, MEMORY) for extra in (0, 16))
    assert fits.ok
    assert fits.peak_bytes == pytest.approx(best.peak_bytes, rel=0.01)
    assert more.status == "oom"


def test_two_ranks_hold_more_than_one():
    (alone,), both = pool(1).run(steps, 1, 512, 2, 1 << 30), pool(2).run(steps, 2, 512, 2, 1 << 30)
    assert both[0] == both[1]
    assert both[0].peak_bytes < 0.75 * alone.peak_bytes


def test_a_rival_is_tried_alike():
    pytest.importorskip("transformers")
    rivals = str(ROOT / "benchmarks" / "rivals")
    names = [rival.label for rival in load_rivals(rivals) if rival.offers("train")]
    entry = next(i for i, name in enumerate(names) if "checkpointing" in name)
    (ok,), (oom,) = (pool(1).run(steps, 1, 256, 2, memory, entry, rivals) for memory in (1 << 30, 1 << 20))
    assert ok.ok, ok
    assert ok.peak_bytes > 256 * 256 * 4
    assert oom.status == "oom"


def test_the_command_starts_its_own_processes(tmp_path):
    file = tmp_path / "rows.jsonl"
    line = ["bench", "length", *SMALL, "--memory", "0.01", "--out", str(file)]
    assert main([*line, "--start", "128", "--upto", "128", "--steps", "1"]) == 0
    (row,) = read_rows([file])
    assert (row["bench"], row["tokens"], row["status"], row["confirmed"], row["layers"]) == ("length", 128, "ok", True, 3)
    assert row["limit_bytes"] == int(0.01 * 2**30)
    assert row["peak_bytes"] < row["limit_bytes"]
    assert row["command"].startswith("lss bench length")
    assert "| 128 |" in tables_of([row])
    assert json.loads(file.read_text())["options"] == {"memory": "0.01 GiB"}


def test_what_ran_short_is_told(capsys):
    line = ["bench", "length", *SMALL, "--memory", "0.00001", "--start", "128", "--upto", "128", "--steps", "1"]
    main(line)
    assert ": oom (out of memory: " in capsys.readouterr().out


@pytest.mark.parametrize("line, said", [
    (["--layers", "3,1"], "--layers=3,1"), (["--layers", "2"], "--layers=2: one point"), (["--granule", "0"], "--granule=0"),
    (["model.kind=encoder", "model.vocab_size=300"], "model.kind"),
])  # fmt: skip
def test_refusals(capsys, line, said):
    assert main(["bench", "length", *SMALL, *line]) == 2
    assert said in capsys.readouterr().err
