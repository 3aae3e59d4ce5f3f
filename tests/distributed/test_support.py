"""Every pair of the support table: equal to the oracle, or refused in a sentence that names both."""

from __future__ import annotations

import pytest
import torch

from lss.config.support import FEATURES, pairs, support_table, why_refused
from tests.distributed.cases import attention_case, checkerboard
from tests.distributed.model_cases import parity_case
from tests.distributed.pool import pool
from tests.test_house import ROOT

CP = 3
EDGES = [0, 4, 5, 17, 26]
# what switches a feature on in `attention_case`, and the words that a refusal names it by
ON = {
    "lss": ({"strategy": "lss"}, "strategy='lss'"),
    "lss_2d": ({"strategy": "lss_2d", "inner": 2, "per_node": 2}, "strategy='lss_2d'"),
    "ring": ({"strategy": "ring"}, "strategy='ring'"),
    "ulysses": ({"strategy": "ulysses"}, "strategy='ulysses'"),
    "contiguous": ({"order": "contiguous"}, "order='contiguous'"),
    "head_tail": ({"order": "head_tail"}, "order='head_tail'"),
    "balanced": ({"order": "balanced"}, "order='balanced'"),
    "causal": ({"causal": True}, "causal=True"),
    "not causal": ({"causal": False}, "causal=False"),
    "window": ({"window": 5}, "window=5"),
    "documents": ({"cu_seqlens": EDGES}, "cu_seqlens"),
    "prefix": ({"prefix": 3}, "prefix=3"),
    "attention_mask": ({"keep": [[(2, 21)]]}, "attention_mask"),
    "cross-attention": ({"kv": (19, "cut", "cut", None), "causal": False}, "kv_seg"),
    "mask_mod": ({"mask_mod": "checkerboard"}, "mask_mod"),
    "softcap": ({"softcap": 2.0}, "softcap=2.0"),
    "alibi_slopes": ({"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]}, "alibi_slopes"),
    "sinks": ({"sinks": [0.5, -1.0, 2.0, 0.0]}, "sinks"),
    "dropout_p": ({"dropout_p": 0.4, "seed": 5}, "dropout_p=0.4"),
    "head_chunks": ({"head_chunks": 2}, "head_chunks=2"),
    "token_chunks": ({"token_chunks": 3}, "token_chunks=3"),
    "regather=False": ({"regather": False}, "regather=False"),
    "sdpa_cpu": ({"kernel": "sdpa_cpu"}, "kernel='sdpa_cpu'"),
    "flash4": ({"kernel": "flash4"}, "kernel='flash4'"),
    "sdpa_cudnn": ({"kernel": "sdpa_cudnn"}, "kernel='sdpa_cudnn'"),
    "sdpa_flash": ({"kernel": "sdpa_flash"}, "kernel='sdpa_flash'"),
    "flex": ({"kernel": "flex"}, "kernel='flex'"),
    "tiled": ({"kernel": "tiled"}, "kernel='tiled'"),
    "reference": ({"kernel": "reference"}, "kernel='reference'"),
}  # fmt: skip
CUDA = {"flash4", "sdpa_cudnn", "sdpa_flash", "flex"}


def both_on(a, b):
    """The options of two features together."""
    options = {"order": "contiguous"} | ON[a][0] | ON[b][0]
    if "cross-attention" in (a, b):
        other = b if a == "cross-attention" else a
        options["causal"] = other == "causal"
        if other == "documents":
            options["kv"] = (19, "cut", "cut", [0, 1, 6, 8, 19])
        if other == "attention_mask":
            options["keep"] = [[(2, 15)]]
    return options


@pytest.mark.parametrize("a, b", [pair for pair in pairs() if "tp" not in pair])
def test_every_pair_is_exact_or_refused_by_both_names(a, b):
    cp = 4 if "lss_2d" in (a, b) else CP  # two groups of two, on two nodes
    outcomes = pool(cp).outcomes(attention_case, cp, S=26, N=4, K=2, H=8, B=1, **both_on(a, b))
    reason = why_refused(a, b)
    for ok, result in outcomes:
        if reason is None and not {a, b} & CUDA:
            assert ok, result[2]
            assert max(result[0]) <= 1e-12
            continue
        assert not ok, "neither exact nor refused"
        assert result[0] == "Refused", result[2]
        if reason is None:  # kernels of another device, whose pairs tests/gpu computes
            assert "CUDA" in result[1]
        else:
            assert reason in result[1]
            assert ON[a][1] in result[1]
            assert ON[b][1] in result[1]


# the same features in a whole model under strategy "tp", which has no attention call of its own
IN_A_MODEL = {
    "contiguous": {"order": "contiguous"},
    "head_tail": {"order": "head_tail"},
    "balanced": {"order": "balanced"},
    "causal": {},
    "not causal": {"model": {"kind": "encoder"}},
    "window": {"model": {"windows": (5,)}},
    "documents": {"given": {"cu_seqlens": torch.tensor([0, 4, 5, 17, 24], dtype=torch.int32)}, "rows": 1},
    "prefix": {"given": {"prefix": 3}},
    "attention_mask": {"given": {"attention_mask": torch.arange(24)[None] < torch.tensor([[24], [13]])}},
    "cross-attention": {"model": {"kind": "encoder_decoder"}},
    "mask_mod": {"given": {"mask_mod": checkerboard}},
    "softcap": {"model": {"softcap": 2.0}},
    "alibi_slopes": {"model": {"positions": "alibi"}},
    "sinks": {"model": {"sinks": True}},
    "dropout_p": {"model": {"attention_dropout": 0.4}},
    "head_chunks": {"head_chunks": 2},
    "token_chunks": {"token_chunks": 3},
    "regather=False": {"regather": False},
    "sdpa_cpu": {"kernel": "sdpa_cpu"},
    "tiled": {"kernel": "tiled"},
    "reference": {"kernel": "reference"},
}


@pytest.mark.parametrize("feature", [b for a, b in pairs() if a == "tp" and b in IN_A_MODEL])
def test_every_feature_under_tensor_parallelism_is_exact_or_refused(feature):
    options = {"strategy": "tp"} | IN_A_MODEL[feature]
    reason = why_refused("tp", feature)
    for ok, result in pool(2).outcomes(parity_case, 2, **options):
        if reason is None:
            assert ok, result[2]
            assert max(result[x] for x in ("gradient", "loss", "logits", "norm", "clipped")) <= 1e-12
        else:
            assert not ok
            assert result[0] == "Refused", result[2]
            assert reason in result[1]
            assert "strategy='tp'" in result[1]


def test_the_pairs_of_this_file_are_all_there_are():
    assert ON.keys() == FEATURES.keys() - {"tp"}
    # what is left out under tp: kernels of another device
    assert {b for a, b in pairs() if a == "tp"} - IN_A_MODEL.keys() == CUDA


def test_the_docs_hold_the_table_as_the_code_has_it():
    page = (ROOT / "docs" / "masks.md").read_text()
    assert page.split("<!-- table -->\n")[1].split("\n<!-- end of table -->")[0].strip() == support_table()
