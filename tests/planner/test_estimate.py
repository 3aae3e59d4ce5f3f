"""What short traces draw out to is what a long one finds; and a run is warned by it before step 1."""

from __future__ import annotations

import json
import re

import pytest
import torch

from lss.config import Refused, load_config
from lss.hosts import all_memory
from lss.planner import Ledger, estimate, trace_step, warning
from lss.planner.drawn import Drawn
from lss.planner.estimate import curve_drawn, step_drawn
from lss.planner.host_room import again_share, room_of
from lss.planner.ledger import stretch
from lss.train.metrics import read_metrics
from tests.faults.ranks import Run

LONG = ["data.seq_len=8192", "train.batch_size=2", "model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2",
        "model.d_mlp=96"]  # fmt: skip
RUNS = {
    "plain": (1, []),
    "two ranks, recomputed": (2, ["memory.checkpointing=full"]),
    "offloaded": (2, ["data.seq_len=65536", "memory.checkpointing=attention", "memory.offload=host"]),
    "many tiles": (1, ["data.seq_len=16384", "train.batch_size=1", "memory.checkpointing=attention", "memory.tiles=1024",
                       "model.n_layers=3", "model.residual=compute"]),
    "tiles but before attention": (1, ["data.seq_len=65536", "train.batch_size=1", "memory.checkpointing=full",
                                       "model.d_mlp=2048"]),
    "sharded, wide": (2, ["parallel.fsdp=true", "model.vocab_size=2000", "memory.tiles=2048"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_drawn_out_is_what_the_whole_length_takes(name):
    ranks, overrides = RUNS[name]
    config = load_config(None, [*LONG, *overrides]).resolved(ranks)
    found, whole = estimate(config), trace_step(config).peak
    assert found.bytes == pytest.approx(whole.bytes, rel=0.1)
    assert found.host == pytest.approx(whole.host, rel=0.1)
    largest = max(whole.classes, key=whole.classes.__getitem__)
    assert found.classes[largest] == pytest.approx(whole.classes[largest], rel=0.2)


# MiB: four inputs take 64, and an attention's output with its lse 17
@pytest.mark.parametrize("room, kept", [(200, 4), (103, 2), (70, 0), (40, 0)])
def test_a_bounded_room_in_host_memory_is_counted_as_a_run_has_it(room, kept):
    overrides = ["data.seq_len=65536", "model.n_layers=4", "memory.checkpointing=attention", "memory.offload=host"]
    config = load_config(None, [*LONG, *overrides, f"memory.offload_gib={room / 1024}"]).resolved(2)
    assert again_share(config, room_of(config)) == 1 - kept / 4
    found, whole = step_drawn(config), Drawn.of(trace_step(config))
    assert whole.peak.host == pytest.approx((64 + 17 * kept if room >= 64 else 32) * 2**20, rel=0.01)
    assert found.peak.host == pytest.approx(min(room * 2**20, whole.peak.host), rel=0.25 if room < 64 else 0.05)
    assert found.peak.bytes == pytest.approx(whole.peak.bytes, rel=0.1)
    assert found.payload == whole.payload
    assert found.products == pytest.approx(whole.products, rel=1e-9)


def test_no_picture_is_drawn_of_blocks_that_differ():
    overrides = ["data.seq_len=65536", "memory.checkpointing=attention", "memory.offload=host", "memory.offload_gib=0.05"]
    with pytest.raises(Refused, match=r"memory\.offload_gib=0\.05: host memory of .* has no room"):
        curve_drawn(load_config(None, [*LONG, *overrides]).resolved(2))


def test_what_a_cache_keeps_beyond_a_step_does_not_tell_two_steps_apart():
    ledgers = []
    for tokens, cached in ((100, True), (200, False)):
        ledger = Ledger()
        with ledger:
            before = torch.zeros(10)
            ledger.enter("forward")
            x = torch.zeros(tokens)
            if not cached:
                del before
            del x
            ledger.closed = True
        ledgers.append(ledger)
    assert stretch(*ledgers, 2.0, 1 << 30).peak().bytes == (10 + 300) * 4
    with ledgers[1]:
        torch.zeros(3)
    with pytest.raises(ValueError, match="same allocations"):
        stretch(*ledgers, 2.0, 1 << 30)


def test_the_warning_names_class_and_remedy():
    cpu, config = torch.device("cpu"), load_config(None, LONG).resolved(1)
    needed = estimate(config).bytes
    assert warning(config, needed, cpu) is None
    said = warning(config, needed - 1, cpu)
    assert re.search(r"a rank needs .* \(activations .*\) and .* are free; of activations less", said)
    assert 'memory.checkpointing="full"' in said
    # nothing is traced for a small run on a large machine, whose start is not to take longer
    assert warning(load_config(None).resolved(1), all_memory(), cpu) is None


def little_memory():
    """This host, as far as it tells, has no memory free."""
    import lss.hosts as hosts

    hosts.free_memory = lambda: 1 << 20


def test_a_warned_run_goes_on_and_is_the_same(tmp_path):
    runs = [Run(tmp_path / name, 2, ["train.steps=2", "train.batch_size=2"], hook=hook)
            for name, hook in (("warned", little_memory), ("plain", None))]  # fmt: skip
    for run in runs:
        assert run.wait(90) == [0, 0], run.said()
    assert runs[0].said().count("a step will hardly fit") == 1
    assert "hardly" not in runs[1].said()
    losses = [[row["loss"] for row in read_metrics(run.out / "metrics.jsonl")] for run in runs]
    assert losses[0] == losses[1]
    facts = json.loads((runs[0].out / "run.json").read_text())["results"]["memory"]
    assert facts["step"] == 2
