"""The one table of what goes with what: the refusals, the docs' table and its tests are all read from here.

Every pair of features that is not refused here is computed exactly, in any cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from lss.config.errors import Refused


@dataclass(frozen=True)
class Feature:
    """`group`: features of one group exclude each other where the group says so; `meaning` is for the docs."""

    group: str
    meaning: str


FEATURES: dict[str, Feature] = {
    "lss": Feature("strategy", "`strategy=\"lss\"`"),
    "lss_2d": Feature("strategy", "`strategy=\"lss_2d\"`, `inner=n`: heads shared out inside groups of n ranks"),
    "ring": Feature("strategy", "`strategy=\"ring\"`"),
    "ulysses": Feature("strategy", "`strategy=\"ulysses\"`"),
    "tp": Feature("strategy", "`strategy=\"tp\"`, of a whole model"),
    "contiguous": Feature("order", "`order=\"contiguous\"`"),
    "head_tail": Feature("order", "`order=\"head_tail\"`"),
    "balanced": Feature("order", "`order=\"balanced\"`, given as a segment"),
    "causal": Feature("causality", "`causal=True`"),
    "not causal": Feature("causality", "`causal=False`"),
    "window": Feature("window", "`window=w`"),
    "documents": Feature("documents", "`cu_seqlens`: packed documents"),
    "prefix": Feature("prefix", "`prefix=p`: the first p tokens see each other (prefix-LM)"),
    "attention_mask": Feature("attention_mask", "`attention_mask`: padding, a different amount in each row"),
    "cross-attention": Feature("cross-attention", "`kv_seg`: keys of another sequence, cut or whole"),
    "mask_mod": Feature("mask_mod", "`mask_mod`: any mask, as a function of batch row, head, query and key"),
    "softcap": Feature("softcap", "`softcap=c`: scores become c tanh(s / c)"),
    "alibi_slopes": Feature("alibi_slopes", "`alibi_slopes`: minus slope times distance, by head"),
    "sinks": Feature("sinks", "`sinks`: a learned logit a head that takes part in the softmax only"),
    "dropout_p": Feature("dropout_p", "`dropout_p`, `seed`: dropout of the attention probabilities"),
    "head_chunks": Feature("head_chunks", "`head_chunks` > 1"),
    "token_chunks": Feature("token_chunks", "`token_chunks` > 1"),
    "regather=False": Feature("regather", "`regather=False`"),
    "sdpa_cpu": Feature("kernel", "`kernel=\"sdpa_cpu\"`, torch's on the CPU"),
    "flash4": Feature("kernel", "`kernel=\"flash4\"`, flash-attn-4's on CUDA"),
    "sdpa_cudnn": Feature("kernel", "`kernel=\"sdpa_cudnn\"`, cuDNN's"),
    "sdpa_flash": Feature("kernel", "`kernel=\"sdpa_flash\"`, torch's on CUDA"),
    "flex": Feature("kernel", "`kernel=\"flex\"`, torch's FlexAttention on CUDA"),
    "tiled": Feature("kernel", "`kernel=\"tiled\"`, plain torch by tiles"),
    "reference": Feature("kernel", "`kernel=\"reference\"`, plain torch"),
}
# the choices of `kernel`, everywhere; the kernels themselves are in `lss.kernels.table`, in this order
KERNEL_CHOICES = ("auto", "sdpa", *(name for name, feature in FEATURES.items() if feature.group == "kernel"))
# the choices of `scan_kernel`; the kernels themselves are in `lss.kernels.scan_table`, in this order
SCAN_KERNEL_CHOICES = ("auto", "fla", "blocks")
_FUSED = ("sdpa_cpu", "sdpa_cudnn", "sdpa_flash")
_KERNEL = "torch's fused kernels do not compute it; use kernel 'auto' or 'tiled'"
_FLASH4 = "flash-attn-4 is not asked to compute it here; use kernel 'auto' or 'tiled'"
_PLACES = "the places of two sequences cannot be compared; leave one of them out"
_WHOLE = "only strategy 'lss' gathers keys of another sequence; use 'lss'"
_TOKEN_CHUNKS = "only strategy 'lss' gathers by token chunks; use 'auto' or 1"
_CHUNKS = "only strategies 'lss' and 'lss_2d' gather by head chunks; use 'auto' or 1"


def _pair(a: str, b: str) -> frozenset[str]:
    assert a in FEATURES, a
    assert b in FEATURES, b
    return frozenset((a, b))


# pair of features -> why it is refused and what would fit
REFUSED: dict[frozenset[str], str] = {
    **{_pair(k, f): _KERNEL for k in _FUSED for f in ("softcap", "alibi_slopes", "mask_mod", "dropout_p")},
    **{_pair("flash4", f): _FLASH4 for f in ("alibi_slopes", "mask_mod", "dropout_p")},
    _pair("flex", "dropout_p"): "FlexAttention changes scores, and drops nothing out of P; use kernel 'auto' or 'tiled'",
    _pair("sdpa_cudnn", "window"): "cuDNN has no sliding windows; use kernel 'auto'",
    **{_pair("cross-attention", f): _PLACES for f in ("causal", "window", "prefix", "alibi_slopes")},
    **{_pair("cross-attention", s): _WHOLE for s in ("lss_2d", "ring", "ulysses", "tp")},
    **{_pair("head_chunks", s): _CHUNKS for s in ("ring", "ulysses", "tp")},
    **{_pair("token_chunks", s): _TOKEN_CHUNKS for s in ("lss_2d", "ring", "ulysses", "tp")},
    _pair("token_chunks", "cross-attention"): "keys of another sequence are gathered at once; use 'auto' or 1",
    _pair("prefix", "not causal"): "every token sees all others already; use causal=True, or no prefix",
}


def why_refused(a: str, b: str) -> str | None:
    """Why these two features do not go together; None where they do."""
    return REFUSED.get(frozenset((a, b)))


def refuse_pairs(active: Mapping[str, str]) -> None:
    """Refuse the first pair of features that do not go together, naming both.

    Args:
        active: feature -> the setting and value that switched it on, "window=64" for one.
    """
    for a, b in combinations(active, 2):
        reason = why_refused(a, b)
        if reason is not None:
            raise Refused(f"{active[a]} with {active[b]}: {reason}.")


def lacking(kernel: str, features: Iterable[str]) -> str | None:
    """Why a kernel cannot be used with these features; None where it can."""
    for feature in features:
        reason = why_refused(kernel, feature)
        if reason is not None:
            return f"{feature}: {reason.split(';')[0]}"
    return None


def pairs() -> list[tuple[str, str]]:
    """Every pair of features that could be asked for together."""
    return [(a, b) for a, b in combinations(FEATURES, 2) if FEATURES[a].group != FEATURES[b].group]


def support_table() -> str:
    """The table as Markdown: what each feature is, then what it is refused with; all other pairs are exact."""
    lines = ["| feature | given by | refused with |", "|---|---|---|"]
    for name, feature in FEATURES.items():
        others = [b for b in FEATURES if why_refused(name, b)]
        lines.append(f"| {name} | {feature.meaning} | {', '.join(others) or 'nothing'} |")
    lines += ["", "| refused pair | why, and what would fit |", "|---|---|"]
    for pair, reason in REFUSED.items():
        a, b = sorted(pair, key=list(FEATURES).index)
        lines.append(f"| {a} with {b} | {reason} |")
    return "\n".join(lines)
