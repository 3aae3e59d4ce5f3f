"""transformers' Trainer on sequences that are cut over ranks; losses, norms and weights are those of one process.

    torchrun --nproc-per-node 2 examples/trainer.py
    python examples/trainer.py                        # the same numbers, on one rank
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lss
from lss.integrations.hf.trainer import LSSTrainerMixin


class LongTrainer(LSSTrainerMixin, Trainer):
    pass


mesh = lss.init_mesh(cp=lss.world_size())
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=20,
    learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=10, report_to=[], save_strategy="no",
    use_cpu=mesh.device_type == "cpu", disable_tqdm=True,
)  # fmt: skip

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
model = lss.parallelize(LlamaForCausalLM(config).to(mesh.device_type), mesh)

text = torch.tensor(list((__doc__ * 40).encode()))
rows = [{"input_ids": text[at : at + 301], "labels": text[at : at + 301]} for at in range(0, 8000, 100)]
trainer = LongTrainer(model=model, args=arguments, train_dataset=rows)
trainer.log = lambda logs, *_: trainer.state.log_history.append(logs)  # without its own prints
trainer.train()
if mesh.get_rank() == 0:
    for logs in trainer.state.log_history:
        if "grad_norm" in logs:
            print(f"loss {logs['loss']:.6f}")
