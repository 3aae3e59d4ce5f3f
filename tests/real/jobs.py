"""What the ranks do in the tests of real data and models; each with the example or the benchmark that users run."""

from __future__ import annotations

from argparse import Namespace

import torch

import lss
from tests.distributed.pool import mesh


def needle(cp, length, steps):
    """The needle example at a small size: its weights and its answers, of a model whose second half of steps is longer."""
    from examples.needle import accuracy, train

    settings = Namespace(seed=0, lr=3e-3, tokens=2 * length, steps=steps)
    model = train((length // 2, length), length // 2, settings, mesh(cp))
    return {name: p.detach() for name, p in model.named_parameters()}, accuracy(model, 2 * length, 3, mesh(cp))


def tiny_smollm2(folder):
    """A model of SmolLM2's kind and head counts, and a tokenizer."""
    from tests.data.tokenizers import save_tokenizer
    from tests.integrations.hf_cases import build

    build("llama-9-3", torch.float32, vocab_size=290, tie_word_embeddings=True).save_pretrained(folder)
    save_tokenizer(folder)
    return True


def real_smollm2(gguf, folder):
    """The model of a GGUF file, by the example."""
    from examples.smollm2 import convert

    convert(gguf, folder)
    return True


def smollm2_whole(cp, folder, tokens):
    """The whole model in float32 as the benchmark measures it, under a loss in float32 and in float64; on rank 0."""
    from benchmarks.smollm2 import read_tokens, whole

    ids = read_tokens(folder, lss.__file__, tokens)
    return [whole(folder, ids, mesh(cp), wide) for wide in (False, True)]


def smollm2_errors(cp, folder, layers, tokens):
    """Of the first layers in float64, as the benchmark measures them: against one process and both losses; on rank 0."""
    from benchmarks.smollm2 import cut, errors, load, one_process, read_tokens

    ids = read_tokens(folder, lss.__file__, tokens)
    found = cut(load(folder, torch.float64, layers), ids, mesh(cp))
    return found[2] and [errors(found, one_process(load(folder, torch.float64, layers), ids, own)) for own in (False, True)]
