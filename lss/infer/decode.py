"""One token's attention to keys that lie on all ranks: each rank's part, then one small gather.

    out_r, lse_r = attention of q to the keys of rank r
    lse = logsumexp over r of lse_r;   out = sum over r of exp(lse_r - lse) out_r
"""

from __future__ import annotations

import torch

from lss.comm import Communicator
from lss.infer.cache import SegmentedCache
from lss.kernels import Rules, pick_kernel
from lss.kernels.blocks import add_sinks_
from lss.kernels.merge import lse_dtype, merge_all, no_keys_yet

PURPOSE = "decode"


def attend_cached(
    q_B1NH: torch.Tensor,
    k_B1KH: torch.Tensor,
    v_B1KH: torch.Tensor,
    rules: Rules,
    *,
    cache: SegmentedCache,
    layer: int,
    comm: Communicator,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attention of the sequence's last token, (B, 1, N, H), the same on every rank; its own key and value are kept.

    Args:
        q_B1NH, k_B1KH, v_B1KH: of that token, whole and equal on every rank.

    Collectives: one all-gather of cp B N (H + 1) numbers in float32 (float64 for float64).
    """
    cache.append(layer, k_B1KH, v_B1KH)
    keys, values, places = cache.visible(layer, rules.window)
    out, lse = attend_part(q_B1NH, keys, values, places, cache.length - 1, rules, kernel)
    part = torch.cat((out.to(lse.dtype), lse.transpose(1, 2).unsqueeze(-1)), -1)
    parts_RB1NH = comm.all_gather(part, 0, PURPOSE).wait().unflatten(0, (comm.size, -1))
    out, lse = merge_all(parts_RB1NH[..., :-1], parts_RB1NH[..., -1].transpose(2, 3))
    add_sinks_(out, lse, rules.sinks)
    return out.to(q_B1NH.dtype)


def attend_part(
    q_B1NH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    places_T: torch.Tensor,
    place: int,
    rules: Rules,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B, 1, N, H), lse (B, N, 1)) of a query at `place` on keys that it sees all; 0 and -inf where there are none.

    What changes scores is computed in plain torch, since the keys' places need not follow one another.
    """
    scale = q_B1NH.shape[-1] ** -0.5 if rules.scale is None else rules.scale
    if rules.scores() is None:
        # no mask is left: what is not seen has been cut away
        return pick_kernel(kernel, q_B1NH).forward(q_B1NH, k_BTKH, v_BTKH, causal=False, scale=scale)
    if not len(places_T):
        return torch.zeros_like(q_B1NH), no_keys_yet(q_B1NH)
    dtype, groups = lse_dtype(q_B1NH), k_BTKH.shape[2]
    q_BKGH = q_B1NH[:, 0].unflatten(1, (groups, -1)).to(dtype)
    s_BKGT = torch.einsum("bkgh,btkh->bkgt", q_BKGH, k_BTKH.to(dtype)) * scale
    if rules.softcap:
        s_BKGT = rules.softcap * (s_BKGT / rules.softcap).tanh()
    if rules.slopes is not None:
        slopes_KG1 = rules.slopes.to(dtype).unflatten(0, (groups, -1)).unsqueeze(-1)
        s_BKGT = s_BKGT - slopes_KG1 * (place - places_T).to(dtype)
    lse_BKG = s_BKGT.logsumexp(-1)
    out_BKGH = torch.einsum("bkgt,btkh->bkgh", (s_BKGT - lse_BKG.unsqueeze(-1)).exp(), v_BTKH.to(dtype))
    return out_BKGH.flatten(1, 2).unsqueeze(1).to(q_B1NH.dtype), lse_BKG.flatten(1, 2).unsqueeze(-1)
