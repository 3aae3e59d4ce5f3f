"""The check of a transformers model of the user's own: loss, every gradient and leak probes, one rank against N.

The one-process side is the model as transformers runs it, with its own attention, on whole batches; its loss is taken from
its logits in the model's dtype, since transformers' own rounds to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from lss.check.parity import CHECK_LEN, CheckResult, LengthResult, relative_errors, saved_bytes
from lss.check.probes import Probe
from lss.comm import Communicator, communicator, count_collectives
from lss.config import Config
from lss.config.errors import refuse
from lss.integrations.hf.mixers import is_mixer
from lss.integrations.hf.source import open_source
from lss.mesh import axis_group
from lss.parallel import parallelize
from lss.parallel.hf import HFLayout
from lss.segment import Segment

# Many models compute norms, positions or routers in float32 whatever the dtype, so that float64 is held to no less.
BOUND = 2e-6
# Of a mixer that carries a state: transformers adds up decays, and their gradients over all tokens, in float32 in any dtype.
MIXER_BOUND = 1e-5
# Largest change of a logit, of the largest logit, that is rounding: experts take other batches when tokens change.
ROUNDING = {"float64": 1e-6, "float32": 1e-4}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def check_hf(source: str, config: Config, mesh: DeviceMesh) -> CheckResult:
    """Compare one step of a transformers model, at one length that divides over the ranks and one that does not.

    Every rank must call; every rank gets the same verdict. The first rank computes the one-process side.

    Args:
        source: as `open_source` takes it. Dropout is set to 0.
        config: `parallel`, `data.seq_len`, `train.dtype` ("float64" or "float32") and `train.seed` are read; with
            `data.path`, a text that the model's own tokenizer makes tokens of, else tokens are drawn.
    """
    if config.train.dtype not in DTYPES:
        raise refuse("train.dtype", config.train.dtype, "rounding would hide what is looked for; use float64 or float32")
    parts = 2 * mesh["cp"].size()
    longest = max(min(config.data.seq_len, CHECK_LEN * mesh["cp"].size()) // parts * parts, parts)
    lengths = dict.fromkeys((longest, max(longest - 3, 1)))
    results = [_check_length(source, config, mesh, seq_len) for seq_len in lengths]
    first = mesh.get_rank() == 0
    ok = torch.tensor(float(not first or all(result.ok for result in results)), device=mesh.device_type)
    ok = Communicator(axis_group(mesh, ("dp", "cp"))).broadcast(ok, "verdict").wait()
    return CheckResult(bool(ok.item()), results if first else [])


def _check_length(source: str, config: Config, mesh: DeviceMesh, seq_len: int) -> LengthResult:
    make = _maker(source, config, mesh.device_type)
    plain, parallel = make(), config.parallel
    model = parallelize(
        make(), mesh, strategy=parallel.strategy, inner=parallel.inner, order=parallel.order,
        head_chunks=parallel.head_chunks, regather=parallel.regather, kernel=parallel.kernel,
        transport=parallel.transport, dkv_dtype=parallel.dkv_dtype, token_chunks=parallel.token_chunks, fsdp=parallel.fsdp,
    ).eval()  # fmt: skip
    layout: Any = getattr(model, "parallel", None)
    assert isinstance(layout, HFLayout)
    ids, labels = _tokens(source, config, plain.config, seq_len, mesh)
    place = communicator(mesh, ("dp",)).rank
    mine = {"input_ids": ids[2 * place : 2 * place + 2], "labels": labels[2 * place : 2 * place + 2]}
    given = {}
    if "position_ids" in layout.traits.parameters and layout.traits.own_positions:
        given["position_ids"] = torch.arange(seq_len, device=ids.device)[None] + plain.config.pad_token_id + 1
    with count_collectives() as counter, saved_bytes(model) as saved:
        loss = model(**mine, **given).loss
        loss.backward()
    gradients = {name: _grad(p) for name, p in model.named_parameters()}
    segment = layout.segment(seq_len)
    probes = _probes(model, layout, segment, mine["input_ids"], given, config.train.dtype)
    shifts = layout.traits.shifts
    counted_one = int((labels[:, 1:] != -100).sum() if shifts else (labels != -100).sum())
    cut = layout.adapter.cut(model, (), {**mine, **given})[1]["lss_batch"].labels
    counted = int(layout.all.all_reduce((cut != -100).sum(), "labels").wait())
    if mesh.get_rank() != 0:
        value = float(loss.detach())
        return LengthResult(seq_len, segment.local_len, value, value, 1.0, {}, [], 0, 0, counted, counted_one, probes=probes)
    with saved_bytes(plain) as saved_one:
        logits = plain(input_ids=ids, **given, **({"use_cache": False} if shifts else {})).logits
        targets = F.pad(labels[:, 1:], (0, 1), value=-100) if shifts else labels
        loss_one = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        aux = layout.traits.aux_coef if layout.traits.router else None
        if aux is not None:
            loss_one = loss_one + aux * plain(input_ids=ids, **given, use_cache=False).aux_loss
        loss_one.backward()
    expected = {name: _grad(p) for name, p in plain.named_parameters()}
    mixers = tuple(f"{path}." for path, module in plain.named_modules() if is_mixer(module))
    errors = {
        name: (error, MIXER_BOUND if name.startswith(mixers) else BOUND)
        for name, error in relative_errors(gradients, expected).items()
    }
    return LengthResult(
        seq_len, segment.local_len, float(loss.detach()), float(loss_one.detach()), BOUND, errors, counter.rows(),
        saved.bytes, saved_one.bytes, counted, counted_one, probes=probes,
    )  # fmt: skip


def _maker(source: str, config: Config, device: str) -> Callable[[], Any]:
    """A function that loads the model, set to transformers' own attention of the plainest kind that it has."""

    def make() -> Any:
        built = open_source(source, "--hf").build(dtype=DTYPES[config.train.dtype], seed=config.train.seed)
        model = built.to(device).eval()
        text = model.config.get_text_config()
        # sdpa drops soft-caps without a word; eager rounds its softmax to float32, so that it is second choice
        capped = getattr(text, "attn_logit_softcapping", None)
        plain = "sdpa" if getattr(model, "_supports_sdpa", False) and not capped else "eager"
        model.set_attn_implementation(plain)
        # grouped products of experts take half precision only
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        return model

    return make


def _tokens(
    source: str, config: Config, hf: Any, seq_len: int, mesh: DeviceMesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows a dp rank, of drawn tokens or of a text, with labels masked: more in some rows than in others."""
    rows, device = 2 * config.parallel.dp, mesh.device_type
    vocabulary = hf.get_text_config().vocab_size
    if config.data.path:
        ids = _text_tokens(source, config.data.path, rows * seq_len)
    else:
        draw = torch.Generator().manual_seed(config.train.seed)
        ids = torch.randint(min(4, vocabulary - 1), vocabulary, (rows * seq_len,), generator=draw)
    ids = ids.view(rows, seq_len).to(device)
    border = seq_len * (3 + torch.arange(rows, device=device)) // (6 + rows)
    return ids, ids.masked_fill(torch.arange(seq_len, device=device) < border[:, None], -100)


def _text_tokens(source: str, path: str, count: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(20 * count)
    except OSError as error:
        raise refuse("data.path", path, f"it cannot be read as one text file ({error.strerror})") from None
    try:
        ids = AutoTokenizer.from_pretrained(source, trust_remote_code=False)(text)["input_ids"]
    except (OSError, ValueError, ImportError):
        raise refuse("data.path", path, f"{source} has no tokenizer to read it with; leave it out") from None
    if len(ids) < count:
        raise refuse("data.path", path, f"it has {len(ids)} tokens, and {count} are needed")
    return torch.tensor(ids[:count])


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _probes(
    model: Any, layout: HFLayout, segment: Segment, ids: torch.Tensor, given: dict[str, torch.Tensor], dtype: str
) -> list[Probe]:
    """Change tokens that must not matter somewhere, and count the tokens whose logits change there beyond rounding."""
    S = segment.seq_len
    if S < 3:
        return []
    late, places = S - max(S // 3, 1), segment.positions.to(ids.device)
    half = S // 2
    other = torch.where(ids > 4, ids - 1, ids + 1)
    borders = torch.tensor([0, half, S], dtype=torch.int32)
    mask = (torch.arange(S, device=ids.device) < late).expand(len(ids), -1)
    trials: list[tuple[str, dict[str, Any], slice, Callable[[torch.Tensor], torch.Tensor]]] = []
    if layout._causal:
        trials.append((f"future: {late}..{S - 1} changed", {}, slice(late, S), lambda at: at >= late))
    trials += [
        (f"documents: {half}..{S - 1} changed", {"cu_seqlens": borders}, slice(half, S), lambda at: at >= half),
        (f"attention_mask: {late}..{S - 1} padded and changed", {"attention_mask": mask}, slice(late, S),
         lambda at: at >= late),
    ]  # fmt: skip
    probes = []
    for name, more, changed, may in trials:
        rows = ids[:1] if "cu_seqlens" in more else ids
        new = rows.clone()
        new[:, changed] = other[: len(rows), changed]
        with torch.no_grad():
            before = model(input_ids=rows, **given, **more).logits
            after = model(input_ids=new, **given, **more).logits
        differ = (after - before).abs().amax(-1) > ROUNDING[dtype] * before.abs().max()
        true, allowed = places < S, may(places)
        watched = true & ~allowed
        counts = torch.stack([(differ & watched).sum(), watched.sum() * len(rows), (differ & allowed & true).sum()])
        probes.append(Probe(name, *layout.all.all_reduce(counts, "probe").wait().tolist()))
    return probes

