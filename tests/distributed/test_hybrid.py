"""Models with layers that carry a state: gradients of every parameter against one process, collectives, refusals."""

from __future__ import annotations

import shutil
from itertools import product

import pytest
import torch

import lss
from lss.comm import count_collectives
from lss.model import Transformer
from lss.model.size import parameter_count
from tests.distributed.model_cases import BOUNDS, hold_parity, model_config, parity_case
from tests.distributed.pool import mesh, pool
from tests.distributed.test_parity import BORDERS

MESHES = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2)]
SCAN = {"layers": "sa", "scan_heads": 4, "scan_state": 6, "scan_groups": 2}
MODELS = {
    "scan": SCAN | {"layers": "s"},
    "hybrid": SCAN | {"layers": "sa", "conv_width": 3},
    "spade": SCAN | {"layers": "ba", "windows": (5,), "scan_groups": 1, "scan_width": 40},
}


def cases():
    """Every model, mesh and order, with options that take turns."""
    for number, ((name, model), (cp, dp), order) in enumerate(
        product(MODELS.items(), MESHES, ["head_tail", "contiguous", "balanced"])
    ):
        options = {"model": model, "order": order, "seq_len": [23, 24, 7][number % 3], "accumulate": [1, 3][number % 2],
                   "labels": ["uneven", "even"][number % 2], "precut": number % 4 == 0,
                   "checkpointing": ["none", "full", "attention"][number % 3]}  # fmt: skip
        yield pytest.param(cp, dp, options, id=f"{name}-{order}-cp{cp}-dp{dp}")
        if dp == 1:
            packed = {"model": model, "order": order, "seq_len": 23, "rows": 1, "given": BORDERS, "labels": "uneven"}
            yield pytest.param(cp, dp, packed, id=f"{name}-documents-{order}-cp{cp}")
    for name, model in MODELS.items():
        shared = {"model": model | {"dropout": 0.2}, "seq_len": 23, "labels": "uneven"}
        yield pytest.param(2, 1, shared | {"checkpointing": "full"}, id=f"{name}-dropout")
        yield pytest.param(2, 1, shared | {"dtype": torch.float32}, id=f"{name}-float32")
        yield pytest.param(3, 1, shared | {"strategy": "ring"}, id=f"{name}-ring")
        away = {"checkpointing": "attention", "offload": "host", "tiles": 5}
        yield pytest.param(2, 1, shared | away, id=f"{name}-offload")
        yield pytest.param(2, 2, {"model": model, "fsdp": True, "checkpointing": "full"}, id=f"{name}-fsdp")
        yield pytest.param(4, 1, shared | {"per_node": 2}, id=f"{name}-two-nodes")


@pytest.mark.parametrize("cp, dp, options", list(cases()))
def test_gradients_equal_one_process(cp, dp, options):
    results = pool(cp * dp).run(parity_case, cp, dp, **options)
    hold_parity(results, options.get("dtype", torch.float64))


def _counted(S, layers, **options):
    model = Transformer(model_config(**(SCAN | {"layers": layers, "windows": (5,), "n_layers": 3})), S)
    model = lss.parallelize(model, mesh(2), order="contiguous", **options)
    ids = torch.zeros(1, S, dtype=torch.int64)
    with count_collectives() as counter:
        model(ids, ids).loss.backward()
    return {(kind, purpose): (calls, size) for kind, purpose, calls, size in counter.rows()}


@pytest.mark.parametrize("checkpointing, again", [(None, 1), ("full", 2), ("attention", 1)])
def test_collectives_of_a_whole_step(checkpointing, again):
    """Two of states and two of halos a layer that scans, at any length; under "full" those of forward once more."""
    scans, N, P, H, mixed = 2, 4, 6, 16, 64 + 2 * 2 * 6
    for S in (32, 128):
        for rank, counts in enumerate(pool(2).run(_counted, S, "sab", checkpointing=checkpointing)):
            assert counts["all_gather", "state"] == (again * scans, again * scans * 2 * N * (P * H + 1) * 4)
            assert counts["all_gather", "dstate"] == (scans, scans * 2 * N * P * H * 4)
            # what stands before the recurrence is computed again under both
            halos = scans * (1 if checkpointing is None else 2)
            assert counts["all_to_all", "halo"] == (halos, halos * 3 * mixed * 4 * (rank == 0))
            assert counts["all_to_all", "dhalo"] == (scans, scans * 3 * mixed * 4 * (rank == 1))


MORE = [{}, {"kind": "encoder_decoder"}, SCAN | {"layers": "sbba", "n_layers": 5}]


@pytest.mark.parametrize("model", [*MORE, *MODELS.values()])
def test_parameters_are_counted(model):
    config = model_config(**model)
    assert parameter_count(config, 16) == sum(p.numel() for p in Transformer(config, 16).parameters())


def _compiled():
    """What stands behind a mixer is compiled, once for all blocks that are alike."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = MODELS["hybrid"] | {"n_layers": 4}
    result = parity_case(2, compile=True, checkpointing="attention", model=model, labels="uneven", tiles=12)
    return result, sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_pieces_compute_the_same():
    for result, breaks in pool(2).run(_compiled):
        assert result["gradient"] <= BOUNDS[torch.float64], result["parameter"]
        assert breaks == 0


def _misuse(what):
    if what == "tp":
        lss.parallelize(Transformer(model_config(**SCAN), 8), mesh(2), strategy="tp")
    for key, value in (("kind", "encoder"), ("layers", "sx"), ("scan_heads", 3), ("scan_groups", 3)):
        if what == key:
            Transformer(model_config(**(SCAN | {key: value})), 8)
    if what == "unused":
        Transformer(model_config(scan_state=8), 8)
    model = lss.parallelize(Transformer(model_config(**SCAN), 8), mesh(2))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    given = {
        "prefix": {"prefix": 3},
        "attention_mask": {"attention_mask": torch.ones(1, 8)},
        "mask_mod": {"mask_mod": lambda b, h, i, j: i >= j},
    }
    model(ids, **given.get(what, {}))


@pytest.mark.parametrize(
    "what, words",
    [
        ("tp", 'parallel.strategy="tp"'),
        ("kind", 'model.layers="sa": model.kind="encoder"'),
        ("layers", '"x" is no kind of layer'),
        ("scan_heads", "model.scan_heads=3: must divide the scan's width, 64"),
        ("scan_groups", "model.scan_groups=3: must divide model.scan_heads=4"),
        ("unused", "model.scan_state=8"),
        ("prefix", "prefix=3: model.layers='sa'"),
        ("attention_mask", "attention_mask=(1, 8): model.layers='sa'"),
        ("mask_mod", "mask_mod=a function: model.layers='sa'"),
    ],
)
def test_what_a_state_does_not_compute_is_refused(what, words):
    for ok, error in pool(2).outcomes(_misuse, what):
        assert not ok
        assert error[0] == "Refused", error[2]
        assert words in error[1]
