"""What a model of transformers, or a batch for it, is refused for: by name, in one sentence, on every rank."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import lss
from tests.distributed.pool import mesh
from tests.integrations.hf_cases import GQA, PLAIN, V, batch, build
from tests.integrations.ranks import hf_pool as pool

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

TINY = dict(hidden_size=32, num_hidden_layers=2, vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MIXED = "mixes tokens outside of attention"
# class -> (settings, what the sentence says)
MODELS = {
    "MambaForCausalLM": (TINY, "backbone.layers.0 (Mamba"),
    "Mamba2ForCausalLM": (dict(TINY, num_heads=8, head_dim=8), "backbone.layers.0 (Mamba"),
    "JambaForCausalLM": (dict(GQA, attn_layer_period=2, attn_layer_offset=1, num_experts=2), "JambaMamba"),
    "BambaForCausalLM": (dict(GQA, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8), MIXED),
    "FalconH1ForCausalLM": (dict(GQA, mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64), "mamba"),
    "RwkvForCausalLM": (dict(hidden_size=32, num_hidden_layers=2, vocab_size=V, attention_hidden_size=32), "Rwkv"),
    "RecurrentGemmaForCausalLM": (dict(TINY, num_attention_heads=4, lru_width=32), MIXED),
    "Qwen3NextForCausalLM": (dict(GQA, num_experts=2, linear_num_value_heads=4, linear_num_key_heads=2), MIXED),
    "Qwen3_5ForCausalLM": (GQA, "Qwen3_5GatedDeltaNet"),
    "KimiLinearForCausalLM": (GQA, "KimiLinearDeltaAttention"),
    "BailingHybridForCausalLM": (GQA, "BailingHybridDeltaAttention"),
    "OlmoHybridForCausalLM": (GQA, "OlmoHybridLinearAttention"),
    "NemotronHForCausalLM": (dict(TINY, num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_num_heads=8,
                                  mamba_head_dim=8, ssm_state_size=8, n_groups=2, intermediate_size=48,
                                  hybrid_override_pattern="M*"), MIXED),
    "MiniMaxForCausalLM": (dict(GQA, num_local_experts=2), "LightningAttention"),
    "Lfm2ForCausalLM": (dict(GQA, layer_types=["conv", "full_attention"]), MIXED),
    "BloomForCausalLM": (dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=V), "attention interface"),
    "T5ForConditionalGeneration": (dict(d_model=32, num_layers=2, vocab_size=V), "encoder-decoders"),
    "BartForConditionalGeneration": (dict(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=V), "encoder-decoders"),
    "LlamaModel": (GQA, "logits for every token"),
    "LlamaForSequenceClassification": (GQA, "logits for every token"),
    "GPT2LMHeadModel": (dict(n_embd=32, n_layer=2, n_head=4, vocab_size=V), "resid_pdrop=0.1"),
    "BertForMaskedLM": (PLAIN, "dropout"),
    "EsmForMaskedLM": (dict(PLAIN, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, token_dropout=True,
                            mask_token_id=3), "token_dropout"),
}  # fmt: skip


def refusal(function, *args, **kwargs):
    """The sentence it is refused with."""
    try:
        function(*args, **kwargs)
    except lss.Refused as refused:
        return str(refused)
    return "not refused"


def refused_models():
    """What `lss.parallelize` says to each class."""
    import transformers

    said = {}
    for name, (settings, _) in MODELS.items():
        cls = getattr(transformers, name)
        with torch.device("meta"):
            model = cls(cls.config_class(**settings))
        said[name] = refusal(lss.parallelize, model, mesh(1))
    return said


def test_models_that_mix_tokens_elsewhere_are_refused_by_name():
    for said in pool(1).run(refused_models):
        for name, (_, what) in MODELS.items():
            assert name in said[name], said[name]
            assert what in said[name], said[name]
            assert said[name].endswith(".")
            assert "\n" not in said[name]


def refused_batches():
    """What a cut model says to a batch, by what is wrong with it."""
    import transformers

    inputs = batch("padded", 37, True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    llama = lss.parallelize(build("llama"), mesh(2))
    said = {
        "past": refusal(llama, ids, use_cache=True),
        "embeds": refusal(llama, inputs_embeds=torch.zeros(2, 37, 32)),
        "attentions": refusal(llama, ids, output_attentions=True),
        "keep": refusal(llama, ids, logits_to_keep=1),
        "dense": refusal(llama, ids, attention_mask=torch.ones(2, 1, 37, 37)),
        "padding": refusal(llama, ids, labels=ids, attention_mask=mask),
        "left": refusal(llama, ids, labels=ids.masked_fill(mask.flip(1) == 0, -100), attention_mask=mask.flip(1)),
        "rows": refusal(llama, ids, position_ids=torch.arange(37).remainder(20).expand(2, -1)),
        "length": refusal(llama, ids, position_ids=torch.arange(36)[None]),
        "labels": refusal(llama, ids, labels=ids[:, 1:]),
        "router": refusal(llama, ids, output_router_logits=True),
        "inside": refusal(llama.model, ids),
        "twice": refusal(lss.parallelize, llama, mesh(2)),
        "table": refusal(lss.parallelize(build("gpt2"), mesh(2)), torch.ones(1, 129, dtype=torch.int64)),
        "precut": refusal(lss.parallelize(build("llama"), mesh(2), precut=True), ids[:, :20], labels=ids[:, :20]),
        "joined": refusal(lss.parallelize(build("gpt_oss"), mesh(2)), **batch("packed", 37, True)),
        "encoder": refusal(lss.parallelize(build("bert"), mesh(2)), **batch("packed", 37, False)),
        "tp": refusal(lss.parallelize, build("llama"), mesh(2), strategy="tp"),
        "fsdp": refusal(lss.parallelize, build("llama"), mesh(2), fsdp=True, fsdp_reshard="some"),
        "attention": refusal(lss.parallelize, build("llama"), mesh(2), checkpointing="attention"),
        "order": refusal(lss.parallelize, build("llama"), mesh(2), order="zigzag"),
    }
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = lss.parallelize(build("llama", rope_parameters=rope, max_position_embeddings=40), mesh(2))
    dynamic(ids)  # within the length it was trained at, its frequencies are everybody's
    said["dynamic"] = refusal(dynamic, torch.ones(1, 41, dtype=torch.int64))
    chunks = transformers.Llama4TextConfig(**GQA, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48)
    said["chunks"] = refusal(lss.parallelize, transformers.Llama4ForCausalLM(chunks), mesh(2))
    both = build("gemma3", use_bidirectional_attention=True)
    said["images"] = refusal(lss.parallelize(both, mesh(2)), ids)
    roberta = transformers.RobertaConfig(**PLAIN, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    said["roberta"] = refusal(lss.parallelize(transformers.RobertaForMaskedLM(roberta), mesh(2)), ids)
    return said


BATCHES = {
    "past": "use_cache=True", "embeds": "inputs_embeds=Tensor", "attentions": "output_attentions=",
    "keep": "logits_to_keep=", "dense": "attention_mask=(2, 1, 37, 37)", "padding": "labels=", "left": "begins with padding",
    "rows": "position_ids=", "length": "position_ids=(1, 36)", "labels": "labels=(2, 36)",
    "router": "output_router_logits=", "inside": "whole model", "twice": "parallelized already", "table": "128 rows",
    "precut": "shift_labels", "joined": "cu_seqlens", "encoder": "cu_seqlens", "tp": "strategy=tp",
    "fsdp": "fsdp_reshard=some",
    "attention": "checkpointing=attention", "order": "order=zigzag", "dynamic": "rope_type=dynamic",
    "chunks": "chunked_attention", "roberta": "RobertaEmbeddings",
}  # fmt: skip


def test_batches_and_options_are_refused_by_name():
    for said in pool(2).run(refused_batches):
        for what, words in BATCHES.items():
            assert words in said[what], (what, said[what])
        # transformers makes this one bidirectional, or by a function of its own: either is exact or named
        assert said["images"] in ("not refused",) or "attention mask=" in said["images"]


def unheard():
    """A model with a layer whose attention does not call the interface: caught after its forward, before any step."""
    model = lss.parallelize(build("llama"), mesh(2))
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    return refusal(model, batch("plain", 37, True)["input_ids"])


def test_layers_that_do_not_call_attention_are_noticed():
    assert all("1 of 2 layers were cut" in said for said in pool(2).run(unheard))


def plain_mask_functions():
    """Unknown mask functions, read as the builder is given them."""
    from transformers import masking_utils as made

    from lss.integrations.hf.masks import Pattern, mask_pattern

    def mine(b, h, i, j):
        return i == j

    read = lambda function: mask_pattern(mask_function=function)  # noqa: E731
    assert read(made.causal_mask_function) == Pattern(True)
    assert read(made.sliding_window_causal_mask_function(4)) == Pattern(True, 4)
    assert read(made.sliding_window_bidirectional_mask_function(4)) == Pattern(False, 5)
    unknown = (mine, made.and_masks(made.causal_mask_function, mine), made.or_masks(made.causal_mask_function, mine),
               made.blockwise_overlay(torch.zeros(1, 1)), made.chunked_causal_mask_function(4, torch.zeros(1)),
               made.sliding_window_overlay(4))  # fmt: skip
    return [refusal(read, function) for function in unknown]


def test_unknown_mask_functions_are_refused():
    for said in pool(2).run(plain_mask_functions):
        for sentence in said:
            assert sentence.startswith("attention mask="), sentence
