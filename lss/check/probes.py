"""Leak probes: change tokens that must not matter somewhere, and count the logits that change there all the same.

Two forward passes of the laid-out model are compared bit by bit. Each probe also counts the logits that were *allowed*
to change: a probe under which nothing changes at all has shown nothing, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator
from lss.config import Config
from lss.config.hybrid import attention_layers, scans
from lss.data.reader import Batch
from lss.mesh import axis_group
from lss.segment import Segment, make_segment
from lss.segment.documents import area_before
from lss.train.models import build_model
from lss.train.steps import autocast, model_inputs


@dataclass(frozen=True)
class Probe:
    """One probe's outcome, over all ranks: tokens whose logits changed where none may, and where they may."""

    name: str
    leaked: int
    checked: int
    affected: int

    @property
    def ok(self) -> bool:
        """Nothing leaked, something was looked at, and the change did matter to somebody."""
        return self.leaked == 0 and self.checked > 0 and self.affected > 0


# every kind of probe, in one order: data-parallel ranks hold other documents, and must still talk in step
KINDS = ("documents", "window", "future", "padding", "attention_mask")
# (what was changed, change of the batch's inputs in place, places (T,) -> which may change)
Trial = tuple[str, Callable[[dict[str, Any]], None], Callable[[torch.Tensor], torch.Tensor]]


def leak_probes(config: Config, mesh: DeviceMesh, batch: Batch) -> list[Probe]:
    """Every probe that this config's masks give rise to, on one batch. Every rank must call.

    Collectives: those of two forward passes and one all-reduce of a few numbers for each probe.
    """
    assert batch.segment is not None
    model = build_model(config, mesh)
    model.eval()
    segment, everyone = batch.segment, Communicator(axis_group(mesh, ("dp", "cp")))
    device = torch.device(mesh.device_type)
    places = segment.positions.to(device)
    true = places < segment.seq_len
    inputs = model_inputs(batch, config, device)
    inputs.pop("shift_labels")  # a loss would be summed over data-parallel ranks, whose trials differ

    def logits(change: Callable[[dict[str, Any]], None], masked: bool) -> torch.Tensor:
        mine = {**inputs, "input_ids": inputs["input_ids"].clone()}
        if masked:
            mine["attention_mask"] = _masked(segment, len(batch.tokens))
        change(mine)
        with torch.no_grad(), autocast(config.train.dtype, device.type):
            return model(**mine).logits

    unchanged = cache(lambda masked: logits(lambda _: None, masked))

    def compare(change: Callable[[dict[str, Any]], None], may: Callable, masked: bool) -> torch.Tensor:
        """Of this rank's tokens: how many changed that may not, how many may not, how many changed that may."""
        changed = (unchanged(masked) != logits(change, masked)).any(-1)
        allowed = may(places) & true
        watched = true & ~allowed
        return torch.stack([(changed & watched).sum(), watched.sum() * len(changed), (changed & allowed).sum()])

    probes, trials = [], _trials(config, batch, places)
    # what one rank tries all ranks compute, since under FSDP a pass of one needs the weights of all
    tried = torch.tensor([kind in trials for kind in KINDS], dtype=torch.int64, device=device)
    tried = everyone.all_reduce(tried, "probe").wait().tolist()
    for kind, trying in zip(KINDS, tried, strict=True):
        counts, what = torch.zeros(3, dtype=torch.int64, device=device), ""
        if kind in trials:
            what, change, may = trials[kind]
            counts = compare(change, may, masked=kind == "attention_mask")
        elif trying:
            compare(lambda _: None, _between(0, 0), masked=kind == "attention_mask")
        leaked, checked, affected = everyone.all_reduce(counts, "probe").wait().tolist()
        if kind == "padding":  # nobody's: that there was some, and that it was changed, is all that can be shown
            affected = checked
        if checked:
            probes.append(Probe(f"{kind}: {what}" if what else kind, leaked, checked, affected))
    return probes


def _masked(segment: Segment, rows: int) -> torch.Tensor:
    """A padding mask whose last third is padding."""
    mask = torch.ones(rows, segment.seq_len, dtype=torch.bool)
    mask[:, -max(segment.seq_len // 3, 1) :] = False
    return mask


def _trials(config: Config, batch: Batch, places: torch.Tensor) -> dict[str, Trial]:
    """What can be tried on this config and batch, by kind."""
    segment, kind, prefix = batch.segment, config.model.kind, config.data.prefix
    assert segment is not None
    S, trials = segment.seq_len, {}
    late = S - max(S // 3, 1)

    def other_bytes(first: int, end: int) -> Callable[[dict[str, Any]], None]:
        def change(inputs: dict[str, Any]) -> None:
            ids = inputs["input_ids"]
            inside = (places >= first) & (places < end)
            ids[:, inside] = (ids[:, inside] + 1) % 256

        return change

    if len(segment.documents) > 2:
        first, end = _middle_document(segment)
        trials["documents"] = (f"{first}..{end - 1} changed", other_bytes(first, end), _between(first, end))
    reach = _reach(config)
    if reach is not None and reach < S - 1:
        at = S // 3 if kind == "decoder" else S // 2
        behind = 0 if kind == "decoder" and not prefix else reach
        trials["window"] = (f"token {at} changed", other_bytes(at, at + 1), _between(at - behind, at + reach + 1))
    # tokens of a prefix see each other, so that a prefix that reaches beyond `late` is changed from its beginning
    begins = max(edge for edge in segment.documents if edge <= late)
    first = begins if prefix and late < begins + prefix else late
    if kind != "encoder" and first > 0:
        trials["future"] = (f"{late}..{S - 1} changed", other_bytes(late, S), _between(first, S))
    if segment.padded_len > S:
        trials["padding"] = ("", other_bytes(S, segment.padded_len), _between(S, S))
    if kind == "encoder":
        trials["attention_mask"] = (f"{late}..{S - 1} padded and changed", other_bytes(late, S), _between(late, S))
    return trials


def _between(first: int, end: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda places: (places >= first) & (places < end)


def _middle_document(segment: Segment) -> tuple[int, int]:
    """A document in the middle of a packed sequence, of more than one token where there is one."""
    documents = list(zip(segment.documents, segment.documents[1:], strict=False))
    longer = [d for d in documents[:-1] if d[1] - d[0] > 1] or documents
    return longer[len(longer) // 2]


def _reach(config: Config) -> int | None:
    """How far a token's influence goes through all layers' windows; None where one sees everything or carries a state."""
    windows = [config.model.window_of(layer) for layer in range(config.model.n_layers)]
    if config.model.kind == "encoder_decoder" or None in windows or scans(config.model):
        return None
    return sum(window - 1 for window in windows if window is not None)


def work_ratios(config: Config, borders: Sequence[torch.Tensor | None]) -> dict[str, float]:
    """max/mean attention scores of a rank over the config's sequences with these documents, by order.

    Counted over all layers, for the order that the config asks for first, then for those it could ask for.
    """
    orders = dict.fromkeys((config.parallel.order, "balanced", "head_tail", "contiguous"))
    return {order: _work_ratio(config, borders, order) for order in orders}


def _work_ratio(config: Config, borders: Sequence[torch.Tensor | None], order: str) -> float:
    cp, S, model = config.parallel.cp, config.data.seq_len, config.model
    assert isinstance(cp, int)
    causal = model.kind != "encoder"
    worst, mean = 0.0, 0.0
    for cu_seqlens in borders:
        loads = np.zeros(cp)
        first = make_segment(
            S, cp=cp, rank=0, order=order, cu_seqlens=cu_seqlens, causal=causal, window=model.widest_window
        )
        for rank in range(cp):
            segment = first.peer(rank)
            spans = np.array([(start, stop) for _, _, start, stop in segment.local_runs], np.int64).reshape(-1, 2)
            for layer in attention_layers(model):
                areas = area_before(segment.documents, spans, causal, model.window_of(layer))
                loads[rank] += (areas[:, 1] - areas[:, 0]).sum()
        worst, mean = worst + loads.max(), mean + loads.mean()
    return float(worst / max(mean, 1.0))


def with_length(config: Config, seq_len: int) -> Config:
    """The same config for another sequence length; a prefix that would fill it is shortened."""
    prefix = min(config.data.prefix, max(seq_len // 2, 0)) if config.data.prefix else 0
    return replace(config, data=replace(config.data, seq_len=seq_len, prefix=prefix))
