"""What makes token ids of text: a tokenizer of transformers, or the fixed vocabulary of nucleotides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lss.config.errors import Refused, refuse

NUCLEOTIDE = "nucleotide"
SERIES = "series"  # numbers in columns, by bins of their values
LETTERS = "ACGTN"
END = len(LETTERS)  # stands between sequences
NUCLEOTIDES = END + 2  # the last id stands for masked tokens
# id of every byte: letters of both cases, U as T, other codes of the IUPAC alphabet as N; 255 for what is no nucleotide
NUCLEOTIDE_IDS = np.full(256, 255, np.uint8)
for _letters, _id in (("Aa", 0), ("Cc", 1), ("Gg", 2), ("TtUu", 3), ("NnRrYySsWwKkMmBbDdHhVv", 4)):
    NUCLEOTIDE_IDS[list(_letters.encode())] = _id
# id of the letter on the other strand
COMPLEMENT = np.array([3, 2, 1, 0, 4, 5, 6], np.int64)


class Tokenizer:
    """A tokenizer of transformers.

    Args:
        name: a folder, or OWNER/NAME on the Hugging Face Hub. No code of it is run.
        setting: what it was given by, for refusals.

    Attributes:
        vocab_size: ids are below this.
        end: the id that ends a document; None where the tokenizer has none.

    Raises:
        Refused: transformers is not installed, there is no such tokenizer, or no network to ask for it.
    """

    def __init__(self, name: str, setting: str = "--tokenizer") -> None:
        if find_spec("transformers") is None:
            raise refuse(setting, name, "transformers is not installed; pip install 'lss-transformer[hf]'")
        from transformers import AutoTokenizer

        try:
            self._it: Any = AutoTokenizer.from_pretrained(_place(name), trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120].rstrip(".")
            fit = "it has no tokenizer that can be read here; give a folder or OWNER/NAME of one, or data.source=\"tokens\""
            raise refuse(setting, name, f"{fit} ({reason})") from None
        self.name, self.vocab_size, self.end = name, len(self._it), self._it.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without those that mark its ends."""
        # a text longer than the model's own length is no mistake here
        return self._it(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._it.decode(list(ids))

    def text_of(self, ids: Sequence[int]) -> str:
        """The text that ids were made of, without what marks a document's end."""
        return self._it.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> list[Path]:
        """Write its files into a folder; returns them."""
        self._it.save_pretrained(folder)
        return sorted(folder.iterdir())

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """(ids, whether each is trained on) of a conversation by the tokenizer's chat template: the assistant's words are.

        By the template's own marks where it has them, else by what each of the assistant's turns adds to what stands
        before it.

        Raises:
            ValueError: there is no template, or it writes earlier turns anew, so that no turn can be told.
        """
        template = self._it.chat_template
        if not template:
            raise ValueError("the tokenizer has no chat template")
        if "generation" in str(template) and "endgeneration" in str(template):
            made = self._it.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(made["input_ids"]), [bool(mark) for mark in made["assistant_masks"]]
        ids = self._chat_ids(messages, False)
        trained = [False] * len(ids)
        for turn, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before, after = self._chat_ids(messages[:turn], True), self._chat_ids(messages[: turn + 1], False)
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise ValueError("its chat template writes earlier turns anew, so that the assistant's cannot be told")
            trained[len(before) : len(after)] = [True] * (len(after) - len(before))
        return ids, trained

    def _chat_ids(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> list[int]:
        made = self._it.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=prompt, return_dict=True)
        return list(made["input_ids"])


def _place(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise Refused(f"{name}: no such folder; give one with a tokenizer, or OWNER/NAME on the Hugging Face Hub.")
    return name
