"""Megatron-core: tensor parallelism with sequence parallelism, from its local layers. The rival of the LSS paper.

Each layer gathers and scatters the whole sequence around attention and around the MLP: four collectives forward and four
backward, where a rank holds its share of the heads and of the weights. "local" is Megatron's own core attention, which
materialises the scores, S x S for every local head (the setting of 2022, and the paper's): 2 N / world S^2 bytes in
bfloat16 for the scores alone, several times that at the peak. "cudnn" and "flash-attn-4" put a fused kernel in the same
place of the same layer, which Transformer Engine would otherwise do.

Outside the spec nothing is replaced. The norm is given through the spec, since Megatron's torch norm refuses sequence
parallelism and its fused one needs Apex: torch's RMSNorm, its weights marked so that Megatron sums their gradients over
the ranks. Every layer is recomputed in backward, bfloat16 weights have float32 masters in Megatron's optimizer.

Communication overlaps with matrix products only where CUDA_DEVICE_MAX_CONNECTIONS=1 is set before CUDA starts. It slows
everything that needs two streams, so run this rival in a process of its own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent))
import _rival_kernels as kernels
import _rival_model as parts

NAME = "Megatron-core TP+SP"


def version() -> str | None:
    """megatron-core's."""
    return kernels.installed("megatron-core")


def why_not() -> str | None:
    """One sentence, or None."""
    if version() is None:
        return "The package megatron-core is not installed."
    if not torch.cuda.is_available():
        return "Megatron-core places its buffers on CUDA devices; there is none here."
    return kernels.cannot_import("megatron.core.models.gpt")


def train(config: dict, group, rank: int, world: int, device) -> list[tuple[str, Callable[[], float]]]:
    """One entry per core attention. A model is built at the first step of its entry and goes with the entry."""
    shape = parts.shape_of(config)
    cores: dict[str, kernels.Kernel | None] = {"local": None, **kernels.local_kernels()}
    make = partial(_Step, shape, world, torch.device(device))
    return [(f"tp-sp/{name}", parts.Lazy(partial(make, core), _forget)) for name, core in cores.items()]


def _forget() -> None:
    """Free the buffer of scores and gathered inputs that Megatron keeps between steps."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.get_global_memory_buffer().buffer.clear()


class _Step:
    """A model, its optimizer, and one step of them at each call."""

    def __init__(self, shape: parts.Shape, world: int, device: torch.device, core: kernels.Kernel | None) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=world, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        self.shape, self.device, self.tokens = shape, device, parts.Tokens(shape, device)
        self.positions = torch.arange(shape.seq_len, device=device).unsqueeze(0)
        config = _config(shape, world)
        buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
        self.model = DistributedDataParallel(config, buffers, _gpt(shape, config, core).to(device))
        self.model.train()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=parts.LR, adam_beta1=parts.BETAS[0], adam_beta2=parts.BETAS[1], bf16=True,
                weight_decay=parts.WEIGHT_DECAY, params_dtype=torch.bfloat16, clip_grad=parts.CLIP,
            ),
            [self.model], use_gloo_process_groups=False,
        )  # fmt: skip

    def __call__(self) -> float:
        from megatron.core.distributed import finalize_model_grads

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        ids, labels = self.tokens()
        loss = self.model(ids, self.positions, None, labels=labels).float().mean()
        self.optimizer.scale_loss(loss).backward()
        finalize_model_grads([self.model])
        done, *_ = self.optimizer.step()
        if not done:
            raise RuntimeError("Megatron's optimizer refused the step: gradients are not finite")
        return loss.item()


def _config(shape: parts.Shape, world: int):
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=shape.n_layers, hidden_size=shape.d_model, ffn_hidden_size=shape.d_mlp,
        num_attention_heads=shape.n_heads, num_query_groups=shape.n_kv_heads, kv_channels=shape.head_size,
        normalization="RMSNorm", layernorm_epsilon=1e-5, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16,
        tensor_model_parallel_size=world, sequence_parallel=world > 1, recompute_granularity="full",
        recompute_method="uniform", recompute_num_layers=1, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, bias_activation_fusion=True, bias_dropout_fusion=True,
    )  # fmt: skip


def _gpt(shape: parts.Shape, config, core: kernels.Kernel | None):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _Norm
    if core is not None:
        layer.submodules.self_attention.submodules.core_attention = partial(_CoreAttention, core)
    return GPTModel(
        config=config, vocab_size=shape.vocab_size, max_sequence_length=shape.seq_len,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * shape.n_layers, layer_norm=_Norm),
        share_embeddings_and_output_weights=shape.tie_embeddings, position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
    )  # fmt: skip


class _Norm(torch.nn.RMSNorm):
    """torch's RMSNorm on this rank's tokens; the mark makes Megatron sum its gradient over the ranks."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_options) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class _CoreAttention(torch.nn.Module):
    """A fused kernel in the place of Megatron's core attention: (S, B, n, H) of the local heads to (S, B, n H)."""

    def __init__(self, kernel: kernels.Kernel, config, **_options) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, query, key, value, attention_mask=None, *_args, **_options):
        out = self.kernel(*(x.transpose(0, 1) for x in (query, key, value)))
        return out.transpose(0, 1).flatten(2).contiguous()
