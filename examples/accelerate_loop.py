"""A plain loop with Accelerate on sequences that are cut over ranks; the numbers are those of one process.

    torchrun --nproc-per-node 2 examples/accelerate_loop.py
    python examples/accelerate_loop.py                # the same numbers, on one rank
"""

import contextlib

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lss
from lss.integrations.hf.trainer import prepare_accelerator

ACCUMULATE = 2
mesh = lss.init_mesh(cp=lss.world_size())
accelerator = Accelerator(cpu=mesh.device_type == "cpu")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
model = lss.parallelize(LlamaForCausalLM(config).to(accelerator.device), mesh)
prepare_accelerator(accelerator, model)  # no wrapper around the model; batches are shared out over dp alone

text = torch.tensor(list((__doc__ * 40).encode()))
rows = [{"input_ids": text[at : at + 301], "labels": text[at : at + 301]} for at in range(0, 8000, 100)]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))

batches = iter(loader)
for step in range(1, 21):
    micro = [next(batches) for _ in range(ACCUMULATE)]
    counted = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro)  # labels are shifted
    counted = accelerator.reduce(counted, "sum") / mesh["cp"].size()  # of the whole step, over dp; cp ranks have the same
    loss = 0.0
    for number, batch in enumerate(micro):
        last = number == ACCUMULATE - 1
        with contextlib.nullcontext() if last else model.no_sync():
            part = model(**batch, num_items_in_batch=counted).loss
            accelerator.backward(part)
        loss += part.item()
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if accelerator.is_main_process and step % 10 == 0:
        print(f"loss {loss:.6f}")
