"""Numbers in columns as tokens: bins of the training part alone, the same from every kind of file, refused in words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lss.cli import main
from lss.config import Config, Refused
from lss.data import TokenCorpus, bins, tables
from lss.data.bins import Bins, Series, fit_bins, quantile_edges
from lss.data.prepare import prepare
from lss.data.tables import open_table
from lss.data.tokenize import Recipe, tokenize

SMALL = ["model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_mlp=64"]


def waves(rows, seed=0):
    t, draw = np.arange(rows), np.random.default_rng(seed)
    return np.stack((np.sin(t / 3) + 0.02 * draw.normal(size=rows), np.cos(t / 5) + 0.02 * draw.normal(size=rows)), axis=1)


def save(folder, values):
    """The same numbers in every kind of file: the file, and its columns where not all of them."""
    np.savetxt(folder / "a.csv", values, delimiter=",", header="x,y", comments="", fmt="%.17g")
    np.savetxt(folder / "b.csv", values, delimiter=";", fmt="%.17g")
    dated = "\n".join(f"2024-01-01\t{x!r}\t{y!r}" for x, y in values.tolist())
    (folder / "c.tsv").write_text(f"day\tx\ty\n{dated}\n", encoding="utf-8-sig")
    np.save(folder / "d.npy", values)
    np.save(folder / "e.npy", np.asfortranarray(values))
    np.savez(folder / "f.npz", x=values[:, 0], y=values[:, 1], other=np.zeros(3))
    np.savez_compressed(folder / "g.npz", both=values)
    return {"a.csv": "", "b.csv": "", "c.tsv": "x,y", "d.npy": "", "e.npy": "0,1", "f.npz": "x, y", "g.npz": "both"}


def test_every_kind_of_file_gives_the_same_ids_in_the_order_of_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_VALUES", 14)  # several blocks, the last one not full
    values = waves(100)
    made = []
    for name, columns in save(tmp_path, values).items():
        recipe = Recipe("series", series=Series(columns, bins=8, held_out=0.2))
        tokenize([str(tmp_path / name)], recipe, tmp_path / f"{name}.tokens", processes=1)
        corpus = TokenCorpus(str(tmp_path / f"{name}.tokens"), 16)
        made.append(corpus.read(0, len(corpus)))
    assert all(np.array_equal(made[0], other) for other in made)
    train = values[:80]
    for c in range(2):
        ids = made[0].reshape(-1, 2)[:, c]
        edges = corpus.bins.edges[c]
        assert np.array_equal(ids, [8 * c + sum(e <= v for e in edges) for v in values[:, c]])
        assert np.array_equal(np.bincount(ids[:80] - 8 * c), [10] * 8)  # equally many of the training part
    assert set(np.concatenate(corpus.bins.edges)) <= set(train.ravel())


@pytest.mark.parametrize("binning", ["quantile", "uniform"])
def test_what_is_held_out_moves_no_edge(tmp_path, binning):
    values = waves(400)
    other = values.copy()
    other[380:] *= 50
    for name, array in (("one.npy", values), ("two.npy", other), ("three.npy", values * 50)):
        np.save(tmp_path / name, array)
    series = Series(bins=16, binning=binning, held_out=0.05)
    one, two, three = (fit_bins([tmp_path / f"{name}.npy"], series) for name in ("one", "two", "three"))
    assert one == two != three
    assert two.encode(other[380:]).max() < 32  # beyond the outermost edge is of the outermost bin
    decoded = one.decode(one.encode(values[:380])).reshape(-1, 2)
    assert np.abs(decoded - values[:380]).max() < 0.5
    assert np.abs(decoded - values[:380]).mean() < 0.1
    if binning == "uniform":
        assert np.allclose(np.diff(one.edges), (values[:380].max(0) - values[:380].min(0))[:, None] / 16)
    assert Bins.of(json.loads(json.dumps(one.to_dict())), tmp_path) == one


def test_files_follow_each_other_in_time_and_samples_are_of_the_training_part(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "SAMPLE", 64)
    values = waves(1000)
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", values[250 * number : 250 * (number + 1)])
    found = fit_bins(sorted(tmp_path.glob("*.npy")), Series(bins=4, held_out=0.5))
    assert set(np.concatenate(found.edges)) <= set(values[:500].ravel())
    exact = np.quantile(values[:500, 0], (0.25, 0.5, 0.75))
    assert np.abs(np.array(found.edges[0]) - exact).max() < 0.6


@pytest.mark.parametrize("values, bins, ids", [
    ([3, 1, 2, 2], 8, [2, 0, 1, 1]),  # few values have a bin each
    ([0] * 90 + list(range(1, 11)), 5, [0] * 90 + [1, 1, 2, 2, 2, 3, 3, 4, 4, 4]),  # a frequent one has one to itself
    ([1] * 5 + [9] * 90 + [*range(2, 9)], 3, None),
])  # fmt: skip
def test_equal_values_share_a_bin(values, bins, ids):
    edges = quantile_edges(np.array(values, float), bins)
    found = np.searchsorted(edges, values, side="right")
    assert len(edges) < bins
    assert (np.diff(edges) > 0).all()
    assert len(set(found)) == (2 if ids is None else min(bins, len(set(values))))
    frequent = max(values, key=values.count)
    if values.count(frequent) > len(values) / bins and len(set(values)) > bins:
        of = found[values.index(frequent)]
        assert {v for v, i in zip(values, found, strict=True) if i == of} == {frequent}
    if len(set(values)) <= bins:
        assert found.tolist() == ids


def test_nan_has_an_id_of_its_own_where_asked(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n" + "1,5\n,6\n2,NaN\n3,7\n" * 5)
    with pytest.raises(Refused, match=r"row 2 of column 'x' is nan; give it an id \(data.nan=true\)"):
        fit_bins([tmp_path / "a.csv"], Series(bins=3))
    found = fit_bins([tmp_path / "a.csv"], Series(bins=3, nan=True))
    (chunk,) = open_table(tmp_path / "a.csv").checked(nan=True)
    assert found.encode(chunk)[:8].tolist() == [0, 3, 6, 4, 1, 6, 2, 5]
    assert found.ids == 7


class Evil:
    def __reduce__(self):
        return (print, ("loaded",))


def write(folder, name, content):
    path = folder / name
    if isinstance(content, (str, bytes)):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content)
    return path


LINES = "x,y\n" + "".join(f"{i},{i % 7}\n" for i in range(50))


@pytest.mark.parametrize("name, content, settings, words", [
    ("a.csv", LINES + "7,seven\n", {}, r"a\.csv, line 52: 'seven' in column 'y' is no number"),
    ("a.csv", LINES + "7\n", {}, "line 52: 1 cells, and the first line has 2"),
    ("a.csv", LINES + "7,inf\n", {}, "row 51 of column 'y' is inf; bins are finite"),
    ("a.csv", LINES + "7,1_000\n", {}, "'1_000' in column 'y' is no number"),
    ("a.csv", LINES, {"columns": "z"}, r"data.columns=z: .*a\.csv has x, y"),
    ("a.csv", LINES, {"columns": "x,0"}, "named twice"),
    ("a.csv", LINES.replace("y", "x"), {"columns": "x"}, "has two of that name"),
    ("a.csv", "x,y\n", {}, "no rows below its header"),
    ("a.csv", "x,y\n" + "1,\n2,\n" * 9, {"nan": True}, "column 'y': empty in the training part"),
    ("a.csv", "x,y\n" + "1,4\n2,4\n" * 9, {}, "column 'y': constant in the training part, always 4.0"),
    ("a.csv", LINES, {"bins": 200}, "data.bins=200: 2 columns of 200 bins take 400 ids, and the model has 256; "
                                    "use 128 or fewer bins, or model.vocab_size=400"),
    ("a.csv", b"x\n\xff\n", {}, "not UTF-8"),
    ("a.txt", LINES, {}, r"a numeric series is read from \.csv"),
    ("a.npy", np.array([Evil(), 1], object), {}, "Python objects, which are never loaded"),
    ("a.npz", {"x": np.array([Evil()], object)}, {}, "Python objects, which are never loaded"),
    ("a.npy", np.zeros((2, 2, 2)), {}, r"has the shape \(2, 2, 2\)"),
    ("a.npy", np.array(["1", "2"]), {}, "not real numbers"),
    ("a.npz", {"x": np.arange(9), "y": np.arange(8)}, {}, "array 'y': has 8 rows, and array 'x' has 9"),
    ("a.npz", {"x": np.arange(9)}, {"columns": "y"}, "has the arrays x"),
    ("a.npz", {"x": np.asfortranarray(waves(9))}, {}, "stands column by column"),
    ("a.npz", b"PK it is not", {}, "no NPZ that can be read"),
])  # fmt: skip
def test_what_is_no_series_is_refused(tmp_path, capsys, name, content, settings, words):
    path = write(tmp_path, name, content)
    config = Config.from_dict({"data": {"source": "series", "path": str(path), **settings}})
    with pytest.raises(Refused, match=words):
        prepare(config, tmp_path / "run")
    assert "loaded" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_file_that_was_cut_off_is_refused(tmp_path, suffix):
    path = write(tmp_path, f"a.{suffix}", waves(50) if suffix == "npy" else {"x": waves(50)})
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(Refused, match=r"cut off|no NPZ that can be read"):
        fit_bins([path], Series(bins=4))


def test_settings_of_a_series_are_refused_without_one():
    with pytest.raises(Refused, match=r'data.bins=7: data.source="bytes" has no columns of numbers'):
        Config.from_dict({"data": {"bins": 7}})


def guess(ids, channels):
    """Bits of guessing the same bin as one row before, as well as frequencies allow."""
    before, now = ids[:-channels], ids[channels:]
    hit = (before == now).mean()
    return -(hit * np.log(hit) + (1 - hit) * np.log((1 - hit) / (len(set(now)) - 1)))


def test_a_run_beats_the_guess_of_the_last_value_and_others_use_its_bins(tmp_path, capsys):
    values, out = waves(4000), tmp_path / "run"
    np.savetxt(tmp_path / "a.csv", values, delimiter=",", header="x,y", comments="")
    train = ["train", "data.source=series", f"data.path={tmp_path / 'a.csv'}", "data.bins=8", "data.seq_len=64",
             "model.vocab_size=16", "train.batch_size=8", "train.eval_every=0", *SMALL, "--out", str(out)]  # fmt: skip
    assert main([*train, "train.steps=120"]) == 0
    loss = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    ids = TokenCorpus(str(out / "tokens"), 16)
    assert loss < 0.8 * guess(ids.read(0, len(ids)), 2)
    state = json.loads((out / "checkpoints" / "step_120" / "state.json").read_text())
    kept = Bins.of(state["bins"], out)
    assert kept == ids.bins == fit_bins([tmp_path / "a.csv"], Series(bins=8))
    # other bins are another run
    assert main([*train, "train.steps=121", "data.binning=uniform"]) == 2
    # other numbers are read by the bins of the run, and token files of other bins refused
    np.save(tmp_path / "b.npy", 10 * values[:500])
    capsys.readouterr()
    assert main(["eval", str(out), f"data.path={tmp_path / 'b.npy'}"]) == 0
    far = float(next(line for line in capsys.readouterr().out.splitlines() if "nats per token" in line).split("│")[2])
    assert far > 1.5 * loss  # by bins of their own they would look like those of the run
    tokenize([str(tmp_path / "b.npy")], Recipe("series", series=Series(bins=8)), tmp_path / "other", processes=1)
    assert main(["eval", str(out), "data.source=tokens", f"data.path={tmp_path / 'other'}"]) == 2
    assert "not of the bins that the model was trained with" in capsys.readouterr().err
    again = ["data", "tokenize", str(tmp_path / "b.npy"), "--tokenizer", "series", "-o", str(tmp_path / "same")]
    assert main([*again, "--bins-of", str(out / "tokens")]) == 0
    assert main(["eval", str(out), "data.source=tokens", f"data.path={tmp_path / 'same'}"]) == 0
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "0.1,0.9 0.2", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    rows = capsys.readouterr().out.split()
    assert [len([cell for cell in row.split(",") if cell]) for row in rows[-3:]] == [1, 2, 2]


def test_holding_out_more_than_the_bins_know_of_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", waves(100))
    tokenize([str(tmp_path / "a.npy")], Recipe("series", series=Series(bins=8)), tmp_path / "t", processes=1)
    corpus = TokenCorpus(str(tmp_path / "t"), 16)
    corpus.split(0.05)
    with pytest.raises(Refused, match=r"data.held_out=0.1: the bins .* know all but the last 0.05"):
        corpus.split(0.1)


def test_info_tells_of_numbers_and_of_bins(tmp_path, capsys):
    np.savetxt(tmp_path / "a.csv", waves(100), delimiter=",", header="x,y", comments="")
    np.save(tmp_path / "b.npy", waves(50))
    for name, words in (("a.csv", "column y"), ("b.npy", "column 1")):
        assert main(["data", "info", str(tmp_path / name)]) == 0
        assert words in capsys.readouterr().out
    argv = ["data", "tokenize", str(tmp_path / "a.csv"), "--tokenizer", "series", "--bins", "9", "-o", str(tmp_path / "t")]
    assert main(argv) == 0
    capsys.readouterr()
    assert main(["data", "info", str(tmp_path / "t")]) == 0
    assert "9 a column by quantile" in capsys.readouterr().out
    assert main([*argv[:4], "OWNER/NAME", "--bins", "9", "-o", str(tmp_path / "u")]) == 2
