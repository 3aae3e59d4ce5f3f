"""The loss of a whole text, cut over ranks in every order, against one process that scores token after token."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from lss.data import ByteCorpus
from lss.model import Transformer
from lss.train.evaluate import score
from lss.train.models import Subject, load_model
from lss.train.token_losses import LossesFile
from tests.distributed.pool import mesh, pool
from tests.train.jobs import config_of

SIZES = (61, 1, 40, 2, 17, 3)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of documents, one of which has no label and one just one."""
    folder, draw = tmp_path_factory.mktemp("text"), np.random.default_rng(3)
    for number, size in enumerate(SIZES):
        (folder / f"{number}.txt").write_bytes(draw.integers(97, 122, size, dtype=np.uint8).tobytes())
    return str(folder)


def settings(folder, window, overrides):
    return [f"data.path={folder}", f"data.seq_len={window}", *overrides]


def scored(ranks, folder, window, stride, overrides, rows, out=""):
    """What this pool's ranks find: nats, labels; with `out` each token's loss goes there."""
    config = config_of(ranks, *settings(folder, window, overrides))
    the_mesh = mesh(config.parallel.cp, config.parallel.dp)
    model = load_model(Subject(config), None, the_mesh, rows)
    split = ByteCorpus(folder).split(1e-6)[0]
    files = []

    def keep(reader):
        files.append(LossesFile(Path(out), reader, model, the_mesh))
        return files[0].write

    shown = []
    found = score(model, split, config, stride, keep=keep if out else None,
                  progress=lambda done, total: shown.append((done, total)))  # fmt: skip
    for file in files:
        file.close()
    assert shown[-1] == (found.scored, found.scored)
    return found.nats, found.scored


@cache
def expected(folder, window, stride, overrides, rows):
    """Each byte's loss by itself, NaN where none counts: one forward of the plain model a byte, on what it may see."""
    config = config_of(1, *settings(folder, window, overrides))
    model = Transformer(config.model, rows, seed=config.train.seed).double().eval()
    corpus = ByteCorpus(folder)
    items = torch.from_numpy(corpus.read(0, len(corpus)).astype(np.int64))
    ends = corpus.document_ends().tolist() if config.data.packing else [len(items)]
    losses = torch.full((len(items),), torch.nan, dtype=torch.float64)
    for begin, end in zip([0, *ends], ends, strict=False):
        for item in range(begin + 1, end):
            token = item - 1 - begin  # the last that it sees, counted from the run's first
            k = 0 if token < window else (token - window) // stride + 1
            seen = items[begin + k * stride : item]
            with torch.no_grad():
                logits = model(seen[None]).logits[0, -1]
            losses[item] = torch.nn.functional.cross_entropy(logits, items[item])
    return losses


CASES = {
    "full": (24, 24, ()),
    "windows": (24, 7, ("model.windows=[5,0]", "model.sinks=true")),
    "long": (123, 123, ("train.batch_size=2",)),
    "learned": (24, 24, ("model.positions=learned",)),
    "learned-shorter": (11, 4, ("model.positions=learned",)),
    "documents": (24, 9, ("data.packing=true", "train.batch_size=2", "train.accumulate=2")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks, order, dp", [(1, "head_tail", 1), (2, "head_tail", 1), (3, "contiguous", 1),
                                              (4, "head_tail", 1), (4, "contiguous", 2)])  # fmt: skip
def test_every_token_counts_once_and_as_on_one_process(text, case, ranks, order, dp):
    window, stride, overrides = CASES[case]
    rows = 24 if case.startswith("learned") else window
    losses = expected(text, window, stride, overrides, rows)
    total, count = float(losses.nansum()), int((~losses.isnan()).sum())
    assert count == sum(SIZES) - (len(SIZES) if case == "documents" else 1)
    if case == "documents" and dp == 2:
        overrides = (*overrides[:2], "train.accumulate=1")
    given = [*overrides, f"parallel.order={order}", f"parallel.dp={dp}"]
    for nats, labels in pool(ranks).run(scored, ranks, text, window, stride, given, rows):
        assert labels == count
        assert abs(nats / total - 1) <= 1e-12


@pytest.mark.parametrize("ranks, dp, case, more", [
    (1, 1, "windows", []), (3, 1, "windows", []), (4, 2, "full", []), (2, 1, "documents", []),
    (4, 2, "full", ["parallel.fsdp=true"]), (2, 1, "learned", ["parallel.fsdp=true", "model.tie_embeddings=false"]),
    (2, 1, "full", ["parallel.strategy=tp"]), (2, 1, "full", ["parallel.strategy=ring"]),
])  # fmt: skip
def test_losses_by_token_are_put_back_in_order(tmp_path, text, ranks, dp, case, more):
    window, stride, overrides = CASES[case]
    overrides = (*overrides, *(key for key in more if key.startswith("model.")))
    losses = expected(text, window, stride, overrides, window).numpy()
    for suffix in (".npy", ".jsonl"):
        out = tmp_path / f"losses{suffix}"
        given = [*overrides, f"parallel.dp={dp}", *more]
        results = pool(ranks).run(scored, ranks, text, window, stride, given, window, str(out))
        assert all(math.isclose(nats, np.nansum(losses), rel_tol=1e-12) for nats, _ in results)
        if suffix == ".npy":
            np.testing.assert_allclose(np.load(out), losses, rtol=1e-11)
        else:
            lines = [json.loads(line) for line in out.read_text().splitlines()]
            assert [line["token"] for line in lines] == np.flatnonzero(~np.isnan(losses)).tolist()
            np.testing.assert_allclose([line["nats"] for line in lines], losses[~np.isnan(losses)], rtol=1e-11)
            items = ByteCorpus(text).read(0, len(losses))
            assert [line["id"] for line in lines] == items[~np.isnan(losses)].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.jsonl", "losses.npy"]
