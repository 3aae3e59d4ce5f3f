"""Loading a model of transformers by a folder or a name."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lss.config.errors import Refused, refuse


def load_hf(source: str, *, dtype: torch.dtype, seed: int = 0, dropout: bool = False) -> Any:
    """The model of a folder that `save_pretrained` wrote, of a folder with a config.json alone, or of a name on the Hub.

    Args:
        seed: of the weights, where there is only a config.
        dropout: False sets all rates of dropout to 0.

    No code of the source is run: only classes of the transformers that is installed are made, from safetensors.

    Raises:
        Refused: transformers is not installed, or the source is no model of a class it knows.
    """
    if find_spec("transformers") is None:
        raise refuse("--hf", source, "transformers is not installed; pip install 'lss-transformer[hf]'")
    import transformers

    folder = Path(source).expanduser()
    if not folder.is_dir() and (folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise refuse("--hf", source, "no such folder; give one with a config.json, or OWNER/NAME on the Hugging Face Hub")
    place = str(folder) if folder.is_dir() else source
    try:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
        cls = _class_of(transformers, config)
        if not dropout:
            for setting, value in config.to_dict().items():
                if "drop" in setting and type(value) is float:
                    setattr(config, setting, 0.0)
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            torch.manual_seed(seed)
            return cls(config).to(dtype)
        return cls.from_pretrained(place, config=config, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0][:160].rstrip(".")
        raise refuse("--hf", source, f"transformers cannot load it ({reason})") from None


def _class_of(transformers: Any, config: Any) -> Any:
    """The class that the config names, or the causal language model of its kind."""
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
    cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cls is None:
        raise Refused(f"--hf: its config names no class of transformers {transformers.__version__}, but "
                      f"{getattr(config, 'architectures', None)}.")  # fmt: skip
    return cls
