"""Generation with a prompt that is cut over ranks, and keys and values that stay where they were made.

The prompt is read as training reads a sequence: each rank computes its segment, with LSS attention. Its keys and values
stay there. Each new token is then computed by every rank, but for attention: a rank computes that to its own keys, and the
parts are merged by their log-sum-exp, with one small all-gather a layer. The new token's own key and value go to the rank
that holds fewest. Layers that scan have a state and a few last tokens instead, which every rank holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator, cp_communicator
from lss.config.errors import refuse
from lss.context_parallel import AttentionOptions, attend, shard
from lss.infer.cache import SegmentedCache
from lss.infer.decode import attend_cached
from lss.infer.passes import LayerOps, Passes, passes_of
from lss.infer.sampling import Sampling, sample
from lss.infer.states import StateCache
from lss.segment import Segment, make_segment

Seen = Callable[[torch.Tensor, torch.Tensor], None]


class Decoder:
    """A model with the keys and values of a sequence so far.

    Args:
        passes: of a model that is whole on every rank.
        comm: the ranks that share the sequence.
        order: in which the prompt is cut.
        options: how attention of the prompt is computed.
        most: how many tokens may follow the prompt.
    """

    def __init__(
        self, passes: Passes, mesh: DeviceMesh, comm: Communicator, order: str, options: AttentionOptions, most: int
    ) -> None:
        self._passes, self._mesh, self._comm, self._options, self._most = passes, mesh, comm, options, most
        self._segment_of = partial(make_segment, cp=comm.size, rank=comm.rank, order=order)
        self.cache: SegmentedCache | None = None
        self.states: StateCache | None = None

    def read(self, prompt_BS: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the prompt's last token, on every rank, which holds its segment's keys and values then.

        Collectives: those of LSS attention in each layer, or of `StateCache`'s reads, and one all-reduce of B V numbers.
        """
        segment = self._segment_of(prompt_BS.shape[1])
        cache = self.cache = SegmentedCache(segment, self._passes.layers, self._most, prompt_BS.device)
        states = self.states = StateCache(segment, self._comm, self._options.scan_kernel)

        def attention(q, k, v, rules, layer: int) -> torch.Tensor:
            cache.fill(layer, k, v)
            return attend(q, k, v, rules, segment=segment, comm=self._comm, options=self._options)

        ids = shard(prompt_BS, self._mesh, seg=segment, pad_value=0)
        # padding reaches nobody, and its own positions may lie beyond what the model has
        positions = segment.positions.masked_fill(segment.positions >= segment.seq_len, 0).to(prompt_BS.device)
        at = _local(segment, segment.seq_len - 1)
        layers = LayerOps(attention, states.read_scan, states.read_conv)
        logits = self._passes.run(ids, positions, layers, segment, at or 0)
        if at is None:
            logits = torch.zeros_like(logits)
        return self._comm.all_reduce(logits.contiguous(), "logits").wait()

    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the next token, which every rank is given alike; its keys and values are kept on one of them.

        Collectives: one all-gather of cp B N (H + 1) numbers a layer that attends.
        """
        cache, states = self.cache, self.states
        assert cache is not None
        assert states is not None
        place = cache.advance()

        def attention(q, k, v, rules, layer: int) -> torch.Tensor:
            how = {"cache": cache, "layer": layer, "comm": self._comm, "kernel": self._options.kernel}
            return attend_cached(q, k, v, rules, **how)

        positions = torch.tensor([place], device=tokens_B.device)
        layers = LayerOps(attention, states.step_scan, states.step_conv)
        return self._passes.run(tokens_B[:, None], positions, layers, make_segment(1, cp=1, rank=0), 0)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_BS: torch.Tensor,
    mesh: DeviceMesh,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    order: str = "head_tail",
    options: AttentionOptions | None = None,
    end: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    seen: Seen = lambda tokens, logits: None,
) -> torch.Tensor:
    """Continue prompts of one length, token after token.

    Args:
        model: an `lss.model.Transformer` or a causal model of transformers, plain, whole and equal on every rank, on the
            mesh's device.
        prompt_BS: (B, S) int64, the same on every rank of a cp group; another on each dp rank.
        mesh: its "cp" axis shares the prompt and the cache.
        sampling: how tokens are drawn, by default with temperature 1.
        order: "head_tail" or "contiguous": how the prompt is cut.
        options: kernel, transport and the like; they change nothing in the result.
        end: generation stops when every row has had this token.
        autocast: the context of every pass.
        seen: called on every rank after each token with the tokens (B,) and the logits (B, V) that they were drawn from.

    Returns:
        (B, n) int64, n = max_new_tokens or less where `end` came; the same on every rank of a cp group.

    Collectives: those of `Decoder.read` once; for each token after the first those of `Decoder.step`; and one broadcast of
        B int64 a token, so that ranks whose roundings differ go on with the same text.
    Memory: a rank holds about 1/cp of the keys and values, and all states.

    Raises:
        Refused: ids that the model has not, an empty prompt, more tokens than it has positions for, or a model that cannot
            generate so.
    """
    sampling, comm = sampling or Sampling(), cp_communicator(mesh)
    passes = passes_of(model, comm)
    _refuse(passes, prompt_BS, max_new_tokens, order)
    decoder = Decoder(passes, mesh, comm, order, options or AttentionOptions(), max_new_tokens - 1)
    generator, was_training = sampling.generator(), model.training
    model.eval()
    found: list[torch.Tensor] = []
    ended = torch.zeros(len(prompt_BS), dtype=torch.bool, device=prompt_BS.device)
    with autocast():
        logits = decoder.read(prompt_BS)
        while True:
            tokens = torch.zeros(len(prompt_BS), dtype=torch.int64)
            if comm.rank == 0:
                tokens = sample(logits, sampling, generator)
            tokens = comm.broadcast(tokens.to(prompt_BS.device), "token").wait()
            found.append(tokens)
            seen(tokens, logits)
            if end is not None:
                ended |= tokens == end
            if len(found) == max_new_tokens or bool(ended.all()):
                break
            logits = decoder.step(tokens)
    model.train(was_training)
    return torch.stack(found, 1)


def _local(segment: Segment, place: int) -> int | None:
    """Where a token of the sequence stands on this rank; None where another one has it."""
    for local, _, start, stop in segment.local_runs:
        if start <= place < stop:
            return local + place - start
    return None


def _refuse(passes: Passes, prompt_BS: torch.Tensor, most: int, order: str) -> None:
    if prompt_BS.dim() != 2 or prompt_BS.shape[1] < 1 or prompt_BS.dtype != torch.int64:
        raise refuse("prompt", f"{tuple(prompt_BS.shape)} of {prompt_BS.dtype}", "give int64 ids (B, S), one token or more")
    if most < 1:
        raise refuse("max_new_tokens", most, "give a whole number, 1 or more")
    if order == "balanced":
        raise refuse("order", order, "it is for packed documents; use head_tail or contiguous")
    if int(prompt_BS.min()) < 0 or int(prompt_BS.max()) >= passes.vocab_size:
        fit = f"the model's ids are 0 to {passes.vocab_size - 1}"
        raise refuse("prompt", f"id {int(prompt_BS.max())}", fit)
    length = prompt_BS.shape[1] + most - 1  # the last token is not read again
    if passes.longest is not None and length > passes.longest:
        left = passes.longest - prompt_BS.shape[1] + 1
        fit = f"the model's position table has {passes.longest} rows and the prompt {prompt_BS.shape[1]} tokens"
        raise refuse("max_new_tokens", most, f"{fit}; use {left} or less" if left > 0 else f"{fit}; give a shorter prompt")
