"""Reading configs: what is accepted, and one sentence for everything else."""

from __future__ import annotations

import contextlib
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lss.config import Config, ModelConfig, Refused, load_config, markdown_table
from lss.config.hybrid import layer_counts, scans
from lss.config.sections import SECTIONS, keys_of, known_keys
from lss.config.support import pairs, why_refused

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def write(tmp_path, text):
    path = tmp_path / "my.toml"
    path.write_text(text)
    return path


def test_tiny_toml_says_the_defaults():
    assert load_config(ROOT / "configs" / "tiny.toml") == load_config(None) == Config()


def test_tiny_toml_shows_every_key_and_its_default():
    """The preset's shape stands there as comments, so that `model.preset=...` on the command line still acts."""
    text = (ROOT / "configs" / "tiny.toml").read_text()
    shown = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))
    assert shown == Config().to_dict()
    own = {"softcap", "sinks", "attention_dropout", "lora_rank", "lora_alpha", "lora_targets", "rope_scaling", "rope_factor",
           "residual", "scan_heads", "scan_width", "scan_state", "scan_groups", "conv_width"}  # fmt: skip  # of no preset
    assert set(tomllib.loads(text)["model"]) == {"preset", "hf"} | own
    assert load_config(ROOT / "configs" / "tiny.toml", ["model.preset=enwik8"]).model.d_model == 512


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    assert config.name == path.stem
    assert config.resolved(1).parallel.cp == 1


def test_file_then_overrides(tmp_path):
    path = write(tmp_path, '[model]\npreset = "enwik8"\nn_layers = 3\n[train]\nsteps = 7\n')
    config = load_config(path, ["train.steps=9", "data.path=some/where", "optim.lr=1", "train.dtype=bf16"])
    assert config.name == "my"
    assert (config.model.d_model, config.model.n_layers, config.model.positions) == (512, 3, "learned")
    assert (config.train.steps, config.data.path, config.optim.lr) == (9, "some/where", 1.0)
    assert config.train.dtype == "bfloat16"


def test_round_trip():
    config = load_config(None, ["model.preset=llama-3.1-8b", "parallel.dp=2"])
    assert Config.from_dict(config.to_dict()) == config


def test_preset_shapes():
    shapes = {
        "enwik8": (12, 512, 8, 8, 2048, 256),
        "llama-3.2-1b": (16, 2048, 32, 8, 8192, 128256),
        "llama-3.1-8b": (32, 4096, 32, 8, 14336, 128256),
    }
    for preset, shape in shapes.items():
        m = load_config(None, [f"model.preset={preset}"]).model
        assert (m.n_layers, m.d_model, m.n_heads, m.n_kv_heads, m.d_mlp, m.vocab_size) == shape


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lrr=1", "optim.lrr: unknown key; nearest is optim.lr."),
        ("trian.steps=1", "nearest is train.steps"),
        ("steps=1", "section.key=value"),
        ("train.steps", "section.key=value"),
        ("train.steps=0", "train.steps=0"),
        ("train.steps=1.5", "whole number"),
        ("train.steps=true", "train.steps=true"),
        ("train.steps=99999999999999999999", "at most"),
        ("train.steps=many", "train.steps='many'"),
        ("optim.lr=nan", "optim.lr=nan"),
        ("optim.lr=inf", "optim.lr=inf"),
        ("optim.lr=-1", "0 or more"),
        ("optim.name=adam", '"adamw" or "adamw8bit" or "sgd"'),
        ("model.dropout=1.0", "0 to 0.99"),
        ("model.n_heads=7", "must divide model.d_model=128; use 4 or 8"),
        ("model.n_kv_heads=3", "must divide model.n_heads=8"),
        ("model.vocab_size=100", "256 or more"),
        ("model.preset=huge", '"llama-3.2-1b"'),
        ("model.tie_embeddings=1", "false or true"),
        ("model.layers=sx", '"x" is no kind of layer; use a for attention'),
        ("model.layers=s model.kind=encoder model.vocab_size=257", 'model.kind="encoder" reads in both directions'),
        ("model.layers=sa data.prefix=4", 'data.prefix=4: model.layers="sa"'),
        ("model.layers=sa parallel.strategy=tp", 'parallel.strategy="tp": model.layers="sa"'),
        ("model.layers=sa model.scan_heads=7", "model.scan_heads=7: must divide the scan's width, 256"),
        ("model.layers=sa model.scan_groups=3", "model.scan_groups=3: must divide model.scan_heads=8"),
        ("model.scan_state=8", 'model.layers="" has no layer that scans'),
        ("parallel.order=zigzag", "parallel.order"),
        ("parallel.fsdp=1", "false or true"),
        ("parallel.fsdp_reshard=always", "\"auto\" or false or true"),
        ("parallel.head_chunks=5", "model.n_kv_heads=4"),
        ("parallel.cp=0", "parallel.cp=0"),
        ("memory.offload=cpu", '"none" or "host" or "disk"'),
        ("memory.offload=host", 'memory.checkpointing="none"'),
        ("train.compile=true model.dropout=0.1", "model.dropout=0.1"),
        ("train.compile=true parallel.strategy=tp", 'parallel.strategy="tp"'),
        ("train.compile=1", "false or true"),
        ("train.batch_size=7 train.accumulate=2", "use 6 or 8"),
        ("parallel.strategy=ring parallel.head_chunks=2", "parallel.head_chunks=2"),
        ("data.held_out=0.9", "to 0.5"),
        ("data.seq_len=-5", "1 or more"),
        ("optim.lr=-" + "9" * 400, "a number, 0 or more"),
        ("optim.lr=" + "9" * 400, "at most"),
        ("optim.lr=-inf", "optim.lr=-inf"),
        ("train.steps=" + "9" * 400, "at most"),
        ("train.steps=" + "9" * 5000, "a whole number"),
        ("train.steps=" + "[" * 5000, "a whole number"),
        ("train.steps=nan", "a whole number"),
        ("train.steps=", "train.steps=''"),
        ("train.steps.x=1", "nearest is train.steps"),
        ("data.path=2024", "add quotes: data.path='\"2024\"'"),
        ("optim.lr=true", "optim.lr=true: use a number"),
        ("parallel.cp=true", '"auto" or a whole number'),
        ("model.d_model=24", 'heads of size 3, and rotary positions need an even one; use model.positions="learned"'),
        ("parallel.strategy=tp parallel.head_chunks=2", "use 'auto' or 1"),
        ("parallel.strategy=ulysses parallel.head_chunks=4", "parallel.head_chunks=4"),
        ("parallel.inner=2", 'parallel.inner=2: only parallel.strategy="lss_2d"'),
        ("parallel.inner=0 parallel.strategy=lss_2d", "parallel.inner=0"),
        ("parallel.cp=4 parallel.inner=3 parallel.strategy=lss_2d", "parallel.inner=3: must divide parallel.cp=4"),
        ("parallel.strategy=tp parallel.cp=3", "model.n_heads=8: parallel.strategy"),
        ("train.batch_size=3 parallel.dp=4", "parallel.dp=4 x train.accumulate=1; use 4."),
        ("memory.tiles=0", '"auto" or a whole number, 1 or more'),
        ("memory.tiles=all", "memory.tiles='all'"),
        ("memory.checkpointing=some", '"none" or "full" or "attention"'),
        ("data.source=words", "data.source='words'"),
        ("data.source=tokens", "data.path=''"),
        ("data.token_bytes=3", "2 or 4"),
        ("checkpoint.keep=0", "1 or more"),
        ("train.eval_samples=0", "1 or more"),
        ("s" * 5000 + ".x=1", "..."),
    ],
)
def test_wrong_values_are_refused_in_one_short_sentence(override, words):
    with pytest.raises(Refused) as refusal:
        load_config(None, override.split())
    text = str(refusal.value)
    assert words in text
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 300


def test_a_name_of_several_lines_is_refused_on_one():
    for override in ("train.st\neps=1", "train.dtype=a\nb", "a\nb"):
        with pytest.raises(Refused) as refusal:
            load_config(None, [override])
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[model\n", "not valid TOML"),
        ("[train]\nsteps = \n", "line 2"),
        ('[data]\nseq_len = 8\npath = "open', "line 3, the end of the file"),
        ("[train]\nsteps = 1\nsteps = 2\n", "line 3"),
        ("[train]\nsteps = " + "9" * 5000, "not valid TOML: a number of too many digits"),
        ("[train]\nsteps = " + "[" * 5000, "not valid TOML: brackets nested too deep"),
        ("steps = 1\n", "steps: unknown key; nearest is train.steps."),
        ("[trains]\nsteps = 1\n", "trains: unknown section; nearest is train."),
        ("[train]\nstep = 1\n", "train.step: unknown key; nearest is train.steps."),
        ("train = 3\n", "it is a section"),
        ("[train]\nsteps = [1]\n", "train.steps=[1]"),
        ("[train.steps]\nx = 1\n", "train.steps"),
        ("[data]\nseq_len = 2000-01-01\n", "data.seq_len=2000-01-01"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, words):
    with pytest.raises(Refused) as refusal:
        load_config(write(tmp_path, text))
    assert words in str(refusal.value)
    assert "my.toml" in str(refusal.value) or "TOML" not in words


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path, "x" * 5000, ""):
        with pytest.raises(Refused, match="cannot be read"):
            load_config(path)
    with pytest.raises(Refused, match="not the name of a file"):
        load_config("a\0b")
    (tmp_path / "binary.toml").write_bytes(b"abc\xff\xfe\x00")
    with pytest.raises(Refused, match=r"not a TOML file \(byte 3 is not UTF-8 text\)"):
        load_config(tmp_path / "binary.toml")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(1 << 21)
    with pytest.raises(Refused, match="too large for a config"):
        load_config(tmp_path / "large.toml")


def test_files_as_editors_on_windows_write_them(tmp_path):
    (tmp_path / "w.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 3\r\n")
    assert load_config(tmp_path / "w.toml").train.steps == 3


@pytest.mark.parametrize("values, words", [("abc", "give sections"), ({1: {}}, "1: unknown section"),
                                           ({"train": None}, "train=None"), ({"train": {2: 3}}, "train.2: unknown key"),
                                           ({"train": {"steps": 10**5000}}, "too large to show")])  # fmt: skip
def test_dicts_that_are_no_config(values, words):
    with pytest.raises(Refused, match=words):
        Config.from_dict(values)


def test_values_may_be_toml_or_bare():
    for text, found in (("0x10", 16), ("1_000", 1000), (" 7 ", 7)):
        assert load_config(None, [f"train.steps={text}"]).train.steps == found
    for text in ("a=b", "my file # 1", '"my file # 1"', "1\nsteps = 2"):
        assert load_config(None, [f"data.path={text}"]).data.path == text.strip('"')
    config = load_config(None, ["optim.lr=1", "train.steps=2", "train.steps=3"])
    assert (type(config.optim.lr), config.train.steps) == (float, 3)


@pytest.mark.parametrize("key", known_keys())
@pytest.mark.parametrize("value", ["[]", "{}", "-1", "1e400", '"no such thing"', "''"])
def test_every_key_takes_nonsense_in_words(key, value):
    """Any value is either accepted as what the key may be, or refused by the key's name."""
    section, name = key.split(".")
    refusals = []
    try:
        found = load_config(None, [f"{key}={value}"]).to_dict()[section][name]
    except Refused as refusal:
        refusals.append(str(refusal))
    if refusals:
        assert refusals[0].startswith(key)
    else:
        checked = keys_of(section)[name].check(key, found)
        assert (list(checked) if isinstance(checked, tuple) else checked) == found


@given(st.text(max_size=30))
def test_no_override_raises_anything_but_a_refusal(text):
    with contextlib.suppress(Refused):
        assert isinstance(load_config(None, [text]), Config)


def test_resolving_the_mesh():
    assert load_config(None).resolved(4).parallel.cp == 4
    assert load_config(None, ["parallel.dp=2"]).resolved(4).parallel.cp == 2
    for overrides, ranks, words in (
        (["parallel.cp=3"], 4, "needs 3 ranks and 4 are planned"),
        (["parallel.cp=2", "parallel.dp=2"], 2, "needs 4 ranks and 2 are planned"),
        (["parallel.dp=2"], 3, "parallel.dp=2: must divide the number of ranks, which is 3"),
        (["parallel.strategy=tp"], 3, "model.n_heads=8"),
        (["parallel.strategy=lss_2d", "parallel.inner=4"], 6, 'parallel.inner=4: must divide parallel.cp=6; use 2 or 3'),
        ([], 0, "world_size=0"),
    ):
        config = load_config(None, overrides)
        for check in (config.resolved, config.validate):
            with pytest.raises(Refused, match=words):
                check(ranks)


def test_documented_keys_are_the_keys():
    assert (ROOT / "docs" / "config.md").read_text().split("<!-- table -->\n")[1] == markdown_table() + "\n"
    assert len(known_keys()) == sum(len(keys_of(section)) for section in SECTIONS)


# how a config switches a feature of the support table on
IN_A_CONFIG = {
    "lss_2d": ['parallel.strategy="lss_2d"'],
    "ring": ['parallel.strategy="ring"'],
    "ulysses": ['parallel.strategy="ulysses"'],
    "tp": ['parallel.strategy="tp"'],
    "balanced": ['parallel.order="balanced"'],
    "regather=False": ["parallel.regather=false"],
    "head_chunks": ["parallel.head_chunks=2"],
    "documents": ["data.packing=true", "train.batch_size=1"],
    "prefix": ["data.prefix=5"],
    "window": ["model.windows=[8]"],
    "softcap": ["model.softcap=5.0"],
    "alibi_slopes": ['model.positions="alibi"'],
    "sinks": ["model.sinks=true"],
    "dropout_p": ["model.attention_dropout=0.1"],
    "cross-attention": ['model.kind="encoder_decoder"'],
    "sdpa_cpu": ['parallel.kernel="sdpa"'],
}
# an encoder-decoder has these in its self-attention, where they are exact, and not between its two sequences
BESIDE_CROSS = {"window", "alibi_slopes"}


@pytest.mark.parametrize("a, b", [(a, b) for a, b in pairs() if a in IN_A_CONFIG and b in IN_A_CONFIG])
def test_configs_take_every_pair_or_refuse_it_by_both_keys(a, b):
    overrides = [*IN_A_CONFIG[a], *IN_A_CONFIG[b]]
    reason = None if "cross-attention" in (a, b) and {a, b} & BESIDE_CROSS else why_refused(a, b)
    if {a, b} in ({"documents", "cross-attention"}, {"prefix", "cross-attention"}):
        reason = "one source for one text, and nothing before it that sees all"  # of the model, not of attention
    if reason is None:
        load_config(None, overrides).resolved(2)
        return
    with pytest.raises(Refused) as refusal:
        load_config(None, overrides).resolved(2)
    for override in (IN_A_CONFIG[a][0], IN_A_CONFIG[b][0]):
        assert override.split("=")[0] in str(refusal.value)


@pytest.mark.parametrize("layers, n, counts", [("", 7, (7, 0)), ("s", 3, (0, 3)), ("as", 5, (3, 2)), ("bsa", 4, (3, 3)),
                                               ("sa", 1, (0, 1)), ("as", 1 << 40, (1 << 39, 1 << 39))])  # fmt: skip
def test_layers_are_counted_without_being_listed(layers, n, counts):
    """A layer that has both attends and scans."""
    model = ModelConfig(layers=layers, n_layers=n)
    assert layer_counts(model) == counts
    assert scans(model) == (counts[1] > 0)
