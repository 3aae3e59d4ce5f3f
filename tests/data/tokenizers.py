"""A tokenizer small enough for tests: byte-level BPE, and a chat template."""

from __future__ import annotations

TEMPLATE = ("{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<bot>{% endif %}")  # fmt: skip
MARKED = ("{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}<eos>{% else %}<bot>"
          "{% generation %}{{ m.content }}<eos>{% endgeneration %}{% endif %}{% endfor %}")  # fmt: skip


def save_tokenizer(folder, template=TEMPLATE, vocabulary=290):
    """Train and save one; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<eos>", "<user>", "<bot>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog\n\n"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", chat_template=template)
    fast.save_pretrained(folder)
    return fast
