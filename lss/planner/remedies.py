"""What to do about memory that a run lacks: the one table from the class that takes most to settings that lessen it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lss.config import Config

# class of lss.planner.ledger.CLASSES -> (setting, whether it is still to be had in this config)
_Remedies = tuple[tuple[str, Callable[[Config], bool]], ...]


def _can_shard(config: Config) -> bool:
    parallel = config.parallel
    return not parallel.fsdp and parallel.strategy != "tp" and (parallel.cp != 1 or parallel.dp > 1)


def _always(config: Config) -> bool:
    return True


_SHARD = ("parallel.fsdp=true", _can_shard)
_MORE_RANKS = ("a larger parallel.cp", _always)
_ACTIVATIONS: _Remedies = (
    ('memory.checkpointing="full"', lambda c: c.memory.checkpointing != "full"),
    ('memory.offload="host"', lambda c: c.memory.offload == "none"),
    ('memory.offload="disk"', lambda c: c.memory.offload == "host"),
    ("a larger train.accumulate", lambda c: c.train.batch_size // c.train.accumulate > c.parallel.dp),
    _MORE_RANKS,
)
REMEDIES: dict[str, _Remedies] = {
    "weights": (_SHARD, ("a smaller model", _always)),
    "gradients": (_SHARD, ("a smaller model", _always)),
    "optimizer": (
        _SHARD,
        ('optim.name="adamw8bit"', lambda c: c.optim.name == "adamw" and c.train.dtype != "float64"),
        ('memory.optimizer="host"', lambda c: c.memory.optimizer == "device" and c.optim.name == "adamw"),
        ('optim.name="sgd"', lambda c: c.optim.name != "sgd"),
        ("a smaller model", _always),
    ),
    "activations": _ACTIVATIONS,
    "gathered keys": (
        ("parallel.regather=true", lambda c: c.parallel.regather is not True),
        ("a larger parallel.head_chunks", lambda c: c.parallel.head_chunks != c.model.n_kv_heads),
        ("parallel.token_chunks=2 or more", lambda c: c.parallel.strategy == "lss"),
        ('parallel.strategy="lss_2d"', lambda c: c.parallel.strategy == "lss"),
    ),
    "logits": (("a smaller memory.tiles", _always), _MORE_RANKS),
    "temporary": (
        ('memory.checkpointing="full", whose MLP goes by tiles', lambda c: c.memory.checkpointing == "none"),
        ("a smaller memory.tiles", lambda c: c.memory.checkpointing != "none"),
        _MORE_RANKS,
    ),
}
SHORTER = "a shorter data.seq_len"


def remedies(label: str, config: Config) -> str:
    """Settings that lessen this class of memory and are not yet on, in words: "a, b or c"."""
    found = [setting for setting, to_be_had in REMEDIES.get(label, ()) if to_be_had(config)]
    if label not in ("weights", "gradients", "optimizer"):
        found.append(SHORTER)
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))


def size(count: float) -> str:
    """Bytes in words, in GiB from a tenth of one on, else in MiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:,.2f} MiB"


def parts(classes: Mapping[str, int], most: int = 4) -> str:
    """The largest classes with their bytes, in words."""
    largest = sorted(classes.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {size(count)}" for name, count in largest)
