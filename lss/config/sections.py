"""The one table of config keys: section, key, default, what it may be, what it means."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from lss.config.errors import refuse
from lss.config.presets import PRESETS
from lss.config.support import KERNEL_CHOICES, SCAN_KERNEL_CHOICES

# Larger whole numbers are typing errors, and overflow in tensors and files.
LARGEST = 2**40


@dataclass(frozen=True)
class Key:
    """What one key may be.

    Attributes:
        kind: bool, int, float, str, or list for whole numbers in brackets.
        meaning: for the generated table.
        low, high: inclusive range of numbers.
        choices: allowed strings; for an int key, strings allowed besides numbers ("auto").
        later: values that are a known setting which this version cannot honour.
    """

    kind: type
    meaning: str
    low: float = -math.inf
    high: float = LARGEST
    choices: tuple[str, ...] = ()
    later: tuple[Any, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        """The value in its type (a whole number may stand for a float), or a refusal that says what fits."""
        if type(value) is str and value in self.choices:
            return value
        if value in self.later and type(value) in (str, bool):
            raise refuse(name, show(value), f"not supported in this version; use {self.describe()}")
        if self.kind is list:
            return self._check_list(name, value)
        fits = type(value) is self.kind or (self.kind is float and type(value) is int)
        if not fits or (self.kind is str and self.choices):
            raise refuse(name, show(value), f"use {self.describe()}{self._in_quotes(name, value)}")
        # comparing first keeps out NaN and infinities, and whole numbers that no float can hold
        if isinstance(value, (int, float)) and not max(self.low, -LARGEST) <= value <= self.high:
            bound = f" (at most {LARGEST})" if value > self.high == LARGEST else ""
            raise refuse(name, show(value), f"use {self.describe()}{bound}")
        return float(value) if self.kind is float else value

    def _check_list(self, name: str, value: Any) -> tuple[int, ...]:
        """A tuple of whole numbers; one number stands for a list of one."""
        values = value if isinstance(value, list | tuple) else [value]
        for entry in values:
            if type(entry) is not int or not self.low <= entry <= self.high:
                raise refuse(name, show(value), f"use {self.describe()}")
        return tuple(values)

    def _in_quotes(self, name: str, value: Any) -> str:
        """How to write text that looks like a number, a path 2024 for one."""
        if self.kind is not str or self.choices or type(value) not in (int, float, bool):
            return ""
        return f"; for text that looks like another value, add quotes: {name}='\"{show(value)}\"'"

    def describe(self) -> str:
        """What fits, in words."""
        words = [f'"{choice}"' for choice in self.choices]
        if self.kind is list:
            words = [f"whole numbers in brackets, each {_number(self.low)} or more"]
        elif self.kind is bool:
            words += [str(v).lower() for v in (False, True) if v not in self.later]
        elif self.kind in (int, float):
            number = "a whole number" if self.kind is int else "a number"
            top = f" to {_number(self.high)}" if self.high < LARGEST else " or more"
            words.append(f"{number}, {_number(self.low)}{top}")
        elif not self.choices:
            words = ["a string"]
        return " or ".join(words)


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else f"{int(value)}"


def show(value: Any) -> str:
    """A value as a refusal names it: strings quoted, on one line, and cut where it is long."""
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # Python writes out no whole number of thousands of digits
        text = f"({type(value).__name__} too large to show)"
    text = text.lower() if isinstance(value, bool) else text
    text = str(list(value)) if isinstance(value, tuple) else text
    return text if len(text) <= 60 else text[:57] + "..."


def _key(default: Any, kind: type, meaning: str, **rules: Any) -> Any:
    return field(default=default, metadata={"key": Key(kind, meaning, **rules)})


def _shape(name: str, kind: type, meaning: str, **rules: Any) -> Any:
    return _key(PRESETS["tiny"][name], kind, f"{meaning}; by default the preset's", **rules)


@dataclass(frozen=True)
class ModelConfig:
    """[model]: the shape of the reference decoder.

    The fields' defaults are the tiny preset's. `load_config` and `Config.from_dict` fill in those of the preset named;
    a ModelConfig built by hand keeps just the values it is given.
    """

    preset: str = _key("tiny", str, "named shape that the other keys of this section override", choices=tuple(PRESETS))
    d_model: int = _shape("d_model", int, "width of the residual stream", low=1)
    n_layers: int = _shape("n_layers", int, "blocks", low=1)
    n_heads: int = _shape("n_heads", int, "query heads; divide d_model", low=1)
    n_kv_heads: int = _shape("n_kv_heads", int, "key and value heads; divide n_heads", low=1)
    d_mlp: int = _shape("d_mlp", int, "hidden width of the MLP", low=1)
    vocab_size: int = _shape("vocab_size", int, "token ids are below this; 256 or more for bytes", low=1)
    positions: str = _shape("positions", str, "rotary, a learned table cut over the ranks, or ALiBi's slopes",
                            choices=("rope", "learned", "alibi"))  # fmt: skip
    norm: str = _shape("norm", str, "normalisation before attention, MLP and logits", choices=("rmsnorm", "layernorm"))
    mlp: str = _shape("mlp", str, "kind of MLP", choices=("swiglu", "gelu"))
    tie_embeddings: bool = _shape("tie_embeddings", bool, "one matrix for token embedding and logits")
    dropout: float = _shape("dropout", float, "rate after embedding, attention and MLP", low=0, high=0.99)
    kind: str = _shape("kind", str, "decoder: next token; encoder: masked tokens; encoder_decoder: from source to text",
                       choices=("decoder", "encoder", "encoder_decoder"))  # fmt: skip
    windows: tuple[int, ...] = _key((), list, "keys that a layer's queries see, layer by layer and again from the first; "
                                    "0 or none given: all", low=0)  # fmt: skip
    softcap: float = _key(0.0, float, "bound c of attention scores, c tanh(s / c); 0: none", low=0)
    sinks: bool = _key(False, bool, "a learned logit a head that takes part in the softmax only")
    attention_dropout: float = _key(0.0, float, "rate of dropout of attention's probabilities", low=0, high=0.99)
    residual: str = _key("weights", str, "dtype of the stream that blocks add to: weights: that of the weights; compute: "
                         "that of train.dtype, which halves what a block keeps and rounds every sum",
                         choices=("weights", "compute"))  # fmt: skip
    rope_theta: float = _shape("rope_theta", float, "base of the rotary frequencies", low=1)
    layers: str = _key("", str, "kinds of layers, a letter each, in turn and again from the first: a attention, s a scan "
                       "(state space), b both beside each other; empty: all attention")  # fmt: skip
    scan_heads: int = _key(8, int, "heads of a scan; divide its width", low=1)
    scan_width: int | str = _key("auto", int, "inner width of a scan; auto: twice d_model", low=1, choices=("auto",))
    scan_state: int = _key(16, int, "numbers of a scan's state for each of its inner width", low=1)
    scan_groups: int = _key(1, int, "groups of heads that share what is written to and read from their states", low=1)
    conv_width: int = _key(4, int, "tokens that the convolution before a scan reads, its own included", low=1)
    hf: str = _key("", str, "model of Hugging Face transformers, a folder or OWNER/NAME on the Hub, which brings its own "
                   "shape; empty: the reference decoder")  # fmt: skip

    lora_rank: int = _key(0, int, "of hf: rank of adapters, which are then all that is trained; 0: all is", low=0)
    lora_alpha: float = _key(16.0, float, "adapters are scaled by lora_alpha / lora_rank", low=0)
    lora_targets: str = _key("", str, "names of modules that get adapters, q_proj,v_proj for one, or all-linear; empty: "
                             "what peft takes for the class")  # fmt: skip

    rope_scaling: str = _key("none", str, "of hf: how rotary positions are stretched for longer sequences than it was made "
                             "for; none: as it has them", choices=("none", "linear", "dynamic", "yarn"))  # fmt: skip
    rope_factor: float = _key(1.0, float, "of hf: times as long, with rope_scaling", low=1)

    @property
    def known(self) -> bool:
        """Whether the shape is known; that of `hf` is read when the model is looked for."""
        return self.n_layers > 0

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, counted from 0; None where it sees everything."""
        return (self.windows[layer % len(self.windows)] or None) if self.windows else None

    @property
    def widest_window(self) -> int | None:
        """The window of the layer that sees most, whose work dominates; None where that is everything."""
        return max(self.windows) if self.windows and all(self.windows) else None


@dataclass(frozen=True)
class ParallelConfig:
    """[parallel]: how ranks share the work."""

    cp: int | str = _key("auto", int, "ranks that share each sequence; auto: all ranks / dp", low=1, choices=("auto",))
    dp: int = _key(1, int, "groups of ranks that take different sequences", low=1)
    strategy: str = _key("lss", str, "algorithm of the cp axis", choices=("lss", "lss_2d", "ring", "ulysses", "tp"))
    inner: int | str = _key("auto", int, "lss_2d: neighbouring ranks that share out the heads; divides cp", low=1,
                            choices=("auto",))  # fmt: skip
    order: str = _key("head_tail", str, "which tokens are a rank's",
                      choices=("head_tail", "contiguous", "balanced"))  # fmt: skip
    head_chunks: int | str = _key("auto", int, "groups of key heads gathered one after another", low=1, choices=("auto",))
    token_chunks: int | str = _key("auto", int, "runs of tokens gathered one after another; auto: as many as keep a "
                                   "gather of one key head near 1 GiB", low=1, choices=("auto",))  # fmt: skip
    transport: str = _key("auto", str, "how keys and their gradients travel: collectives of NCCL or gloo, or writes into "
                          "the memory of the other ranks of a host; auto: the latter on GPUs that can",
                          choices=("auto", "collective", "symmetric"))  # fmt: skip
    dkv_dtype: str = _key("auto", str, "what gradients of half precision keys travel in; inputs: the keys' own dtype",
                          choices=("auto", "float32", "inputs"))  # fmt: skip
    regather: bool | str = _key("auto", bool, "backward gathers keys and values again instead of keeping them; auto: but "
                                "on a GPU where they come to 128 MiB a layer or less", choices=("auto",))  # fmt: skip
    fsdp: bool = _key(False, bool, "shard parameters, gradients and optimizer state over all ranks")
    fsdp_reshard: bool | str = _key("auto", bool, "fsdp: blocks give gathered weights back between forward and backward; "
                                    "auto: all but the last", choices=("auto",))  # fmt: skip
    kernel: str = _key("auto", str, "attention on one device; sdpa: the fastest of torch's fused ones",
                       choices=KERNEL_CHOICES)  # fmt: skip
    scan_kernel: str = _key("auto", str, "layers that scan on one device; fla: flash-linear-attention's, bfloat16 on CUDA; "
                            "blocks: plain torch", choices=SCAN_KERNEL_CHOICES)  # fmt: skip


@dataclass(frozen=True)
class MemoryConfig:
    """[memory]: what is kept and where."""

    checkpointing: str = _key("none", str, "full: keep each block's input only; attention: keep the attention's output and "
                              "log-sum-exp too, which spares computing it again",
                              choices=("none", "full", "attention"))  # fmt: skip
    offload: str = _key("none", str, "where what checkpointing keeps goes until backward: pinned host memory; disk: host "
                        "memory, and disk where that is full. What finds no room stays on the device",
                        choices=("none", "host", "disk"))  # fmt: skip
    offload_gib: float | str = _key("auto", float, "host memory for it, GiB for each rank; auto: a share of half of what is "
                                    "free", low=0.001, choices=("auto",))  # fmt: skip
    offload_path: str = _key("", str, "folder for offload to disk, a fast local one; empty: the system's temporary folder")
    optimizer: str = _key("device", str, "where AdamW's moments lie and are updated: host memory holds them and a "
                          "copy of the weights, and gradients and weights travel in every step",
                          choices=("device", "host"))  # fmt: skip
    tiles: int | str = _key("auto", int, "tokens at a time in the loss and, where they are computed again, in projections "
                            "and MLP; auto: a tile's widest tensor takes up to 1, 2 and 0.5 GiB (64 MiB on a CPU)", low=1,
                            choices=("auto",))  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """[data]: what is read."""

    source: str = _key("bytes", str, "how files become tokens: bytes as they are; tokens: files of ids; text: by the "
                       "tokenizer of model.hf, with which it is the default; fasta: nucleotides of FASTA and FASTQ; "
                       "series: numbers of CSV, NPY and NPZ files, by bins of their values",
                       choices=("bytes", "tokens", "text", "fasta", "series"))  # fmt: skip
    token_bytes: int = _key(2, int, "bytes of an id in a .bin file, 2 or 4; a .npy file says its own", low=2, high=4)
    path: str = _key("", str, "file, folder or glob; empty: for bytes the running Python's standard-library sources")
    weights: tuple[int, ...] = _key((), list, "of several corpora, whose paths stand in path with ; between: how many "
                                    "samples of each come for those of the others; none: one corpus", low=1)  # fmt: skip
    seq_len: int = _key(512, int, "S, labels per sequence; S+1 tokens are read", low=1)
    packing: bool = _key(False, bool, "each file is a document; documents, or pieces of longer ones, are packed into "
                         "sequences and see only themselves")  # fmt: skip
    prefix: int = _key(0, int, "tokens at the start of each sequence or document that see each other; not trained on", low=0)
    mask_rate: float = _key(0.15, float, "share of tokens that an encoder is to restore", low=0.001, high=0.999)
    source_every: int = _key(2, int, "an encoder_decoder's source is each n-th byte or token of its text", low=1)
    reverse_complement: bool = _key(False, bool, "of nucleotides: every second sequence, drawn by seed and sample, is read "
                                    "from the other strand")  # fmt: skip
    columns: str = _key("", str, "of a series: names or numbers (from 0) of columns, with commas between; empty: all")
    bins: int = _key(64, int, "of a series: bins of each column; ids are columns x bins, and one for NaN", low=2)
    binning: str = _key("quantile", str, "of a series: bins of equally many training values, or of equal width",
                        choices=("quantile", "uniform"))  # fmt: skip
    nan: bool = _key(False, bool, "of a series: NaN and empty cells have an id of their own; else they are refused")
    held_out: float = _key(0.05, float, "fraction of the corpus, at its end, kept for evaluation", low=1e-6, high=0.5)

    @property
    def paths(self) -> list[str]:
        """The corpora that `weights` weigh."""
        return [path.strip() for path in self.path.split(";")]


@dataclass(frozen=True)
class OptimConfig:
    """[optim]: the update."""

    name: str = _key("adamw", str, "optimizer; adamw8bit: torchao's, whose state takes a quarter; sgd has no momentum",
                     choices=("adamw", "adamw8bit", "sgd"))  # fmt: skip
    lr: float = _key(3e-3, float, "peak learning rate", low=0)
    warmup: int = _key(20, int, "steps of linear warm-up", low=0)
    weight_decay: float = _key(0.1, float, "decay of matrices", low=0)
    clip: float = _key(1.0, float, "largest gradient norm; 0 = off", low=0)
    beta1: float = _key(0.9, float, "AdamW's first decay rate", low=0, high=0.999999)
    beta2: float = _key(0.95, float, "AdamW's second decay rate", low=0, high=0.999999)
    eps: float = _key(1e-8, float, "AdamW's epsilon", low=0)


@dataclass(frozen=True)
class TrainConfig:
    """[train]: the run."""

    steps: int = _key(300, int, "optimizer steps", low=1)
    batch_size: int = _key(8, int, "sequences per optimizer step over all ranks and micro-batches", low=1)
    accumulate: int = _key(1, int, "micro-batches per step", low=1)
    dtype: str = _key("float32", str, "bfloat16 keeps float32 weights", choices=("float32", "bfloat16", "float64"))
    seed: int = _key(0, int, "of weights, data order and dropout", low=0)
    deterministic: bool = _key(False, bool, "only deterministic operators")
    compile: bool = _key(False, bool, "torch.compile for what stands between attentions")
    eval_every: int = _key(100, int, "steps between evaluations, the last step included; 0 = never", low=0)
    eval_samples: int = _key(64, int, "held-out sequences per evaluation", low=1)
    timeout: float = _key(600.0, float, "seconds after which a rank that others wait for in vain is taken for stuck; longer "
                          "than any save", low=1)  # fmt: skip
    max_bad_steps: int = _key(10, int, "steps in a row with a loss or gradient that is not finite, which all ranks skip, "
                              "after which the run fails", low=1)  # fmt: skip
    log_samples: bool = _key(False, bool, "write the samples that each step read to samples.jsonl")


@dataclass(frozen=True)
class CheckpointConfig:
    """[checkpoint]: what is saved."""

    every: int = _key(0, int, "steps between saves; the last step is always saved", low=0)
    keep: int = _key(3, int, "newest saves that stay", low=1)
    keep_every: int = _key(0, int, "saves of every step that this divides stay for ever; 0 = off", low=0)
    background: bool = _key(False, bool, "write saves while training goes on; takes host memory for a copy of each rank's "
                            "share")  # fmt: skip
    start: str = _key("", str, "run or checkpoint of the same model whose weights a new run starts with; its sequences may "
                      "have had another length; empty: weights drawn by train.seed")  # fmt: skip
    resume: str = _key("auto", str, "auto: go on from the folder's newest save", choices=("auto", "never"))
    fallback: bool = _key(False, bool, "where the newest save is damaged, take the next older good one instead of refusing")
    on_error: str = _key("stop", str, "what a save that fails does: end the run, or be told of and counted; the last one "
                         "always ends it with status 1", choices=("stop", "continue"))  # fmt: skip



SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "memory": MemoryConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
}
ALIASES = {("train", "dtype"): {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}}


def keys_of(section: str) -> dict[str, Key]:
    """The keys of a section."""
    return {f.name: f.metadata["key"] for f in fields(SECTIONS[section])}


def known_keys() -> list[str]:
    """All keys, as `section.key`."""
    return [f"{section}.{key}" for section in SECTIONS for key in keys_of(section)]


def build_section(section: str, values: dict[str, Any]) -> Any:
    """A section from the values given; keys are known, values are checked."""
    checked = {}
    for key, value in values.items():
        alias = ALIASES.get((section, key), {})
        value = alias.get(value, value) if type(value) is str else value
        checked[key] = keys_of(section)[key].check(f"{section}.{key}", value)
    if section == "model":
        if checked.get("hf"):
            return _of_hf(checked)
        checked = PRESETS[checked.get("preset", "tiny")] | checked
    return SECTIONS[section](**checked)


# what of [model] goes with `hf`
HF_KEYS = ("hf", "lora_rank", "lora_alpha", "lora_targets", "rope_scaling", "rope_factor")
_UNREAD = dict.fromkeys(("d_model", "n_layers", "n_heads", "n_kv_heads", "d_mlp", "vocab_size"), 0)


def _of_hf(given: dict[str, Any]) -> ModelConfig:
    """The section of a model of transformers, its shape not read yet; a key of another model is refused."""
    defaults = ModelConfig()
    for key, value in given.items():
        if key not in HF_KEYS and value != getattr(defaults, key):
            raise refuse(f"model.{key}", show(value), f"model.hf={show(given['hf'])} brings its own; leave it out")
    return ModelConfig(**{key: given[key] for key in HF_KEYS if key in given}, **_UNREAD)


def markdown_table() -> str:
    """All keys as a Markdown table, for the docs."""
    lines = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for section, kind in SECTIONS.items():
        for f in fields(kind):
            key: Key = f.metadata["key"]
            lines.append(f"| `{section}.{f.name}` | `{show(f.default)}` | {key.describe()} | {key.meaning} |")
    return "\n".join(lines)


def refuse_mismatch(model: ModelConfig) -> None:
    """Refuse model shapes that do not fit together."""
    if model.d_model % model.n_heads:
        fit = f"must divide model.d_model={model.d_model}; {nearest(model.d_model, model.n_heads)}"
        raise refuse("model.n_heads", model.n_heads, fit)
    if model.n_heads % model.n_kv_heads:
        fit = f"must divide model.n_heads={model.n_heads}; {nearest(model.n_heads, model.n_kv_heads)}"
        raise refuse("model.n_kv_heads", model.n_kv_heads, fit)
    head_size = model.d_model // model.n_heads
    if model.positions == "rope" and head_size % 2:
        fit = f"gives heads of size {head_size}, and rotary positions need an even one; use model.positions=\"learned\""
        raise refuse("model.n_heads", model.n_heads, fit)


def nearest(whole: int, wanted: int) -> str:
    """The divisors of `whole` next to `wanted`, in words."""
    divisors = [d for d in range(1, min(whole, 1 << 16) + 1) if whole % d == 0]
    near = sorted(divisors, key=lambda d: abs(d - wanted))[:2]
    return f"use {' or '.join(map(str, sorted(near)))}"


def as_plain(section: Any) -> dict[str, Any]:
    """A section's values by key, as JSON would have them; of a model of transformers what was set, not what was read."""
    named = HF_KEYS if isinstance(section, ModelConfig) and section.hf else [f.name for f in fields(section)]
    values = {name: getattr(section, name) for name in named}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
