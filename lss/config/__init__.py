"""Settings: one table of keys, read from TOML and overrides, refused in one sentence where they do not fit."""

from lss.config.config import Config, load_config, overridden
from lss.config.errors import Failed, Refused, refuse
from lss.config.presets import PRESETS
from lss.config.sections import (
    LARGEST,
    CheckpointConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    markdown_table,
    show,
)

__all__ = [
    "LARGEST",
    "PRESETS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Failed",
    "MemoryConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Refused",
    "TrainConfig",
    "load_config",
    "markdown_table",
    "overridden",
    "refuse",
    "show",
]
