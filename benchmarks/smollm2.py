"""SmolLM2-135M cut over ranks against one process: logits, loss and every gradient, and both against float64.

    torchrun --nproc-per-node 3 benchmarks/smollm2.py SmolLM2-135M      # the folder that examples/smollm2.py writes

One line of JSON a case on standard output, from the first rank, which computes the one-process side with transformers' own
attention. Errors are relative to the norm of what is compared; "gradient" is the worst of all parameters, by name.
Cases: the first four layers in float64, under a loss in float64 and under transformers' own, which rounds to float32; and
the model as a whole in float32, under a loss in float32 and in float64, where "cut_to_exact" and "one_to_exact" hold the
ranks' results and one process's against float64, norms included, which transformers computes in float32 otherwise: what the
two differ by is rounding if neither is farther from float64 than the other. "eager_to_one" is how far one process is from
itself when it computes attention by other operators, with nothing cut. "worst_ratio" is that of the two distances of a
parameter's gradient, the largest of all parameters; "eager_worst_ratio" the same of those other operators.
"""

import argparse
import json
import sys

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import lss
from lss.check.parity import relative_errors
from lss.model.transformer import shift

BOUND = 2e-6  # what float32 is held to where the sums are short


def load(folder, dtype, layers):
    """The model in `dtype`, its first `layers` layers only; 0: all."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model.eval()


def with_exact_norms(model):
    """The model with norms that compute in the model's dtype; transformers' compute in float32 whatever that is."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                plain = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon)
                plain.weight = norm.weight
                setattr(parent, name, plain)
    return model


def read_tokens(folder, text, count):
    """The first `count` tokens of a text file, (1, count)."""
    with open(text, encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(folder)(file.read(20 * count))["input_ids"]
    assert len(ids) >= count, "the text is too short"
    return torch.tensor([ids[:count]])


def gradients(model):
    """Every parameter's gradient by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def one_process(model, ids, own_loss=False, wide_loss=False):
    """(logits, loss, gradients) as transformers computes them; the loss in the logits' dtype, its own, or float64."""
    if own_loss:
        output = model(input_ids=ids, labels=ids, use_cache=False)
        logits, loss = output.logits, output.loss
    else:
        logits = model(input_ids=ids, use_cache=False).logits
        scores = logits.double() if wide_loss else logits
        loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return logits.detach().double(), float(loss.detach()), gradients(model)


def cut(model, ids, mesh, wide_loss=False):
    """(logits, loss, gradients) of the model cut over the ranks, the logits put together again."""
    model = lss.parallelize(model, mesh)
    if wide_loss:  # the user's own: this rank's sum over the count of all, and the model sums the gradients
        logits = model(input_ids=ids).logits
        labels = lss.shard(shift(ids), mesh)
        loss = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum") / (ids.shape[1] - 1)
        loss.backward()
        torch.distributed.all_reduce(total := loss.detach())
        loss = total
    else:
        output = model(input_ids=ids, labels=ids)
        logits, loss = output.logits, output.loss
        loss.backward()
    logits = lss.unshard(logits.detach(), mesh, length=ids.shape[1])
    # all ranks have the same, and one is to need its memory
    return logits.double(), float(loss.detach()), gradients(model) if mesh.get_rank() == 0 else {}


def errors(a, b):
    """What a differs from b by; also over all gradients together, and of how many parameters by more than BOUND."""
    each = relative_errors(a[2], b[2])
    name = max(each, key=each.get)
    norm = sum(float(gradient.double().square().sum()) for gradient in b[2].values()) ** 0.5
    apart = sum(float((a[2][n].double() - g.double()).square().sum()) for n, g in b[2].items()) ** 0.5
    return {"logits": float((a[0] - b[0]).norm() / b[0].norm()), "loss": abs(a[1] - b[1]) / abs(b[1]),
            "gradient": each[name], "of": name, "together": apart / norm,
            "beyond": sum(error > BOUND for error in each.values()), "parameters": len(each)}  # fmt: skip


def whole(folder, ids, mesh, wide_loss):
    """The distances of the whole model in float32; on the first rank."""
    ours = cut(load(folder, torch.float32, 0), ids, mesh, wide_loss)
    if mesh.get_rank() != 0:
        return {}
    one = one_process(load(folder, torch.float32, 0), ids, wide_loss=wide_loss)
    exact = one_process(with_exact_norms(load(folder, torch.float64, 0)), ids)
    other = load(folder, torch.float32, 0)
    other.set_attn_implementation("eager")
    other = one_process(other, ids, wide_loss=wide_loss)
    far, own, eager = (relative_errors(side[2], exact[2]) for side in (ours, one, other))
    return {"cut_to_one": errors(ours, one), "cut_to_exact": errors(ours, exact), "one_to_exact": errors(one, exact),
            "eager_to_one": errors(other, one), "eager_to_exact": errors(other, exact),
            "worst_ratio": max(far[n] / own[n] for n in own),
            "eager_worst_ratio": max(eager[n] / own[n] for n in own)}  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=301)
    parser.add_argument("--layers", type=int, default=4, help="of the case in float64")
    parser.add_argument("--text", default=argparse.__file__, help="a file that tokens are made of")
    options = parser.parse_args(arguments)
    mesh = lss.init_mesh(cp=lss.world_size(), device_type="cpu")
    ids = read_tokens(options.folder, options.text, options.tokens)
    first, rows = mesh.get_rank() == 0, []
    ours = cut(load(options.folder, torch.float64, options.layers), ids, mesh)
    if first:
        for own in (False, True):
            expected = one_process(load(options.folder, torch.float64, options.layers), ids, own)
            rows.append({"case": f"{options.layers} layers, float64", "loss of": "transformers" if own else "float64",
                         "cut_to_one": errors(ours, expected)})  # fmt: skip
    for wide in (False, True):
        row = whole(options.folder, ids, mesh, wide)
        rows.append({"case": "whole, float32", "loss of": "float64" if wide else "float32", **row})
    if first:
        for row in rows:
            json.dump({"cp": mesh["cp"].size(), "tokens": options.tokens, **row}, sys.stdout)
            print(flush=True)
    torch.distributed.barrier()  # the first rank computes longest, and the store is its own
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
