"""Reading a config: TOML, overrides, and the checks across keys."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lss.config.errors import Refused, refuse
from lss.config.hybrid import refuse_misfit_layers
from lss.config.sections import (
    SECTIONS,
    CheckpointConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    as_plain,
    build_section,
    keys_of,
    known_keys,
    nearest,
    refuse_mismatch,
    show,
)
from lss.config.support import refuse_pairs

LARGEST_FILE = 1 << 20  # bytes; a config is a page of text


@dataclass(frozen=True)
class Config:
    """A whole, validated config. `name` is the stem of its file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    name: str = "tiny"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All values, by section and key."""
        return {section: as_plain(getattr(self, section)) for section in SECTIONS}

    @staticmethod
    def from_dict(values: Mapping[str, Mapping[str, Any]], name: str = "tiny") -> Config:
        """The inverse of `to_dict`; sections and keys may be missing, unknown ones are refused."""
        if not isinstance(values, Mapping):
            raise refuse("config", show(values), "give sections, each with its keys, as `to_dict` does")
        for section, entries in values.items():
            if section not in SECTIONS:
                known = (list(SECTIONS), "section") if isinstance(entries, Mapping) else (known_keys(), "key")
                raise _unknown(str(section), *known)
            if not isinstance(entries, Mapping):
                raise refuse(section, show(entries), f"it is a section; write [{section}] and its keys below")
            for key in entries:
                if key not in keys_of(section):
                    raise _unknown(f"{section}.{key}", known_keys(), "key")
        sections = {section: build_section(section, dict(values.get(section, {}))) for section in SECTIONS}
        if sections["model"].hf and "source" not in values.get("data", {}):
            sections["data"] = replace(sections["data"], source="text")
        config = Config(**sections, name=name)
        config.validate()
        return config

    def validate(self, world_size: int | None = None) -> None:
        """Refuse values that do not fit together, nor `world_size` ranks where that number is known.

        Raises:
            Refused: naming the key, its value and the nearest values that fit.
        """
        if self.model.hf:
            self._validate_hf()
        else:
            refuse_mismatch(self.model)
            given = {"strategy": self.parallel.strategy, "prefix": self.data.prefix,
                     "scan_kernel": self.parallel.scan_kernel}  # fmt: skip
            refuse_misfit_layers(self.model, **given, plain=ModelConfig())
        self._validate_lora()
        model, parallel, train = self.model, self.parallel, self.train
        if self.data.source == "bytes" and model.known and model.vocab_size < 256:
            fit = 'data.source="bytes" has ids up to 255; use 256 or more'
            raise refuse("model.vocab_size", model.vocab_size, fit)
        if self.data.token_bytes == 3:
            raise refuse("data.token_bytes", 3, "ids take 2 or 4 bytes; use one of these")
        self._validate_data()
        self._validate_kind()
        self._validate_head_chunks()
        self._validate_compile()
        if self.memory.offload != "none" and self.memory.checkpointing == "none":
            fit = f'with memory.offload="{self.memory.offload}" what is kept must be little; use "full" or "attention"'
            raise refuse("memory.checkpointing", '"none"', fit)
        if parallel.fsdp and parallel.strategy == "tp":
            fit = 'parallel.strategy="tp" cuts the weights over the ranks already; use false, or strategy "lss"'
            raise refuse("parallel.fsdp", "true", fit)
        if self.optim.name == "adamw8bit" and train.dtype == "float64":
            fit = 'it computes in float32, and train.dtype="float64" asks for more; use "adamw"'
            raise refuse("optim.name", '"adamw8bit"', fit)
        if self.memory.optimizer == "host" and self.optim.name != "adamw":
            why = "it keeps no state" if self.optim.name == "sgd" else "its update is compiled for the device"
            fit = f'optim.name="{self.optim.name}": {why}; use "device", or optim.name="adamw"'
            raise refuse("memory.optimizer", '"host"', fit)
        refuse_pairs(self._features())
        share = parallel.dp * train.accumulate
        if train.batch_size % share:
            low = train.batch_size // share * share
            near = f"{low} or {low + share}" if low else f"{share}"
            fit = f"must be a multiple of parallel.dp={parallel.dp} x train.accumulate={train.accumulate}; use {near}"
            raise refuse("train.batch_size", train.batch_size, fit)
        cp = parallel.cp if world_size is None else self._cp_of(world_size)
        if isinstance(cp, int):
            self._validate_tensor_parallel(cp)
        self._validate_inner(cp)
        self._validate_token_chunks(cp)

    def _validate_data(self) -> None:
        data, kind = self.data, self.model.kind
        if data.source in ("tokens", "fasta", "series") and not data.path:
            fit = f'data.source="{data.source}" has no files of its own; give a file, a folder or a glob'
            raise refuse("data.path", "''", fit)
        for key in ("columns", "bins", "binning", "nan"):
            if data.source != "series" and getattr(data, key) != getattr(DataConfig(), key):
                fit = f'data.source="{data.source}" has no columns of numbers; leave it out, or use data.source="series"'
                raise refuse(f"data.{key}", show(getattr(data, key)), fit)
        if data.source == "text" and not self.model.hf:
            raise refuse("data.source", '"text"', 'a tokenizer comes with model.hf; use "bytes", or lss data tokenize')
        if data.weights and data.source not in ("bytes", "tokens"):
            fit = f'data.source="{data.source}" is one corpus; make token files by lss data tokenize and give "tokens"'
            raise refuse("data.weights", show(data.weights), fit)
        if data.weights and (len(data.paths) != len(data.weights) or not all(data.paths)):
            fit = f"data.path={show(data.path)} names {len(data.paths)} corpora, with ; between; give each a weight"
            raise refuse("data.weights", show(data.weights), fit)
        if data.reverse_complement and data.source not in ("tokens", "fasta"):
            raise refuse("data.reverse_complement", "true", f'data.source="{data.source}" has no strands; use false')
        if data.reverse_complement and (data.packing or kind == "encoder_decoder"):
            fit = "data.packing=true" if data.packing else f'model.kind="{kind}"'
            raise refuse("data.reverse_complement", "true", f"not with {fit}; use false")

    def _validate_lora(self) -> None:
        model, plain = self.model, ModelConfig()
        if model.rope_scaling != "none" and not model.hf:
            raise refuse("model.rope_scaling", show(model.rope_scaling), 'it is for model.hf; use "none"')
        if (model.rope_scaling == "none") != (model.rope_factor == 1.0):
            fit = "above 1 it goes with model.rope_scaling, and 1 with none"
            raise refuse("model.rope_factor", model.rope_factor, f"model.rope_scaling={show(model.rope_scaling)}: {fit}")
        if model.lora_rank and not model.hf:
            raise refuse("model.lora_rank", model.lora_rank, "adapters go into a model of transformers; give model.hf, or 0")
        for key in ("lora_alpha", "lora_targets"):
            value = getattr(model, key)
            if not model.lora_rank and value != getattr(plain, key):
                raise refuse(f"model.{key}", show(value), "with model.lora_rank=0 there are no adapters; give a rank")

    def _validate_hf(self) -> None:
        """Refuse what only the reference decoder has."""
        memory, prefix = self.memory, self.data.prefix
        only = {
            "parallel.strategy": (self.parallel.strategy == "tp", "tp", 'it cuts other weights; use "lss"'),
            "memory.checkpointing": (memory.checkpointing == "attention", "attention", 'it has "full" and "none"'),
            "memory.offload": (memory.offload != "none", memory.offload, 'not for such a model; use "none"'),
            "memory.tiles": (memory.tiles != "auto", memory.tiles, 'its loss is computed whole; use "auto"'),
            "train.compile": (self.train.compile, True, "not for such a model; use false"),
            "data.source": (self.data.source == "bytes", "bytes", 'bytes are not its tokens; use "text" or "tokens"'),
            "data.prefix": (prefix > 0, prefix, "not for such a model; use 0"),
        }
        for key, (given, value, fit) in only.items():
            if given:
                raise refuse(key, show(value), f"model.hf={show(self.model.hf)}: {fit}")

    def _validate_kind(self) -> None:
        model, data = self.model, self.data
        if model.kind == "encoder" and data.source != "bytes" and model.vocab_size < 2:
            fit = 'model.kind="encoder" needs an id for masked tokens, the last; use 2 or more'
            raise refuse("model.vocab_size", model.vocab_size, fit)
        if model.kind == "encoder" and data.source == "bytes" and model.vocab_size < 257:
            fit = 'model.kind="encoder" needs an id for masked bytes, 256; use 257 or more, or preset="tiny-encoder"'
            raise refuse("model.vocab_size", model.vocab_size, fit)
        if data.prefix and model.kind != "decoder":
            raise refuse("data.prefix", data.prefix, f'model.kind="{model.kind}" sees everything already; use 0')
        if data.prefix >= data.seq_len:
            fit = f"data.seq_len={data.seq_len} must be longer, or no label is left"
            raise refuse("data.prefix", data.prefix, fit)
        if data.packing and model.kind == "encoder_decoder":
            fit = 'model.kind="encoder_decoder" takes its source from one text; use false'
            raise refuse("data.packing", "true", fit)
        if data.packing and self.train.batch_size != self.parallel.dp * self.train.accumulate:
            fit = (f"packed sequences come one at a time, so parallel.dp={self.parallel.dp} x train.accumulate must be as "
                   f"many; use train.accumulate={max(1, self.train.batch_size // self.parallel.dp)}")  # fmt: skip
            raise refuse("train.batch_size", self.train.batch_size, fit)

    def _features(self) -> dict[str, str]:
        """The features of `lss.config.support` that are on, each with its key and value."""
        model, parallel, data = self.model, self.parallel, self.data
        active = {parallel.strategy: f'parallel.strategy="{parallel.strategy}"'}
        switched = {
            "balanced": (parallel.order == "balanced", "parallel.order", parallel.order),
            "regather=False": (parallel.regather is False, "parallel.regather", parallel.regather),
            "documents": (data.packing, "data.packing", data.packing),
            "prefix": (data.prefix > 0, "data.prefix", data.prefix),
            "window": (any(model.windows), "model.windows", model.windows),
            "softcap": (model.softcap > 0, "model.softcap", model.softcap),
            "alibi_slopes": (model.positions == "alibi", "model.positions", model.positions),
            "sinks": (model.sinks, "model.sinks", model.sinks),
            "dropout_p": (model.attention_dropout > 0, "model.attention_dropout", model.attention_dropout),
            "cross-attention": (model.kind == "encoder_decoder", "model.kind", model.kind),
            parallel.kernel: (parallel.kernel not in ("auto", "sdpa"), "parallel.kernel", parallel.kernel),
            "token_chunks": (parallel.token_chunks not in ("auto", 1), "parallel.token_chunks", parallel.token_chunks),
            "head_chunks": (parallel.head_chunks not in ("auto", 1), "parallel.head_chunks", parallel.head_chunks),
        }
        active |= {name: f"{key}={show(value)}" for name, (on, key, value) in switched.items() if on}
        if active.keys() >= {"cross-attention"}:
            # these hold in the self-attention of encoder and decoder, and are left out of the attention between them
            active = {name: told for name, told in active.items() if name not in ("window", "alibi_slopes", "prefix")}
        fused = [f for f in ("softcap", "alibi_slopes", "dropout_p") if f in active]
        if parallel.kernel == "sdpa" and fused:
            raise refuse("parallel.kernel", '"sdpa"', f'{active[fused[0]]} is not in torch\'s fused kernels; use "auto"')
        return active

    def _validate_head_chunks(self) -> None:
        chunks, kv_heads = self.parallel.head_chunks, self.model.n_kv_heads
        if isinstance(chunks, int) and self.model.known and chunks > kv_heads:
            fit = f'model.n_kv_heads={kv_heads} bounds it; use "auto" or 1 to {kv_heads}'
            raise refuse("parallel.head_chunks", chunks, fit)

    def _validate_token_chunks(self, cp: int | str) -> None:
        chunks, S = self.parallel.token_chunks, self.data.seq_len
        most = S if not isinstance(cp, int) else -(-S // cp)
        if isinstance(chunks, int) and chunks > most:
            fit = f'data.seq_len={S} gives a rank {most} tokens; use "auto" or 1 to {most}'
            raise refuse("parallel.token_chunks", chunks, fit)
        if isinstance(chunks, int) and chunks > 1 and self.parallel.transport == "symmetric":
            fit = f'parallel.token_chunks={chunks} travel by collectives; use "auto" or "collective"'
            raise refuse("parallel.transport", '"symmetric"', fit)

    def _validate_inner(self, cp: int | str) -> None:
        inner, strategy = self.parallel.inner, self.parallel.strategy
        if not isinstance(inner, int) or inner == 1:
            return
        if strategy != "lss_2d":
            fit = f'only parallel.strategy="lss_2d" has groups of ranks; with "{strategy}" use "auto" or 1'
            raise refuse("parallel.inner", inner, fit)
        if isinstance(cp, int) and cp % inner:
            raise refuse("parallel.inner", inner, f'must divide parallel.cp={cp}; {nearest(cp, inner)}, or "auto"')

    def _validate_compile(self) -> None:
        if not self.train.compile:
            return
        if self.model.dropout:
            fit = f"model.dropout={self.model.dropout} draws by another key in every step, each compiled anew; use false"
            raise refuse("train.compile", "true", fit)
        if self.parallel.strategy == "tp":
            fit = 'parallel.strategy="tp" has collectives inside of what is compiled; use false'
            raise refuse("train.compile", "true", fit)

    def _validate_tensor_parallel(self, cp: int) -> None:
        if self.parallel.strategy != "tp":
            return
        for key in ("n_heads", "n_kv_heads", "d_mlp"):
            value = getattr(self.model, key)
            if value % cp:
                fit = f'parallel.strategy="tp" cuts it over parallel.cp={cp} ranks, which must divide it; '
                raise refuse(f"model.{key}", value, f'{fit}{nearest(value, cp)} ranks, or strategy "lss"')

    def _cp_of(self, world_size: int) -> int:
        """Ranks per sequence in a run of `world_size`; refuses a number that cp x dp does not make."""
        cp, dp = self.parallel.cp, self.parallel.dp
        if world_size < 1:
            raise refuse("world_size", world_size, "a run has 1 rank or more")
        if not isinstance(cp, int):
            if world_size % dp:
                fit = f"must divide the number of ranks, which is {world_size}; {nearest(world_size, dp)}"
                raise refuse("parallel.dp", dp, fit)
            return world_size // dp
        if cp * dp != world_size:
            are = "is" if world_size == 1 else "are"
            fit = (
                f"with parallel.dp={dp} this needs {cp * dp} ranks and {world_size} {are} planned; "
                f"start {cp * dp} (--nproc {cp * dp}) or choose cp x dp = {world_size}"
            )
            raise refuse("parallel.cp", cp, fit)
        return cp

    def resolved(self, world_size: int) -> Config:
        """This config for a run of `world_size` ranks: parallel.cp a number, and cp x dp = world_size.

        Raises:
            Refused: cp x dp is another number, or the strategy cannot cut this model over cp ranks.
        """
        self.validate(world_size)
        return replace(self, parallel=replace(self.parallel, cp=self._cp_of(world_size)))


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML config and apply `section.key=value` overrides; without a file, the defaults of configs/tiny.toml.

    An override's value is read as a TOML value, and as a plain string where it is none.

    Raises:
        Refused: the file cannot be read, or a key or value is unknown or wrong.
    """
    values = {} if path is None else _read(Path(path))
    return Config.from_dict(overridden(values, overrides), Path(path).stem if path is not None else "tiny")


def overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a config, by section and key, with `section.key=value` overrides put in; `values` is changed.

    Raises:
        Refused: a key is unknown.
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise refuse("override", show(override), "write section.key=value, optim.lr=1e-3 for one")
        if section not in SECTIONS or key not in keys_of(section):
            raise _unknown(name.strip(), known_keys(), "key")
        entries = values.setdefault(section, {})
        if not isinstance(entries, dict):
            raise refuse(section, show(entries), f"it is a section; write [{section}] and its keys below")
        entries[key] = _value(text.strip())
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        shown = path if len(str(path)) < 300 else show(str(path))
        fit = f"cannot be read ({error.strerror}); give a TOML file such as configs/tiny.toml"
        raise refuse("CONFIG", shown, fit) from None
    except ValueError:  # what Python says of a NUL in a name
        raise refuse("CONFIG", show(str(path)), "not the name of a file; give a TOML file") from None
    if len(raw) > LARGEST_FILE:
        raise refuse("CONFIG", path, f"too large for a config (over {LARGEST_FILE} bytes); give a TOML file")
    try:
        text = raw.decode("utf-8-sig")  # editors on Windows put a byte order mark in front
    except UnicodeDecodeError as error:
        raise refuse("CONFIG", path, f"not a TOML file (byte {error.start} is not UTF-8 text)") from None
    try:
        return _parse(text)
    except tomllib.TOMLDecodeError as error:
        last = max(1, len(text.splitlines()))
        place = str(error).rstrip(".").replace("(at end of document)", f"(at line {last}, the end of the file)")
        raise refuse("CONFIG", path, f"not valid TOML: {place}") from None


def _parse(text: str) -> dict[str, Any]:
    """`tomllib.loads`, which raises other errors for numbers of thousands of digits and brackets nested as deep."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        what = "brackets nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"
        raise tomllib.TOMLDecodeError(what) from None


def _value(text: str) -> Any:
    if "\n" in text:  # would be a second line of TOML, not a value
        return text
    try:
        return _parse(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _unknown(name: str, known: Sequence[str], what: str) -> Refused:
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.0)
    shown = name if name.isprintable() and len(name) <= 60 else show(name)
    return Refused(f"{shown}: unknown {what}; nearest is {near[0]}.")
