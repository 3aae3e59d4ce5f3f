"""Attention over a sequence that is cut over ranks: the table of algorithms and the one call in front of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator, communicator, cp_communicator
from lss.config.errors import refuse
from lss.config.sections import nearest
from lss.config.support import refuse_pairs
from lss.context_parallel.checks import check_rules, check_shapes
from lss.context_parallel.loss import cross_entropy, linear_cross_entropy
from lss.context_parallel.lss import lss_attention
from lss.context_parallel.ring import ring_attention
from lss.context_parallel.scan import causal_conv, cut_conv, cut_scan, scan
from lss.context_parallel.sharding import kv_segment_for, make_segment, segment_for, shard, unshard
from lss.context_parallel.spec import AttentionSpec
from lss.context_parallel.two_level import two_level_attention
from lss.context_parallel.ulysses import ulysses_attention
from lss.kernels import MaskMod, Rules, keep_rows, make_work, pick_kernel
from lss.kernels.outside import outside_graphs
from lss.segment import Segment, plan_fetch

__all__ = [
    "STRATEGIES",
    "AttentionOptions",
    "AttentionSpec",
    "attend",
    "attention",
    "causal_conv",
    "cross_entropy",
    "cut_conv",
    "cut_scan",
    "linear_cross_entropy",
    "make_segment",
    "make_spec",
    "scan",
    "shard",
    "unshard",
]

Strategy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, AttentionSpec], torch.Tensor]
# The one table of algorithms. All take (q, k, v, sinks, spec) and return this rank's outputs.
STRATEGIES: dict[str, Strategy] = {
    "lss": lss_attention,
    "lss_2d": two_level_attention,
    "ring": ring_attention,
    "ulysses": ulysses_attention,
}

# A gather of this many bytes keeps a link busy; smaller head chunks pay latency instead.
_BYTES_PER_HEAD_CHUNK = 1 << 30
# What a kernel's backward may hold in float32 beside its gradients before heads are taken in turn.
_BYTES_OF_KERNEL = 1 << 31
# Keys and values of a layer that a GPU keeps for backward by default: above, attention takes longer than their gather.
_BYTES_KEPT = 128 << 20


@outside_graphs
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mesh: DeviceMesh,
    order: str = "head_tail",
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    head_chunks: int | str = "auto",
    regather: bool | str = "auto",
    strategy: str = "lss",
    inner: int | str = "auto",
    kernel: str = "auto",
    transport: str = "auto",
    dkv_dtype: str = "auto",
    token_chunks: int | str = "auto",
    seq_len: int | None = None,
    seg: Segment | None = None,
    kv_seg: Segment | None = None,
    kv_seq_len: int | None = None,
    prefix: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
    mask_mod: MaskMod | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    samples: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact attention over a sequence that is cut over the mesh's "cp" axis; differentiable.

        s_ij = scale q_i . k_j, soft-capped, minus alibi_slopes[head] |i - j|
        out_i = sum over visible j of dropout(softmax(s_i)_j) v_j,  i: this rank's tokens,  j: all tokens

    Args:
        q: (B, T, N, H), this rank's queries, cut by `lss.shard`; float64, float32, bfloat16 or float16.
        k, v: (B, T, K, H), N a multiple of K.
        mesh: from `lss.init_mesh`.
        order: the order the tensors were cut in.
        causal: a query sees keys at its own position and before.
        window: a query sees keys with 0 <= i - j < window (both sides when not causal), its own included.
        cu_seqlens: int32, global borders of packed documents, 0 first and the true S last; batch 1. Documents do not see
            each other.
        scale: factor on the scores; 1 / sqrt(H) by default.
        dropout_p: probability with which an element of the softmax is dropped; `seed` is then needed, and folds the
            run's seed, the step and the layer. The bit is a hash of (seed, sample, head, i, j): the same for any cut.
        head_chunks: how many groups of key heads are gathered one after another ("lss" and "lss_2d"); "auto" keeps a
            gather near 1 GiB, and a kernel's own sums in float32 near 2 GiB. More chunks, less memory.
            Under "lss_2d" a rank's share of the key heads is cut, into single ones at most.
        token_chunks: for "lss", in how many runs the tokens of every segment are gathered, one after another, so that the
            gathered K and V need not fit. "auto" keeps a gather of one key head near 1 GiB, and is 1 where a rank fetches
            only what its queries see. More than 1 travel by collectives.
        regather: whether backward gathers K and V again instead of keeping them from forward. "auto" keeps on a GPU the K
            and V of a layer that come to 128 MiB or less, where transfers are not hidden, and else gathers again.
        strategy: "lss", "lss_2d", "ring" or "ulysses".
        inner: for "lss_2d", how many neighbouring ranks share out the heads of their tokens; it divides cp. "auto" is
            the largest divisor of the cp ranks of one node that is no more than the key heads. Every rank of the mesh
            takes part in making the groups, at the first call that needs them.
        kernel: "auto", "sdpa" or a name of `lss.kernels.KERNELS`.
        transport: how "lss" moves keys and their gradients: "collective" (all-gather and reduce-scatter of NCCL or gloo) or
            "symmetric" (ranks of one host write into one another's memory, beside the attention that computes; on the CPU
            shared memory); "auto" is symmetric on GPUs that reach one another's memory, else collective.
        dkv_dtype: what dK and dV of half precision travel in: "float32", or "inputs", the dtype of k and v, half the bytes.
            "auto" is "inputs" on GPUs with symmetric transport where no two calls of a rank's kernel add to one key's
            gradient in it (all sums are then the owner's, in float32), else "float32".
        seq_len: the true S where `lss.shard` had to pad.
        seg: the segment to compute by, instead of `order`, `seq_len` and `cu_seqlens`; with `make_segment(S, None)` the
            queries are whole on every rank.
        kv_seg: the segment of the keys where they are another sequence's (cross-attention; causal=False). One made with
            `make_segment(S_kv, None)` says that k and v are whole on every rank. Document d of the queries then sees
            document d of the keys.
        kv_seq_len: instead of `kv_seg`, the true length of another sequence that is cut in `order`.
        prefix: the first `prefix` tokens of the sequence (of each document) see each other as if not causal; or an
            integer tensor, one number for each document or for each row.
        attention_mask: (B, S), the same on every rank; 0 or False is padding, which is seen by nobody and sees nothing. In
            cross-attention (B, S_kv), for the keys.
        mask_mod: (b, h, i, j) -> bool tensor, as for torch's flex_attention, with global i and j; what it and all other
            masks allow is seen. Tiles of scores that it empties are not computed.
        softcap: c > 0 makes scores c tanh(s / c).
        alibi_slopes: (N,) or sequence of N.
        sinks: (N,), a logit that takes part in each head's softmax and has value 0; may require a gradient, which is this
            rank's share of a sum over ranks.
        samples: (B,) int64, the rows' numbers in the global batch, which key dropout; by default those of a batch that the
            dp ranks share in order.

    Returns:
        (B, T, N, H) in q's dtype: the outputs of this rank's queries; 0 at padding and where nothing is seen.

    Collectives: see the strategy's own function; "lss" issues one all-gather of K and V in forward and one
    reduce-scatter of dK and dV in backward, 2*B*S*K*H elements each, and one more all-gather with `regather`; with a
    window or documents all-to-alls of only what is seen in their place. On several nodes an all-gather or reduce-scatter
    is two, across nodes and inside (`lss.comm.hierarchical`).

    Raises:
        Refused: anything that would not be computed exactly, in a sentence that names it.
    """
    check_shapes(q, k, v)
    comm = cp_communicator(mesh)
    segment = segment_for(q, comm, order, seq_len, seg, cu_seqlens)
    kv_segment = kv_segment_for(k, comm, segment, order, kv_seg, kv_seq_len)
    if dropout_p and samples is None:
        first = communicator(mesh, ("dp",)).rank * q.shape[0]
        samples = first + torch.arange(q.shape[0], device=q.device)
    keep = None if attention_mask is None else keep_rows(attention_mask)
    rules = Rules(
        causal, window, scale, prefix if isinstance(prefix, int) else tuple(torch.as_tensor(prefix).tolist()), keep,
        softcap, None if alibi_slopes is None else torch.as_tensor(alibi_slopes, device=q.device), mask_mod,
        None if sinks is None else torch.as_tensor(sinks, device=q.device), dropout_p, seed, samples,
    )  # fmt: skip
    check_rules(rules, q, segment, kv_segment, attention_mask)
    options = AttentionOptions(strategy, head_chunks, regather, kernel, transport, dkv_dtype, inner, token_chunks)
    return attend(q, k, v, rules, segment=segment, kv_segment=kv_segment, comm=comm, options=options)


@dataclass(frozen=True)
class AttentionOptions:
    """How attention is computed, by the names and with the meanings of `attention`, and recurrences; not what comes out."""

    strategy: str = "lss"
    head_chunks: int | str = "auto"
    regather: bool | str = "auto"
    kernel: str = "auto"
    transport: str = "auto"
    dkv_dtype: str = "auto"
    inner: int | str = "auto"
    token_chunks: int | str = "auto"
    scan_kernel: str = "auto"

    def features(self) -> dict[str, str]:
        """The features of `lss.config.support` that these are, each with its setting and value."""
        active = {self.strategy: f"strategy={self.strategy!r}"}
        if isinstance(self.head_chunks, int) and self.head_chunks > 1:
            active["head_chunks"] = f"head_chunks={self.head_chunks}"
        if isinstance(self.token_chunks, int) and self.token_chunks > 1:
            active["token_chunks"] = f"token_chunks={self.token_chunks}"
        if self.regather is False:
            active["regather=False"] = "regather=False"
        if self.kernel not in ("auto", "sdpa", "traced"):
            active[self.kernel] = f"kernel={self.kernel!r}"
        return active


@outside_graphs
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: Rules,
    *,
    segment: Segment,
    comm: Communicator,
    options: AttentionOptions,
    kv_segment: Segment | None = None,
) -> torch.Tensor:
    """`attention` where rules, segments and group are known: decide what is left open and run the strategy."""
    strategy = pick_strategy(options.strategy)
    spec = make_spec(q, k, rules, segment=segment, comm=comm, options=options, kv_segment=kv_segment)
    return strategy(q, k, v, rules.sinks, spec)


def make_spec(
    q: torch.Tensor,
    k: torch.Tensor,
    rules: Rules,
    *,
    segment: Segment,
    comm: Communicator,
    options: AttentionOptions,
    kv_segment: Segment | None = None,
) -> AttentionSpec:
    """Everything that is decided about one call of `attend` before its algorithm runs, or a refusal."""
    features = {} if kv_segment is None else {"cross-attention": f"kv_seg of {kv_segment.seq_len} tokens"}
    features |= rules.features()
    if segment.cp > 1:
        features[segment.order] = f"order={segment.order!r}"
    if segment.edges:
        features["documents"] = f"cu_seqlens of {len(segment.edges) - 1} documents"
    refuse_pairs(features | options.features())
    keys = kv_segment or segment
    # the masks of the whole sequence, which every rank plans by
    work = make_work(pick_kernel(options.kernel, q, features), rules, segment, keys, q, kv_segment is not None)
    inner = count_inner(options.inner, options.strategy, k.shape[2], comm.size, comm.per_node)
    gathering = keys.cp > 1 and plan_fetch(segment, keys, tuple(mask for _, mask in work.masks)) is None
    token_chunks = count_token_chunks(options.token_chunks, options.strategy, k, keys.cp, gathering)
    if token_chunks > 1 and options.transport == "symmetric":
        fit = f"token_chunks={token_chunks} travel by collectives; use 'auto' or 'collective'"
        raise refuse("transport", options.transport, fit)
    return AttentionSpec(
        segment=segment,
        keys=keys,
        comm=comm,
        work=work,
        transport=options.transport,
        dkv_dtype=options.dkv_dtype,
        head_chunks=count_head_chunks(options.head_chunks, options.strategy, k, keys.cp, inner, q.shape[2]),
        regather=pick_regather(options.regather, k, keys.cp),
        inner=inner,
        token_chunks=token_chunks,
    )


def pick_strategy(name: str) -> Strategy:
    """The algorithm of this name, or a refusal that says what there is."""
    if name == "tp":
        fit = "tensor parallelism cuts a whole model; use lss.parallelize(model, mesh, strategy='tp')"
        raise refuse("strategy", name, fit)
    if name not in STRATEGIES:
        raise refuse("strategy", name, f"unknown; use one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def count_head_chunks(
    wanted: int | str, strategy: str, k_BTKH: torch.Tensor, cp: int, inner: int = 1, n_heads: int | None = None
) -> int:
    """Resolve `head_chunks`: "auto" or a whole number from 1 to K.

    "auto" keeps the gathered K and V of a chunk near 1 GiB and, where the number N of query heads is told, what fused
    kernels sum in half precision's backward (dQ in float32, and dK and dV where several query heads share a key head)
    near 2 GiB.
    """
    B, T, K, H = k_BTKH.shape
    gathers = strategy in ("lss", "lss_2d")
    if wanted == "auto":
        gathered = 2 * B * T * cp * -(-K // inner) * H * k_BTKH.element_size() if cp > inner else 0
        shared = 0 if n_heads in (None, K) else 2 * cp * K
        summed = 4 * B * T * H * ((n_heads or 0) + shared) // inner if k_BTKH.element_size() == 2 else 0
        wanted_most = max(gathered // _BYTES_PER_HEAD_CHUNK, summed // _BYTES_OF_KERNEL)
        return min(K, max(1, wanted_most)) if gathers else 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= K:
        raise refuse("head_chunks", wanted, f"there are {K} key heads; use 'auto' or 1 to {K}")
    if not gathers and wanted != 1:
        fit = f"only strategies 'lss' and 'lss_2d' gather by head chunks; with {strategy!r} use 'auto' or 1"
        raise refuse("head_chunks", wanted, fit)
    return wanted


def pick_regather(wanted: bool | str, k_BTKH: torch.Tensor, cp: int, *, on_gpu: bool | None = None) -> bool:
    """Resolve `regather`: "auto", True or False.

    "auto" keeps what is small, on GPUs: there attention is over before its transfers are, so that a gather less shows in
    time (5 to 10 % of it at 8,192 tokens on two H100s). On a CPU memory comes first at any length.

    Args:
        on_gpu: whether it is for one; by default whether the tensor is on one.
    """
    if wanted == "auto":
        B, T, K, H = k_BTKH.shape
        small = 2 * B * T * cp * K * H * k_BTKH.element_size() <= _BYTES_KEPT
        return not (small and (k_BTKH.is_cuda if on_gpu is None else on_gpu))
    if not isinstance(wanted, bool):
        raise refuse("regather", wanted, "use 'auto', True or False")
    return wanted


def count_token_chunks(wanted: int | str, strategy: str, k_BTKH: torch.Tensor, cp: int, gathering: bool) -> int:
    """Resolve `token_chunks`: "auto", or a whole number from 1 to T.

    "auto" cuts what head chunks cannot: the gathered K and V of a single head, where all are gathered.
    """
    B, T, _, H = k_BTKH.shape
    if wanted == "auto":
        one_head = 2 * B * T * cp * H * k_BTKH.element_size()
        return min(T, max(1, one_head // _BYTES_PER_HEAD_CHUNK)) if strategy == "lss" and gathering else 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= max(T, 1):
        raise refuse("token_chunks", wanted, f"a segment has {T} tokens; use 'auto' or 1 to {T}")
    if strategy != "lss" and wanted != 1:
        fit = f"only strategy 'lss' gathers by token chunks; with {strategy!r} use 'auto' or 1"
        raise refuse("token_chunks", wanted, fit)
    return wanted


def count_inner(wanted: int | str, strategy: str, n_kv_heads: int, cp: int, per_node: int) -> int:
    """Resolve `inner`: "auto", or a number of ranks that divides cp. 1 but for strategy "lss_2d".

    "auto" stays on one node, where links are fastest, and has a key head or more for each rank, since key heads that
    several ranks use would be sent to each.
    """
    if wanted == "auto":
        fitting = [n for n in range(1, min(per_node, n_kv_heads) + 1) if per_node % n == 0]
        return max(fitting) if strategy == "lss_2d" else 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1 or cp % wanted:
        near = nearest(cp, wanted if isinstance(wanted, int) else 1)
        raise refuse("inner", wanted, f"it must divide the cp={cp} ranks; {near}, or 'auto'")
    if strategy != "lss_2d" and wanted != 1:
        raise refuse("inner", wanted, f"only strategy 'lss_2d' has groups of ranks; with {strategy!r} use 'auto' or 1")
    return wanted
