"""Fine-tune a Hugging Face model on sequences that are cut over ranks; the numbers are those of one process.

    torchrun --nproc-per-node 2 examples/hf_finetune.py
    torchrun --nproc-per-node 2 examples/hf_finetune.py HuggingFaceTB/SmolLM2-135M
    python examples/hf_finetune.py                    # the same numbers, on one rank
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lss

torch.manual_seed(0)
if len(sys.argv) > 1:  # a folder, or a name on the Hub
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

mesh = lss.init_mesh(cp=lss.world_size())
model = lss.parallelize(model.to(mesh.device_type), mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if len(sys.argv) == 1 else 1e-5)

text = torch.tensor([list((__doc__ * 5)[:1501].encode())], device=mesh.device_type)
for step in range(1, 31):
    start = 0 if step % 2 else 500
    tokens = text[:, start : start + 1000]  # whole, and the same on every rank of a sequence; the model cuts it
    optimizer.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss  # the mean over the labels of all ranks
    loss.backward()  # gradients are summed over the ranks
    lss.clip_grad_norm_(model, 1.0)
    optimizer.step()
    if mesh.get_rank() == 0 and step % 10 == 0:
        print(f"step {step}: loss {loss.item():.6f}")
torch.distributed.destroy_process_group()
