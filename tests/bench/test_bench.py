"""The bench on CPU ranks: whole rows, checked results, counted bytes, resuming, and failures that cost one row each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lss.bench import (
    AttentionPlan,
    Clock,
    Heads,
    Results,
    bench_attention,
    load_rivals,
    oracle,
    parse_options,
    read_rows,
)
from lss.bench.rows import IDENTITY, KEYS, driver_version, identity
from lss.bench.tables import fill_page, tables_of
from lss.bench.timing import spread_of, status_of
from lss.bench.train_step import TrainPlan, bench_train, plan_configs
from lss.cli import main
from lss.comm import Communicator
from lss.config.errors import Refused
from lss.mesh import axis_group
from tests.distributed.pool import mesh, pool

HEADS = Heads(4, 2, 8)
PLAN = AttentionPlan([64], [HEADS], strategies=("lss",), dtype="float64", repeat=2)
TINY = ["model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.d_mlp=48", "data.seq_len=32",
        "train.batch_size=2", "train.dtype=float64"]  # fmt: skip

RIVALS = {
    "right.py": """
import torch, torch.distributed as dist
import torch.distributed.nn.functional as differentiable
NAME = "right"
def version(): return "1.0"
def why_not(): return None
def attention(group, rank, world):
    def f(q, k, v):
        keys, values = (torch.cat(differentiable.all_gather(x.contiguous(), group), 1) if world > 1 else x for x in (k, v))
        T = q.shape[1]
        seen = torch.arange(keys.shape[1]) <= rank * T + torch.arange(T)[:, None]
        share = q.shape[2] // k.shape[2]
        keys, values = (x.repeat_interleave(share, 2) for x in (keys, values))
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen).transpose(1, 2)
    return [("gather", "contiguous", f)]
""",
    "wrong.py": """
import importlib.util, pathlib
_spec = importlib.util.spec_from_file_location("right", pathlib.Path(__file__).with_name("right.py"))
_right = importlib.util.module_from_spec(_spec); _spec.loader.exec_module(_right)
NAME = "wrong"
def version(): return "2.0"
def why_not(): return None
def attention(group, rank, world):
    (_, order, f), = _right.attention(group, rank, world)
    return [("gather", order, lambda q, k, v: f(q, k, v * (1 + 1e-9)))]
""",
    "raises.py": """
NAME = "raises"
def version(): return "3.0"
def why_not(): return None
def attention(group, rank, world):
    def f(q, k, v): raise ValueError("no such shape")
    return [("a", "striped", f)]
""",
    "absent.py": """
NAME = "absent"
def version(): return None
def why_not(): return "pip install absent"
def attention(group, rank, world): raise AssertionError("never asked")
""",
    "broken.py": "import nothing_of_this_name\n",
    "_helper.py": "raise AssertionError('helpers are not loaded')\n",
}


def clock_of(ranks: int) -> Clock:
    return Clock(Communicator(axis_group(mesh(ranks), ("cp",))), torch.device("cpu"))


def measure(plan: AttentionPlan, ranks: int, out: Path | None = None, rivals: Path | None = None) -> list[dict]:
    """Runs on every rank of a pool."""
    clock = clock_of(ranks)
    plan = AttentionPlan(**vars(plan) | {"rivals": load_rivals(rivals and str(rivals))})
    return bench_attention(plan, clock, Results(out, writes=clock.comm.rank == 0), "lss bench attention --some")


def first(ranks: int, *arguments) -> list[dict]:
    """The rows, which all ranks must have alike."""
    found = pool(ranks).run(*arguments)
    assert all(rows == found[0] for rows in found)
    return found[0]


@pytest.fixture
def adapters(tmp_path):
    folder = tmp_path / "rivals"
    folder.mkdir()
    for name, text in RIVALS.items():
        (folder / name).write_text(text)
    return folder


def measure_graphs(plan: AttentionPlan, ranks: int) -> tuple[list[dict], int]:
    """The rows where capture only counts, since a CPU has none, and how many steps were captured."""
    taken = []

    def captured(step):
        taken.append(step)
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lss.bench.graphs.captured", captured)
        return measure(plan, ranks), len(taken)


def test_graphs_are_cells_of_their_own_up_to_a_length():
    plan = AttentionPlan([32, 64], [HEADS], strategies=("lss", "ring"), dtype="float64", repeat=2, graphs_upto=32)
    for rows, captures in pool(2).run(measure_graphs, plan, 2):
        cells = [(row["tokens"], row["graph"], row["strategy"]) for row in rows if row["status"] == "ok"]
        names = ("one device", "lss", "ring")
        graphs = [(32, True, n) for n in names[:2]]
        assert cells == [(32, None, n) for n in names] + graphs + [(64, None, n) for n in names]
        assert captures == 3  # one device, ours, and ours without communication
        by = {(row["tokens"], row["graph"], row["strategy"]): row for row in rows}
        assert by[32, True, "lss"]["no_comm_ms"] > 0
        assert by[32, True, "lss"]["payload_bytes"] is None
        assert by[32, None, "lss"]["payload_bytes"] > 0


@pytest.mark.parametrize("module", ["NVIDIA UNIX Open Kernel Module for x86_64", "NVIDIA UNIX x86_64 Kernel Module"])
def test_the_drivers_number_is_found(module):
    text = f"NVRM version: {module}  580.159.04  Release Build  (x)  Fri\nGCC version: gcc 12.2.0\n"
    assert driver_version(text) == "580.159.04"
    assert driver_version("nothing") is None


def test_graph_rows_have_tables_of_their_own(tmp_path):
    (rows, _), _ = pool(2).run(measure_graphs, AttentionPlan(**vars(PLAN) | {"graphs_upto": 64}), 2)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row | {"ms": 3.0 if row["graph"] else 5.0}) + "\n" for row in rows))
    page = "".join(f"<!-- table time a.jsonl{what} -->\n<!-- end of table -->\n" for what in ("", " graph=True"))
    plain, graphs = fill_page(page, tmp_path).split("<!-- table time a.jsonl graph=True -->")
    assert "5.00" in plain
    assert "3.00" not in plain
    assert "3.00" in graphs
    assert "5.00" not in graphs
    assert "as CUDA graphs" in tables_of(read_rows([file]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_are_whole_and_results_are_checked(ranks):
    plan = AttentionPlan([61], [HEADS], dtype="float64", repeat=2, orders=("head_tail", "contiguous"))
    rows = first(ranks, measure, plan, ranks)
    assert len(rows) == 1 + 3 * 2
    for row in rows:
        assert tuple(row) == KEYS
        assert row["status"] == "ok"
        assert row["ms"] > 0
        assert row["rounds"] == 2
        assert 0 < row["error"] <= 1e-12
        assert row["kernel"] == "sdpa_cpu", "the row says what ran, not 'auto'"
        assert {"lss", "torch", "python"} <= row["versions"].keys()
        assert row["command"] == "lss bench attention --some"
        one = row["strategy"] == "one device"
        assert row["world_size"] == (1 if one else ranks)
        assert (row["ideal_ms"] is None) == one
        assert (row["no_comm_ms"] is not None) == (row["strategy"] == "lss" and ranks > 1)
    assert len({identity(row) for row in rows}) == len(rows)


def test_counted_bytes_are_those_of_the_formula():
    plan = AttentionPlan(**vars(PLAN) | {"options": [parse_options("head_chunks=2;regather=false")], "batch": 3})
    one, plain, chunked = first(2, measure, plan, 2)
    layer = 2 * 3 * 64 * HEADS.K * HEADS.H * 8  # 2*B*S*K*H elements of 8 bytes
    assert (one["payload_bytes"], one["calls"]) == (0, 0)
    assert (plain["payload_bytes"], plain["calls"]) == (3 * layer, 3)  # gather, gather again, scatter
    assert chunked["options"] == {"head_chunks": 2, "regather": False}
    assert (chunked["payload_bytes"], chunked["calls"]) == (2 * layer, 4)


def test_resuming_skips_what_is_there_and_only_picks(tmp_path):
    out = tmp_path / "rows.jsonl"
    plan = AttentionPlan(**vars(PLAN) | {"strategies": ("lss", "ring")})
    picked = AttentionPlan(**vars(plan) | {"only": ("ring",)})
    assert [row["strategy"] for row in first(2, measure, picked, 2, out)] == ["ring"]
    assert [row["strategy"] for row in first(2, measure, plan, 2, out)] == ["one device", "lss"]
    assert first(2, measure, plan, 2, out) == []
    assert sorted(row["strategy"] for row in read_rows([out])) == ["lss", "one device", "ring"]
    assert not out.with_name("rows.jsonl.running").exists()
    lines = out.read_text().splitlines()
    assert [tuple(json.loads(line)) for line in lines] == [KEYS] * 3


def test_failed_rows_are_kept_or_retried_and_a_run_that_died_is_passed(tmp_path):
    out = tmp_path / "rows.jsonl"
    row = dict.fromkeys(KEYS) | {"bench": "attention", "status": "failed: x"}
    out.write_text(json.dumps(row) + "\n")
    assert Results(out, writes=False).done(row)
    assert not Results(out, writes=False, retry=True).done(row)
    for deaths in range(1, 4):
        results = Results(out, writes=True)
        assert results.killed(row) == (deaths > 2), "one run may have been stopped from outside"
        results.begin(row | {"tokens": 5})
        results.begin(row)  # and then the process is ended
    results.end()
    assert not Results(out, writes=True).killed(row)
    assert set(IDENTITY) < set(KEYS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rivals_are_checked_like_ours_and_fail_alone(adapters, ranks):
    rows = {row["rival"] or row["strategy"]: row for row in first(ranks, measure, PLAN, ranks, None, adapters)}
    assert rows["lss"]["status"] == "ok"
    assert rows["right 1.0"]["status"] == "ok"
    assert rows["right 1.0"]["ideal_ms"] == rows["lss"]["ideal_ms"]
    assert rows["right 1.0"]["payload_bytes"] is None
    wrong = rows["wrong 2.0"]
    assert wrong["status"].startswith("failed: error of out 1.00e-09 above 1.00e-12")
    assert wrong["ms"] is None
    assert wrong["error"] > 1e-12
    assert rows["raises 3.0"]["status"] == "failed: ValueError: no such shape"
    assert rows["absent"]["status"] == "failed: not installed: pip install absent"
    assert rows["broken"]["status"].startswith("failed: its adapter cannot be loaded: ModuleNotFoundError")
    assert len(rows) == 7


def test_lengths_that_rivals_cannot_cut_are_their_failures_only(adapters):
    plan = AttentionPlan(**vars(PLAN) | {"lengths": [61]})
    rows = {row["rival"] or row["strategy"]: row["status"] for row in first(2, measure, plan, 2, None, adapters)}
    assert rows["lss"] == "ok"
    assert rows["right 1.0"] == "failed: 61 tokens do not divide over 2 ranks"


@pytest.mark.parametrize("place", range(4), ids=oracle.NAMES)
def test_the_truth_is_autograds_and_shows_any_fault(place):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 80, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2, 4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole = [x.transpose(1, 2) for x in leaves]
    out = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True).transpose(1, 2)
    found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    truth = oracle.exact(q, k, v, dout, keys_too=True)
    assert truth.key_heads == [0, 1]
    places = torch.arange(80)
    errors = oracle.relative_errors(oracle.squared_errors(truth, tuple(found), places))
    assert max(errors.values()) < 1e-13
    found[place] = found[place] * (1 + 1e-6)
    errors = oracle.relative_errors(oracle.squared_errors(truth, tuple(found), places))
    assert [name for name, error in errors.items() if error > 1e-7] == [oracle.NAMES[place]]
    found[place][0, -1, -1, -1] = torch.nan
    errors = oracle.relative_errors(oracle.squared_errors(truth, tuple(found), places))
    assert errors[oracle.NAMES[place]] != errors[oracle.NAMES[place]]


def train(ranks: int, out: Path | None, variants: list[str], plain: bool) -> list[dict]:
    """Runs on every rank of a pool."""
    clock = clock_of(ranks)
    plan = TrainPlan(plan_configs(None, TINY, variants, [32, 30], ranks), plain=plain, repeat=2)
    return bench_train(plan, mesh_of, clock, Results(out, writes=clock.comm.rank == 0), "lss bench train")


def mesh_of(cp: int, dp: int):
    return mesh(cp, dp)


def test_training_steps_of_all_variants_agree_and_give_whole_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    variants = ["", "parallel.cp=1 parallel.dp=2", "memory.checkpointing=full parallel.strategy=ring"]
    rows = first(2, train, 2, out, variants, True)
    assert len(rows) == 2 * 4
    for row in rows:
        assert tuple(row) == KEYS
        assert row["status"] == "ok"
        assert row["bench"] == "train"
        assert row["tokens_per_s"] == pytest.approx(2 * row["tokens"] / (1e-3 * row["ms"]), rel=1e-3)
    plain, lss = rows[0], rows[1]
    assert (plain["strategy"], plain["world_size"], plain["calls"]) == ("plain", 1, 0)
    assert (lss["strategy"], lss["world_size"], lss["layers"], lss["heads"]) == ("lss", 2, 2, "4/4x8")
    assert lss["payload_bytes"] > 2 * 3 * 2 * 2 * 32 * 32 * 8
    assert first(2, train, 2, out, variants, True) == []


def test_spread_and_statuses():
    assert spread_of([2.0, 1.0, 4.0]) == 1.5
    assert spread_of([float(n) for n in range(1, 12)]) == pytest.approx(8 / 6)
    assert status_of(torch.cuda.OutOfMemoryError()) == "oom"
    assert status_of(ValueError("why\nmore")) == "failed: ValueError: why"


def planted_failure(fails: bool) -> tuple:
    """Rank 1 alone fails, in a local call."""
    clock = clock_of(2)

    def action():
        if fails and clock.comm.rank == 1:
            raise ValueError("only here")
        return clock.comm.rank

    return clock.attempt(action)


def test_all_ranks_learn_of_a_failure_of_one():
    assert pool(2).run(planted_failure, True) == [(None, "failed: ValueError: only here")] * 2
    assert pool(2).run(planted_failure, False) == [(0, None), (1, None)]


REFUSALS = [
    (["attention", "--strategies", "lsss"], "--strategies=lsss"),
    (["attention", "--kernels", "flash9"], "--kernels=flash9"),
    (["attention", "--orders", "zigzag"], "--orders=zigzag"),
    (["attention", "--heads", "5/2x8"], "--heads=5/2x8"),
    (["attention", "--heads", "many"], "--heads=many"),
    (["attention", "--lengths", "64,-1"], "--lengths='64,-1'"),
    (["attention", "--lengths", "2", "--nproc", "3"], "--lengths=2"),
    (["attention", "--dtype", "int8"], "--dtype=int8"),
    (["attention", "--options", "head_chunk=8"], "nearest is head_chunks"),
    (["attention", "--options", "regather=8"], "use true, false or auto"),
    (["attention", "--options", "strategy=none"], "--strategies=None"),
    (["attention", "--rivals", "absent"], "--rivals=absent"),
    (["attention", "--repeat", "0"], "--repeat=0"),
    (["attention", "--nproc", "0"], "--nproc=0"),
    (["attention", "--out", "."], "--out=."),
    (["train", "optim.lrr=1"], "nearest is optim.lr"),
    (["train", "--variants", "parallel.strategy=lss;parallel.strategy=tpp"], "parallel.strategy='tpp'"),
    (["train", "model.preset=tiny-encoder"], "model.kind"),
    (["plot", "absent.jsonl"], "absent.jsonl: cannot be read"),
    (["plot", "absent.jsonl", "--format", "gif"], "--format=gif"),
    (["table"], "give result files"),
    (["table", "--page", "absent.md"], "--page=absent.md"),
    (["breadth"], "argument ACTION"),
]


@pytest.mark.parametrize("arguments, words", REFUSALS, ids=lambda x: " ".join(x)[-40:] if isinstance(x, list) else None)
def test_refusals_are_one_sentence_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_options_are_those_of_the_dataclass():
    assert parse_options("head_chunks=8; regather=false;kernel=tiled;strategy=ring") == {
        "head_chunks": 8, "regather": False, "kernel": "tiled", "strategy": "ring"}  # fmt: skip
    assert parse_options("head_chunks=auto") == {"head_chunks": "auto"}
    with pytest.raises(Refused, match="write name=value"):
        parse_options("head_chunks")


def half_precision(factor: float) -> list[dict]:
    """Runs on a rank of a pool, as all that needs a mesh."""
    plan = AttentionPlan(**vars(PLAN) | {"dtype": "bfloat16", "strategies": ("lss", "ring"), "lengths": [128]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lss.bench.plan.OWN_ERROR_FACTOR", factor)
        return measure(plan, 1)


def test_half_precision_is_held_to_the_kernels_own_error():
    one, lss, ring = first(1, half_precision, 1.25)
    assert {one["status"], lss["status"], ring["status"]} == {"ok"}
    assert 1e-4 < one["error"] < 1e-2
    one, lss, ring = first(1, half_precision, 0.5)
    assert (one["status"], ring["status"]) == ("ok", "ok")
    assert lss["status"].startswith("failed: error of out")
    assert lss["ms"] is None
