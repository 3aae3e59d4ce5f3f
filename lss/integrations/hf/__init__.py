"""Hugging Face transformers models on a cut sequence.

Attention goes through transformers' own registries (`AttentionInterface`, `AttentionMaskInterface`); batches are cut
before the model's forward and the loss is computed after it. Nothing of transformers is patched, and its import waits
until a model of it is at hand.
"""

from lss.integrations.hf.batch import Adapter, CutBatch
from lss.integrations.hf.interface import use_lss_attention
from lss.integrations.hf.refusals import Traits, is_hf_model, traits_of

__all__ = ["Adapter", "CutBatch", "Traits", "is_hf_model", "traits_of", "use_lss_attention"]
