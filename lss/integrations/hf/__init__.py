"""Hugging Face transformers models on a cut sequence.

Attention goes through transformers' own registries (`AttentionInterface`, `AttentionMaskInterface`); batches are cut
before the model's forward and the loss is computed after it. A mixer that carries a state is replaced by one with the same
parameters. Nothing of transformers is patched, and its import waits until a model of it is at hand.
"""

from lss.integrations.hf.batch import Adapter, CutBatch
from lss.integrations.hf.interface import use_lss_attention
from lss.integrations.hf.mixers import is_mixer, use_cut_mixers
from lss.integrations.hf.refusals import Traits, is_hf_model, traits_of

__all__ = ["Adapter", "CutBatch", "Traits", "is_hf_model", "is_mixer", "traits_of", "use_cut_mixers", "use_lss_attention"]
