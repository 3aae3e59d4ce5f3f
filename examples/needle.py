"""Find a needle far back: a model trained at length does, and one that was trained on, or sees, short sequences does not.

    python examples/needle.py                            # needle.json and needle.svg; minutes of one core
    torchrun --nproc-per-node 2 examples/needle.py       # every sequence cut over two ranks; the same numbers
    python examples/needle.py --steps 2 --out trial      # a look at it

Of the tokens of a sequence an eighth are needles, at drawn places: a key, which no other needle of the sequence has, with a
drawn value, both in one token. All others ask: such a token names the key of a needle before it, and the label is that
needle's value; nothing else is a label. Distances from question to needle are spread evenly over powers of two. There are 8
values, so that guessing is right once in 8 times and costs ln 8 = 2.08 nats.

Three models of the same shape, with the same number of steps and of tokens a step:

- at length: half of the steps on sequences of SHORT tokens, where it learns to look a key up, then on LENGTH tokens;
- short training: all steps on SHORT tokens;
- short sight: as the first, but each token of it sees the SHORT tokens up to itself and no others.

All answer the same sequences of LENGTH tokens then.
"""

import argparse
import json

import torch
import torch.distributed as dist

import lss
from lss.config import ModelConfig
from lss.model import Transformer
from lss.report.plots import Curve, line_plot

KEYS, VALUES = 64, 8
NEEDLES = KEYS * VALUES  # ids of needles are key * VALUES + value; behind them come the questions, one a key


def draw(rows, length, generator):
    """Tokens, labels (-100 for none) and distances to the needles (0 for none), each (rows, length)."""
    count = min(length // 8, KEYS)
    places = torch.rand(rows, length, generator=generator)
    places[:, 0] = -1  # a needle first, for the questions behind it
    needles = places.argsort(1)[:, :count].sort(1).values
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :count]
    values = torch.randint(VALUES, (rows, count), generator=generator)
    # the needle that stands as far back as a power that is drawn evenly says, or the next before it
    at = torch.arange(length)
    back = at.clamp(min=1) ** torch.rand(rows, length, generator=generator, dtype=torch.float64)
    asked = torch.searchsorted(needles, (at - back.long()).clamp(min=0), right=True) - 1
    is_needle = torch.zeros(rows, length, dtype=torch.bool).scatter(1, needles, True)
    tokens = (NEEDLES + keys.gather(1, asked)).scatter(1, needles, keys * VALUES + values)
    labels = values.gather(1, asked).masked_fill(is_needle, -100)
    return tokens, labels, (at - needles.gather(1, asked)).masked_fill(is_needle, 0)


def build(length, window, seed):
    """Two layers of 64; `window` 0 sees everything."""
    config = ModelConfig(d_model=64, n_layers=2, n_heads=2, n_kv_heads=2, d_mlp=128, vocab_size=NEEDLES + KEYS,
                         tie_embeddings=False, windows=(window,))  # fmt: skip
    return Transformer(config, length, seed=seed)


def train(lengths, window, arguments, mesh):
    """A model trained on sequences of each of `lengths` in turn, from weights and data that only the seed decides."""
    model = lss.parallelize(build(max(lengths), window, arguments.seed).to(mesh.device_type), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(arguments.seed)
    for step in range(arguments.steps):
        length = lengths[step * len(lengths) // arguments.steps]
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * min(1, (step + 1) / 50, 1.05 - step / arguments.steps)
        tokens, labels, _ = draw(arguments.tokens // length, length, generator)
        optimizer.zero_grad()
        loss = model(tokens.to(mesh.device_type), shift_labels=labels.to(mesh.device_type)).loss
        loss.backward()
        lss.clip_grad_norm_(model, 1.0)
        optimizer.step()
        if mesh.get_rank() == 0 and (step % 100 == 99 or step + 1 == arguments.steps):
            print(f"length {length}, window {window}, step {step + 1}: loss {loss.item():.4f}", flush=True)
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
    low = 1
    while low < length:
        inside = (distances >= low) & (distances < 2 * low)
        if inside.any():
            found.append((low, right[inside].double().mean().item(), int(inside.sum())))
        low *= 2
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--short", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, whatever the length")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rows", type=int, default=64, help="sequences that are answered in the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="needle")
    arguments = parser.parse_args()
    mesh = lss.init_mesh(cp=lss.world_size())
    short, length = arguments.short, arguments.length
    models = {f"trained on {length}": ((short, length), 0), f"trained on {short}": ((short,), 0),
              f"sees {short}": ((short, length), short)}  # fmt: skip
    found = {}
    for name, (lengths, window) in models.items():
        found[name] = accuracy(train(lengths, window, arguments, mesh), length, arguments.rows, mesh)
        if mesh.get_rank() == 0:
            print(f"{name}: " + ", ".join(f"{low}-{2 * low - 1}: {share:.3f}" for low, share, _ in found[name]), flush=True)
    if mesh.get_rank() == 0:
        with open(f"{arguments.out}.json", "w") as file:
            json.dump({"settings": vars(arguments), "accuracy": found}, file, indent=1)
        curves = [Curve(name, range(len(row)), [share for _, share, _ in row], number, points=True)
                  for number, (name, row) in enumerate(found.items())]  # fmt: skip
        with open(f"{arguments.out}.svg", "w") as file:
            file.write(line_plot(curves, "right answers", x_label="log2 of the distance, tokens"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
