"""`lss check` itself: the shipped configs on 1 to 4 ranks, and planted leaks that its probes must find."""

from __future__ import annotations

import pytest

from lss.check import check_config
from lss.config import load_config
from tests.distributed.pool import mesh, pool
from tests.test_house import ROOT

PROBES = {
    "documents": {"documents", "future"},
    "window": {"window", "future"},
    "encoder": {"documents", "attention_mask"},
    "hybrid": {"documents", "future"},
    "encoder-decoder": {"future"},
    "dropout": {"future"},
}
CONFIGS = sorted((ROOT / "configs" / "check").glob("*.toml"))


def run_check(path, ranks, overrides=(), fault=None):
    """check_config's verdict and findings on this rank, with a fault planted in this process."""
    config = load_config(path, overrides).resolved(ranks)
    undo = plant(fault)
    try:
        result = check_config(config, mesh(config.parallel.cp, config.parallel.dp))
    finally:
        undo()
    probes = [(p.name.split(":")[0], p.leaked, p.affected) for at in result.lengths for p in at.probes]
    gradients = [max(e / b for e, b in at.gradients.values()) for at in result.lengths]
    return result.ok, probes, gradients, result.work, [at.documents for at in result.lengths]


def plant(fault):
    """Change one function of this process; returns what puts it back."""
    import lss.kernels.rules as rules

    make = rules.make_mask

    def faulty(edges, *, causal, window=None, **rest):
        if fault == "documents":
            edges = (0, edges[-1])
        if fault == "window" and window is not None:
            window += 1
        if fault == "causal":
            causal = False
        return make(edges, causal=causal, window=window, **rest)

    rules.make_mask = make if fault is None else faulty
    return lambda: setattr(rules, "make_mask", make)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shipped_check_configs_hold_on_any_number_of_ranks(path, ranks):
    results = pool(ranks).run(run_check, path, ranks)
    assert all(ok for ok, *_ in results)
    _, probes, gradients, work, documents = results[0]
    assert len(gradients) == 2
    assert all(leaked == 0 and affected > 0 for _, leaked, affected in probes)
    names = {name for name, *_ in probes}
    assert PROBES[path.stem] <= names
    if ranks > 1:
        assert "padding" in names
        assert work["balanced"] <= 1.05
    if "documents" in names:
        assert min(documents) > 2


@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_check_with_data_parallel_ranks(fsdp):
    """Data-parallel ranks have other documents and so other probes; sharded ones compute those of the others with them."""
    for what in ("documents", "encoder-decoder"):
        path = next(p for p in CONFIGS if p.stem == what)
        overrides = ["parallel.dp=2", "train.batch_size=2", f"parallel.fsdp={fsdp}"]
        assert all(ok for ok, *_ in pool(4).run(run_check, path, 4, overrides))


@pytest.mark.parametrize(
    "config, fault, probe",
    [("documents", "documents", "documents"), ("window", "window", "window"), ("dropout", "causal", "future")],
)
def test_planted_leaks_are_found(config, fault, probe):
    path = next(p for p in CONFIGS if p.stem == config)
    results = pool(2).run(run_check, path, 2, ["data.prefix=0"], fault)
    assert not any(ok for ok, *_ in results)
    leaks = {name: leaked for name, leaked, _ in results[0][1] if leaked}
    assert probe in leaks, results[0][1]
