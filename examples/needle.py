"""Find a needle far back: does a model that was trained at length, and one that was trained on short sequences?

    python examples/needle.py                            # needle.json and needle.svg
    torchrun --nproc-per-node 2 examples/needle.py       # every sequence cut over two ranks; the same numbers
    python examples/needle.py --steps 2 --out trial      # a look at it

A sequence is pairs of a key and a value. Three of four pairs bring a new key with a drawn value. Each fourth one asks: it
names a key that stood somewhere before, once, and the label is the value that stood behind it; nothing else is a label.
Distances from question to needle are spread evenly over powers of two. To answer, one layer must know which token stands
before each token, and a later one find the key: two layers suffice.

Two models of the same shape, with the same number of steps and of tokens a step, are trained on sequences of 64 and of
LENGTH tokens. Both answer sequences of LENGTH tokens then.
"""

import argparse
import json

import torch
import torch.distributed as dist

import lss
from lss.config import load_config
from lss.model import Transformer
from lss.report.plots import Curve, line_plot

KEYS, VALUES = 256, 16
SHAPE = ["model.d_model=64", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=2", "model.d_mlp=128",
         f"model.vocab_size={KEYS + VALUES}", "model.tie_embeddings=false"]  # fmt: skip


def draw(rows, length, generator):
    """Tokens, labels (of the next token; -100 for none) and distances to the needles, each (rows, length)."""
    tokens, distances = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
    labels = torch.full((rows, length), -100)
    asks = torch.rand(rows, length // 2, generator=generator).tolist()
    for row in range(rows):
        keys = torch.randperm(KEYS, generator=generator).tolist()
        values = torch.randint(KEYS, KEYS + VALUES, (length // 2,), generator=generator).tolist()
        waiting = []  # (pair, key, value) of needles that nobody asked for
        for pair, ask in enumerate(asks[row]):
            if pair % 4 == 3:
                # one as far back as a power of two that is drawn evenly says, or the next nearest
                wanted = pair - (pair + 1) ** ask
                at, key, value = waiting.pop(min(range(len(waiting)), key=lambda i: abs(waiting[i][0] - wanted)))
                labels[row, 2 * pair], distances[row, 2 * pair] = value, 2 * (pair - at)
            else:
                key, value = keys.pop(), values[pair]
                waiting.append((pair, key, value))
            tokens[row, 2 * pair], tokens[row, 2 * pair + 1] = key, value
    return tokens, labels, distances


def train(length, arguments, mesh):
    """A model trained on sequences of `length` tokens, from weights and data that only the seed decides."""
    config = load_config(None, SHAPE).model
    model = lss.parallelize(Transformer(config, length, seed=arguments.seed).to(mesh.device_type), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(arguments.seed)
    for step in range(1, arguments.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * min(1, step / 50, 1.1 - step / arguments.steps)
        tokens, labels, _ = draw(arguments.tokens // length, length, generator)
        optimizer.zero_grad()
        loss = model(tokens.to(mesh.device_type), shift_labels=labels.to(mesh.device_type)).loss
        loss.backward()
        lss.clip_grad_norm_(model, 1.0)
        optimizer.step()
        if mesh.get_rank() == 0 and (step % 100 == 0 or step == arguments.steps):
            print(f"length {length} step {step}: loss {loss.item():.4f}", flush=True)
    return model


@torch.no_grad()
def accuracy(model, length, rows, mesh):
    """Share of right answers of sequences of `length`, by distance: [(lowest distance, share, questions)]."""
    tokens, labels, distances = draw(rows, length, torch.Generator().manual_seed(12345))
    right = []
    for row in range(rows):
        logits = lss.unshard(model(tokens[row : row + 1].to(mesh.device_type)).logits, mesh, length=length)
        right.append(logits.argmax(-1).cpu() == labels[row : row + 1])
    right, found = torch.cat(right), []
    low = 2
    while low < length:
        inside = (distances >= low) & (distances < 2 * low)
        if inside.any():
            found.append((low, right[inside].double().mean().item(), int(inside.sum())))
        low *= 2
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step, whatever the length")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rows", type=int, default=64, help="sequences that are answered in the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="needle")
    arguments = parser.parse_args()
    mesh = lss.init_mesh(cp=lss.world_size())
    found = {}
    for length in (64, arguments.length):
        model = train(length, arguments, mesh)
        found[f"trained on {length} tokens"] = accuracy(model, arguments.length, arguments.rows, mesh)
    if mesh.get_rank() == 0:
        for name, row in found.items():
            print(f"{name}: " + ", ".join(f"{low}-{2 * low - 1}: {share:.3f}" for low, share, _ in row))
        with open(f"{arguments.out}.json", "w") as file:
            json.dump({"settings": vars(arguments), "accuracy": found}, file, indent=1)
        curves = [Curve(name, range(len(row)), [share for *_, share, _ in row], number, points=True)
                  for number, (name, row) in enumerate(found.items())]  # fmt: skip
        with open(f"{arguments.out}.svg", "w") as file:
            file.write(line_plot(curves, "right answers", x_label="log2 of the distance, tokens"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
