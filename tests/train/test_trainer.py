"""Whole runs: the same losses for any cut, the same bits on all ranks, and resumes that go on where they stopped."""

from __future__ import annotations

import json

import pytest
import torch

from lss.checkpoint import verify
from tests.distributed.pool import pool
from tests.train.jobs import deterministic_run, noted_run, train_run


def run(ranks, out, *overrides):
    return pool(ranks).run(train_run, ranks, str(out), list(overrides))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_200_steps_do_not_depend_on_the_cut(tmp_path, positions):
    """Losses to 1e-10 in float64, and bit-identical weights on all ranks, over 200 AdamW steps."""
    runs = {}
    for cp in (1, 2, 4):
        options = ["train.steps=200", f"model.positions={positions}", "data.seq_len=32", "train.batch_size=2"]
        results = run(cp, tmp_path / str(cp), *options)
        assert len({result["digest"] for result in results}) == 1
        assert len(results[0]["losses"]) == 200
        runs[cp] = torch.tensor(results[0]["losses"], dtype=torch.float64)
    assert runs[1][-20:].mean() < runs[1][:20].mean() - 0.5, "it learns"
    for cp in (2, 4):
        assert ((runs[cp] - runs[1]).abs() / runs[1]).max() <= 1e-10


@pytest.mark.parametrize("transport", ["collective", "symmetric"])
def test_deterministic_runs_are_the_same_to_the_bit(tmp_path, transport):
    options = ["train.steps=6", "train.dtype=bfloat16", "model.dropout=0.1", f"parallel.transport={transport}",
               "parallel.head_chunks=2", "memory.checkpointing=attention", "memory.tiles=7"]  # fmt: skip
    first, second = (
        pool(3).run(deterministic_run, 3, str(tmp_path / name), options) for name in ("first", "second")
    )
    assert first[0]["losses"] == second[0]["losses"]
    assert len({result["digest"] for result in (*first, *second)}) == 1


LAYOUTS = [
    [],
    ["parallel.dp=2", "train.accumulate=2"],
    ["optim.name=sgd", "optim.lr=0.1"],
    ["parallel.strategy=tp"],
    ["model.dropout=0.2", "memory.checkpointing=full"],
    ["data.packing=true", "train.accumulate=4", "parallel.order=balanced", "model.windows=[9,0]"],
    ["model.kind=encoder", "model.vocab_size=257", "model.attention_dropout=0.1", "data.mask_rate=0.3"],
    ["model.kind=encoder_decoder", "data.source_every=3", "model.sinks=true"],
    ["data.prefix=10", "model.positions=alibi", "model.softcap=5.0"],
    ["parallel.dp=2", "parallel.fsdp=true", "train.accumulate=2", "model.positions=learned", "memory.checkpointing=full"],
]


def test_packed_sequences_train_alike_on_data_parallel_ranks(tmp_path):
    """Documents come one row at a time: two rows a rank over two groups of ranks are four on one."""
    options = ["train.steps=6", "data.packing=true", "model.positions=learned", "parallel.order=balanced"]
    one = run(1, tmp_path / "one", *options, "train.accumulate=4")[0]
    for result in run(4, tmp_path / "four", *options, "train.accumulate=2", "parallel.dp=2"):
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-10)


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_encoders_and_encoder_decoders_learn(tmp_path, kind):
    """Held-out loss falls well below where it began, on two ranks, and the held-out loss is that of one rank."""
    options = ["train.steps=60", "data.seq_len=64", f"model.kind={kind}", "model.vocab_size=257", "optim.lr=0.01",
               "train.eval_every=60", "train.eval_samples=8", "optim.warmup=5", "data.mask_rate=0.3",
               "model.positions=learned", "model.d_model=48"]  # fmt: skip
    runs = [run(cp, tmp_path / str(cp), *options) for cp in (1, 2)]
    losses = torch.tensor(runs[1][0]["losses"])
    assert losses[-10:].mean() < losses[:5].mean() - 1.5
    assert abs(runs[0][0]["eval"] / runs[1][0]["eval"] - 1) <= 1e-7  # rounding, grown over 60 steps
    assert runs[1][0]["eval"] < 3.6  # 5.5 nats is knowing nothing


@pytest.mark.parametrize("overrides", LAYOUTS, ids=" ".join)
def test_layouts_train_alike(tmp_path, overrides):
    ranks = 4 if "parallel.dp=2" in overrides else 2
    alone = run(1, tmp_path / "one", "train.steps=8", *(o for o in overrides if not o.startswith("parallel")))[0]
    many = run(ranks, tmp_path / "many", "train.steps=8", *overrides)
    assert many[0]["losses"] == pytest.approx(alone["losses"], rel=1e-11)
    for name, weight in alone["weights"].items():
        for result in many:
            assert (result["weights"][name] - weight).abs().max() <= 1e-9 * weight.abs().max()


def test_resume_is_the_run_without_a_stop(tmp_path):
    """10 steps = 5 + resume + 5, in another layout too; metrics stay one row a step."""
    options = ["model.positions=learned", "train.batch_size=4", "optim.warmup=4", "checkpoint.every=5"]
    straight = run(2, tmp_path / "straight", "train.steps=10", *options)[0]
    for ranks in (2, 3):
        out = tmp_path / str(ranks)
        # the schedule belongs to the last step, so the first half runs as part of ten: stop it by taking its checkpoint
        run(2, out, "train.steps=10", *options)
        (out / "checkpoints" / "step_10").rename(tmp_path / f"gone{ranks}")
        resumed = run(ranks, out, "train.steps=10", *options)[0]
        assert resumed["from"] == 5
        assert resumed["losses"] == pytest.approx(straight["losses"][5:], rel=0 if ranks == 2 else 1e-12)
        if ranks == 2:
            assert resumed["digest"] == straight["digest"]
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 11))


def test_sharded_runs_go_on_as_others_and_others_as_sharded(tmp_path):
    """Evaluated and saved at 5 of 10 steps, in one layout of parameters and resumed in another, to the numbers of one."""
    options = ["model.positions=learned", "model.tie_embeddings=false", "train.steps=10", "checkpoint.every=5",
               "train.eval_every=5"]  # fmt: skip
    straight = run(1, tmp_path / "straight", *options)[0]
    sharded, wide = ["parallel.fsdp=true"], ["parallel.fsdp=true", "parallel.dp=2"]
    for number, ((ranks, first), (others, second)) in enumerate((((2, sharded), (3, [])), ((2, []), (4, wide)))):
        out = tmp_path / str(number)
        run(ranks, out, *options, *first)
        (out / "checkpoints" / "step_10").rename(tmp_path / f"gone{number}")
        results = run(others, out, *options, *second)
        assert results[0]["from"] == 5
        assert results[0]["losses"] == pytest.approx(straight["losses"][5:], rel=1e-10)
        assert results[0]["eval"] == pytest.approx(straight["eval"], rel=1e-10)
        assert len({result["digest"] for result in results}) == 1


def test_a_finished_run_has_nothing_to_do(tmp_path):
    run(1, tmp_path, "train.steps=2")
    assert run(1, tmp_path, "train.steps=2")[0]["losses"] == []


@pytest.mark.parametrize(
    "change, words",
    [("model.d_mlp=64", "model.d_mlp=64"), ("data.seq_len=40", "data.seq_len=40"), ("checkpoint.resume=never", "never"),
     ("optim.name=sgd", "optim.name=sgd")],
)  # fmt: skip
def test_another_run_in_the_same_folder_is_refused(tmp_path, change, words):
    run(1, tmp_path, "train.steps=2")
    before = (tmp_path / "metrics.jsonl").read_text()
    ((ok, error),) = pool(1).outcomes(train_run, 1, str(tmp_path), ["train.steps=3", change])
    assert not ok
    assert error[0] == "Refused"
    assert words in error[1]
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_corpus_that_changed_is_refused_on_resume(tmp_path):
    """Other bytes under the same path would be another run's continuation."""
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 40)
    options = [f"data.path={text}", "data.held_out=0.2"]
    run(1, tmp_path / "run", "train.steps=1", *options)
    text.write_bytes(bytes(range(256)) * 50)
    ((ok, error),) = pool(1).outcomes(train_run, 1, str(tmp_path / "run"), ["train.steps=3", *options])
    assert not ok
    assert error[0] == "Refused"
    assert "data.path" in error[1]


def test_rows_hold_what_is_promised(tmp_path):
    run(2, tmp_path, "train.steps=3", "train.eval_every=2", "data.seq_len=48", "data.path=''")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    keys = ["step", "loss", "grad_norm", "lr", "tokens_counted", "tokens_per_s", "peak_memory_bytes", "step_time_s", "mfu"]
    assert [list(row)[: len(keys)] for row in rows] == [keys] * 3
    assert [row["tokens_counted"] for row in rows] == [4 * 48] * 3
    assert ["eval_loss" in row for row in rows] == [False, True, True]
    assert rows[0]["loss"] == pytest.approx(5.55, abs=0.3)  # ln 256: it knows nothing yet of a few bytes
    assert verify(tmp_path / "checkpoints" / "step_3").step == 3


def test_old_checkpoints_go_and_the_newest_stay(tmp_path):
    run(1, tmp_path, "train.steps=6", "checkpoint.every=1", "checkpoint.keep=2")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_5", "step_6"]


def test_bfloat16_trains_close_to_float32(tmp_path):
    losses = [run(2, tmp_path / dtype, "train.steps=20", f"train.dtype={dtype}")[0]["losses"]
              for dtype in ("bfloat16", "float32")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_lines_about_a_step_are_printed_after_it(tmp_path):
    (told,) = pool(1).run(noted_run, str(tmp_path / "run"))
    places = [told.index(f"told of {step}") for step in (1, 2, 3)]
    assert places == sorted(places)
    assert told.index("step 2/3") < places[1] < told.index("step 3/3")
