"""Hugging Face transformers (Llama) under PyTorch's context_parallel: the whole training step a user gets today.

With gradient checkpointing (not reentrant), the loss over sequence chunks that are themselves checkpointed, cuDNN,
DistributedDataParallel over the ranks, fused AdamW. "autocast" keeps float32 weights and computes in bfloat16 under
autocast, as the Trainer's `bf16=True` does (its residual stream stays float32); "bf16" computes with bfloat16 weights
and gradients and keeps float32 masters in the optimizer.

The mask. transformers builds one from the positions where none is given: positions in head_tail order jump, jumps look
to it like packed documents, and the mask becomes a dense S x S tensor. It builds none for an attention function that has
no mask function registered under its name; so its own SDPA function is registered under another name. The mask then
arrives as None and `is_causal=True` reaches SDPA, which context_parallel has replaced by its ring.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

sys.path.append(str(Path(__file__).parent))
import _rival_kernels as kernels
import _rival_model as parts

NAME = "transformers + context_parallel"
ATTENTION = "sdpa_maskless"
CHUNK = 2048  # tokens whose logits exist at a time


def version() -> str | None:
    """transformers', with torch's."""
    found = kernels.installed("transformers")
    return None if found is None else f"{found} (torch {torch.__version__})"


def why_not() -> str | None:
    """One sentence, or None."""
    if version() is None:
        return "The package transformers is not installed."
    if not torch.cuda.is_available():
        return "PyTorch's context_parallel runs causal attention on CUDA devices only; there is none here."
    return kernels.cannot_import("transformers.models.llama") or kernels.cannot_import(
        "torch.distributed.tensor.experimental._attention"
    )


def train(config: dict, group, rank: int, world: int, device) -> list[tuple[str, Callable[[], float]]]:
    """Rotations x how bfloat16 is used. A model is built at the first step of its entry and goes with the entry."""
    shape = parts.shape_of(config)
    rotations = ("allgather", "alltoall") if world > 1 else ("local",)
    make = partial(_Step, shape, group, torch.device(device))
    return [
        (f"{rotation}/cudnn/{precision}", parts.Lazy(partial(make, rotation, precision)))
        for rotation in rotations
        for precision in ("autocast", "bf16")
    ]


class _Whole(torch.nn.Module):
    """Tokens to the sum of losses over this rank's labels, so that DistributedDataParallel sees one forward."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, wanted in zip(hidden.flatten(0, 1).split(CHUNK), labels.flatten().split(CHUNK), strict=True):
            total = total + checkpoint(self._loss, rows, wanted, use_reentrant=False)
        return total

    def _loss(self, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model.lm_head(rows).float(), wanted, reduction="sum")


class _Step:
    """A model, its optimizer, and one step of them at each call."""

    def __init__(self, shape: parts.Shape, group, device: torch.device, rotation: str, precision: str) -> None:
        self.shape, self.group, self.device, self.rotation, self.precision = shape, group, device, rotation, precision
        self.world = 1 if group is None else group.size()
        self.tokens = parts.Tokens(shape, device)
        torch.manual_seed(0)
        model = _llama(shape, device)
        self.masters = [p.detach().clone() for p in model.parameters()] if precision == "bf16" else []
        if self.masters:
            for weight in model.parameters():  # not `model.to`, which would round RoPE's frequencies too
                weight.data = weight.data.bfloat16()
        whole = _Whole(model).train()
        self.weights = list(whole.parameters())
        self.whole = whole if self.world == 1 else _replicated(whole, group)
        self.mesh = None if self.world == 1 else dist.device_mesh.DeviceMesh.from_group(group, device.type)
        self.optimizer = torch.optim.AdamW(
            self.masters or self.weights, lr=parts.LR, betas=parts.BETAS, weight_decay=parts.WEIGHT_DECAY, fused=True
        )

    def __call__(self) -> float:
        ids, labels = self.tokens()
        positions = torch.arange(self.shape.seq_len, device=self.device).unsqueeze(0)
        loss = self._in_context([ids, labels, positions])
        if self.masters:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = weight.grad.float()
            self.whole.zero_grad(set_to_none=True)
        torch.nn.utils.clip_grad_norm_(self.masters or self.weights, parts.CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        if self.world > 1:
            dist.all_reduce(loss, group=self.group)
        return loss.item() / self.shape.seq_len

    def _in_context(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Forward and backward inside context_parallel, which cuts the batch's tensors in place.

        A failure leaves the context the ordinary way and is raised after it: torch 2.11 undoes its replacement of SDPA
        only then, and what runs next in this process would otherwise meet it.
        """
        failure, loss = None, None
        with ExitStack() as stack:
            if self.mesh is not None:
                from torch.distributed.tensor.experimental import _attention as library

                library.set_rotate_method(self.rotation)
                library._cp_options.enable_load_balance = True
                cut = {"buffers": batch, "buffer_seq_dims": [1] * len(batch), "no_restore_buffers": set(batch)}
                stack.enter_context(library.context_parallel(self.mesh, **cut))
            try:
                loss = self._forward_backward(batch)
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        assert loss is not None
        return loss

    def _forward_backward(self, batch: list[torch.Tensor]) -> torch.Tensor:
        backend = SDPBackend.CUDNN_ATTENTION if self.device.type == "cuda" else SDPBackend.MATH
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "autocast")
        with sdpa_kernel(backend):  # backward too: it recomputes the layers
            with autocast:
                loss = self.whole(*batch)
            # DistributedDataParallel averages over ranks; the gradient wanted is that of the mean over all labels
            (loss * (self.world / self.shape.seq_len)).backward()
        return loss.detach()


def _replicated(whole: torch.nn.Module, group) -> torch.nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(whole, process_group=group, gradient_as_bucket_view=True)


def _llama(shape: parts.Shape, device: torch.device):
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register(ATTENTION, _sdpa)
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_size, max_position_embeddings=shape.seq_len, rms_norm_eps=1e-5,
        tie_word_embeddings=shape.tie_embeddings, attention_dropout=0.0, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, attn_implementation=ATTENTION,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _sdpa(module, query, key, value, attention_mask, **options):
    """transformers' own SDPA function; RoPE may have left queries and keys in float32 under autocast."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert attention_mask is None, "a dense mask would be refused by cuDNN and by the ring"
    options.pop("is_causal", None)
    return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, None, is_causal=True, **options)
