"""Tiny models of transformers by class, batches for them, and one process's loss and gradients beside the cut's."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.nn import functional as F

import lss
from tests.distributed.pool import mesh

V = 96
PLAIN = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=V,
             max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
GQA = dict(PLAIN, num_key_value_heads=2, head_dim=8)
LATENT = dict(PLAIN, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
              v_head_dim=8)  # fmt: skip
# their norms multiply by weight.float(), so that a norm weight's gradient is summed over tokens in float32
NORMS32 = 2e-6
# its router scores in float32 whatever the dtype, so that the loss is rounded too
ROUTER32 = 2.1e-6
GEMMA = dict(GQA, sliding_window=6, query_pre_attn_scalar=8)
NO_BERT_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
NO_GPT2_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@dataclass(frozen=True)
class Case:
    """One model class: its config's class and settings, and the bound that its gradients keep in float64."""

    model: str
    settings: dict = field(default_factory=dict)
    bound: float = 1e-12
    plain: str = "sdpa"  # what one process computes attention by


CASES = {
    "llama": Case("Llama", dict(GQA, tie_word_embeddings=True)),
    "llama-9-3": Case("Llama", dict(GQA, hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=4)),
    "qwen2": Case("Qwen2", dict(GQA, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": Case("Qwen3", GQA),
    "mistral": Case("Mistral", dict(GQA, sliding_window=7)),
    "gemma2": Case("Gemma2", dict(GEMMA, attn_logit_softcapping=2.0), NORMS32, "dense64"),
    "gemma3": Case("Gemma3Text", dict(GEMMA, layer_types=["sliding_attention", "full_attention"]), NORMS32),
    "phi": Case("Phi", dict(PLAIN, resid_pdrop=0.0, embd_pdrop=0.0)),
    "phi3": Case("Phi3", dict(GQA, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gpt2": Case("GPT2LMHead", dict(n_embd=32, n_layer=2, n_head=4, vocab_size=V, n_positions=128, bos_token_id=1,
                                    scale_attn_by_inverse_layer_idx=True, **NO_GPT2_DROPOUT)),
    "gpt_neox": Case("GPTNeoX", PLAIN),
    "smollm3": Case("SmolLM3", dict(GQA, no_rope_layers=[1, 0])),
    "olmo2": Case("Olmo2", GQA),
    "starcoder2": Case("Starcoder2", dict(GQA, sliding_window=9, residual_dropout=0.0, embedding_dropout=0.0)),
    "granite": Case("Granite", dict(GQA, attention_multiplier=0.3, embedding_multiplier=2.0, logits_scaling=1.5)),
    "cohere": Case("Cohere", GQA, NORMS32),
    "mixtral": Case("Mixtral", dict(GQA, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": Case("Qwen3Moe", dict(GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)),
    "deepseek_v3": Case("DeepseekV3", dict(LATENT, moe_intermediate_size=24, n_routed_experts=4, n_group=2, topk_group=1,
                                           num_experts_per_tok=2, first_k_dense_replace=1),
                        ROUTER32),
    "gpt_oss": Case("GptOss", dict(GQA, num_local_experts=4, num_experts_per_tok=2, sliding_window=6), plain="dense64"),
    "bert": Case("BertForMaskedLM", dict(PLAIN, **NO_BERT_DROPOUT)),
    "modernbert": Case("ModernBertForMaskedLM", dict(PLAIN, local_attention=8, global_attn_every_n_layers=2)),
    "esm": Case("EsmForMaskedLM", dict(PLAIN, **NO_BERT_DROPOUT, position_embedding_type="rotary", token_dropout=False,
                                       mask_token_id=3)),
}  # fmt: skip


# layers of Mamba-2: what transformers computes in float32, in any dtype, is no oracle to 1e-12
HYBRIDS = {
    "granite_hybrid": Case("GraniteMoeHybrid", dict(
        GQA, layer_types=["mamba", "attention", "mamba"], num_hidden_layers=3, mamba_n_heads=8, mamba_d_head=8,
        mamba_d_state=6, mamba_n_groups=2, mamba_d_conv=3, mamba_chunk_size=16, num_local_experts=2, num_experts_per_tok=1,
        shared_intermediate_size=24, position_embedding_type="rope", attention_multiplier=0.3)),
}  # fmt: skip


def classes(name: str):
    """(config's class, model's class) of a case."""
    import transformers

    model = (CASES | HYBRIDS)[name].model
    if "For" in model:
        return getattr(transformers, model.split("For")[0] + "Config"), getattr(transformers, model)
    if model.endswith("LMHead"):
        return getattr(transformers, model.removesuffix("LMHead") + "Config"), getattr(transformers, model + "Model")
    return getattr(transformers, model + "Config"), getattr(transformers, model.removesuffix("Text") + "ForCausalLM")


def dense(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, s_aux=None, **_):
    """Attention with every score at hand, in the dtype of its inputs: transformers' eager one rounds to float32."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2).contiguous(), None


def dense_mask(*args, **kwargs):
    """The whole mask, also where sdpa would do without."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def build(name: str, dtype=torch.float64, implementation: str | None = None, **changes):
    """A model of this case with weights from a seed; two calls give the same."""
    import transformers

    transformers.AttentionInterface.register("dense64", dense)
    transformers.AttentionMaskInterface.register("dense64", dense_mask)
    case = (CASES | HYBRIDS)[name]
    made, cls = classes(name)
    config = made(**(case.settings | changes))
    config._attn_implementation = implementation or case.plain
    config._experts_implementation = "eager"  # other ways to run experts take no float64
    torch.manual_seed(0)
    net = cls(config).to(dtype)
    with torch.no_grad():  # weights of a fresh model are too small for attention to matter
        for parameter in net.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return net


def batch(kind: str, S: int, shifts: bool):
    """(what the model is given, what one process's loss needs: shifted labels) of a kind of batch."""
    draw = torch.Generator().manual_seed(S)
    rows = 1 if "packed" in kind else 2
    ids = torch.randint(4, V, (rows, S), generator=draw)
    labels = ids.clone() if shifts else torch.randint(4, V, (rows, S), generator=draw)
    labels[:, : S // 3] = -100  # uneven over the ranks
    inputs = {"input_ids": ids, "labels": labels}
    if kind == "padded":
        mask = torch.ones(rows, S, dtype=torch.int64)
        mask[0, -5:], mask[1, -8:], mask[1, 2:8] = 0, 0, 0  # a hole too, which no causal mask hides
        labels[mask == 0] = -100
        inputs["attention_mask"] = mask
    if "packed" in kind:
        edges = [0, S // 4, S // 4 + 1, S // 2 + 3, S]
        inputs["position_ids"] = torch.cat([torch.arange(b - a) for a, b in pairwise(edges)])[None]
        for edge in edges[:-1]:
            labels[:, edge] = -100
    return inputs


def reference(model, inputs, shifts: bool, count=None):
    """One process's loss, in float64 from its logits, and every gradient."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    if shifts:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    output = model(**inputs, use_cache=False) if shifts else model(**inputs)
    counted = (labels != -100).sum() if count is None else count
    loss = F.cross_entropy(output.logits.double().flatten(0, 1), labels.flatten(), reduction="sum") / counted
    if inputs.get("output_router_logits"):
        loss = loss + model.router_aux_loss_coef * output.aux_loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def gradients(model):
    return {name: None if p.grad is None else p.grad.double().clone() for name, p in model.named_parameters()}


def worst(found, expected):
    """The largest relative error of a gradient and its parameter."""
    norm = sum(float(g.norm()) ** 2 for g in expected.values() if g is not None) ** 0.5
    errors = {}
    for name, want in expected.items():
        got = found[name]
        want = torch.zeros(1, dtype=torch.float64) if want is None else want
        got = torch.zeros_like(want) if got is None else got
        error, size = float((got - want).norm()), float(want.norm())
        # a key bias moves all of a query's scores alike: its gradient is 0, and what is found is rounding
        errors[name] = 0.0 if max(error, size) < 1e-15 * norm else error / max(size, 1e-6 * norm)
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def shifts_of(model) -> bool:
    return "MaskedLM" not in type(model).__name__


def parity(name, cp, kind, S=37, dp=1, dtype=torch.float64, options=None, given=None, changes=None):
    """(relative error of the loss, worst gradient error, its parameter) of this rank against one process."""
    inputs = batch(kind, S, "MaskedLM" not in (CASES | HYBRIDS)[name].model) | (given or {})
    model = build(name, dtype, **(changes or {}))
    shifts = shifts_of(model)
    if dp > 1:  # rows over the dp ranks
        row = mesh(cp, dp)["dp"].get_local_rank()
        mine = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    else:
        mine = inputs
    model = lss.parallelize(model, mesh(cp, dp), **(options or {}))
    loss = model(**mine).loss
    loss.backward()
    plain, expected = reference(build(name, dtype, **(changes or {})), inputs, shifts)
    return abs(float(loss.detach()) - plain) / abs(plain), *worst(gradients(model), expected)


def parities(name, cp, kinds, **rest):
    """`parity` for several kinds of batch."""
    return [parity(name, cp, kind, **rest) for kind in kinds]
