"""The one page where the parts meet: what `lss.parallelize` does to a model, in the order it is done."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lss.comm import Communicator, communicator, cp_communicator
from lss.config import ModelConfig
from lss.config.errors import Refused, refuse
from lss.config.hybrid import refuse_misfit_layers
from lss.config.support import refuse_pairs
from lss.context_parallel import AttentionOptions, attend, count_inner, cut_conv, cut_scan, pick_strategy
from lss.context_parallel.loss import global_linear_cross_entropy
from lss.context_parallel.sharding import refuse_packed_rows, shard, unshard
from lss.integrations.hf import is_hf_model
from lss.mesh import moved, ranks_per_node
from lss.model import ModelOps, Transformer
from lss.offload import Offloader, make_offloader
from lss.parallel import tensor_parallel as tp
from lss.parallel.activation import agree_on_room, make_pieces, softmax_of, stack_of
from lss.parallel.grad_sync import GradSync, global_grad_norm
from lss.parallel.hf import lay_out_hf
from lss.parallel.local import check_reshard
from lss.segment import Piece, Segment, make_segment, whole_piece

if TYPE_CHECKING:
    from lss.parallel.fsdp import Sharding

POSITION_TABLE = "position_table.weight"


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    strategy: str = "lss",
    inner: int | str = "auto",
    order: str = "head_tail",
    head_chunks: int | str = "auto",
    token_chunks: int | str = "auto",
    regather: bool | str = "auto",
    fsdp: bool = False,
    fsdp_reshard: bool | str = "auto",
    checkpointing: str | None = None,
    offload: str | None = None,
    offload_gib: float | str = "auto",
    offload_path: str = "",
    kernel: str = "auto",
    scan_kernel: str = "auto",
    transport: str = "auto",
    dkv_dtype: str = "auto",
    precut: bool = False,
    packed: bool = False,
    tiles: int | str = "auto",
    compile: bool = False,
) -> nn.Module:
    """Lay a model out over the mesh, in place; returns the same module object, parameter names unchanged.

    Afterwards `model(input_ids, labels)` takes the *whole* batch, the same on every rank of a cp group and another on
    each dp rank, and cuts it. `.loss` is the mean over all counted labels of all ranks, equal on every rank; `.logits`
    are those of this rank's tokens (`lss.unshard` puts them together). After `backward()` every `.grad` is the gradient
    of that global loss. For accumulation run all micro-batches but the last under `with model.no_sync():` and give each
    the step's global count as `num_items_in_batch`. Make the optimizer afterwards: a learned position table and, with
    strategy "tp" or `fsdp`, the weights are cut, and each rank holds and updates its part only.

    Args:
        model: an `lss.model.Transformer`, or a model of Hugging Face transformers (docs/huggingface.md), on the mesh's
            device. The first rank's weights are copied to all ranks.
        mesh: from `lss.init_mesh`.
        strategy: "lss", "lss_2d", "ring", "ulysses" or "tp" (Megatron tensor + sequence parallelism on the cp axis).
        inner, order, head_chunks, token_chunks, regather, kernel, transport, dkv_dtype: as in `lss.attention`.
        scan_kernel: of layers that scan, as in `lss.scan`.
        checkpointing: None or "none" keeps activations, "full" keeps each block's input and computes it again, "attention"
            keeps the attention's output and lse too and computes only the linear parts again, never the attention.
        precut: the model is given segments, (B, T) token ids (and source ids) with `positions`, `shift_labels` and the
            whole sequence's `seq_len` (and `source_len`), instead of whole batches. `cu_seqlens` and masks stay whole.
        packed: sequences will come with `cu_seqlens`: a learned position table, whose rows every document reads from the
            first, is then held whole by every rank. A batch with `cu_seqlens` and a table that is cut is refused.
        tiles: tokens at a time in the loss and, where they are computed again, in projections and MLP; "auto" bounds
            the widest tensor.
        compile: what stands between attentions is compiled by torch.compile, once for all layers.
        offload: where what checkpointing keeps goes until backward: None or "none" stays on the device, "host" is pinned
            host memory, "disk" host memory and disk where that is full. What finds no room stays on the device.
        offload_gib: host memory of this rank for it, in GiB; "auto": its share of half of what is free.
        offload_path: the folder for "disk"; the system's temporary folder by default.
        fsdp: parameters, gradients and optimizer state are sharded over all ranks, if there are several; parameters are
            DTensors then (`lss.parallel.fsdp`). Gradients are summed into shares after every micro-batch, under `no_sync`
            too, which would otherwise keep them whole. Not with strategy "tp".
        fsdp_reshard: whether blocks give their gathered weights back between forward and backward; "auto": all but the last.

    Raises:
        Refused: an option or a model that would not be laid out exactly.
    """
    options = AttentionOptions(strategy, head_chunks, regather, kernel, transport, dkv_dtype, inner, token_chunks,
                               scan_kernel)  # fmt: skip
    if is_hf_model(model):
        others = {"offload": (offload or "none", "none"), "tiles": (tiles, "auto"), "compile": (compile, False),
                  "scan_kernel": (scan_kernel, "auto")}  # fmt: skip
        return lay_out_hf(model, mesh, order, options, checkpointing=checkpointing, precut=precut, others=others,
                          fsdp_reshard=fsdp_reshard if fsdp else None)  # fmt: skip
    if not isinstance(model, Transformer):
        fit = "lss.model.Transformer and models of transformers are laid out; in a model of your own call lss.shard, "
        raise refuse("model", type(model).__name__, f"{fit}lss.attention, lss.cross_entropy and lss.sum_gradients")
    check_reshard(fsdp_reshard)
    if fsdp and strategy == "tp":
        raise refuse("fsdp", fsdp, "strategy='tp' cuts the weights over the ranks already; use False, or strategy 'lss'")
    if hasattr(model, "parallel"):
        raise Refused("This model has been parallelized already; make a new one for another layout.")
    if compile:
        _refuse_compile(model, strategy)
    width = None if strategy == "tp" else model.config.d_mlp
    device, local = torch.device(mesh.device_type), ranks_per_node(mesh)
    offloader = make_offloader(offload, device, gib=offload_gib, folder=offload_path, local_ranks=local)
    if offloader is not None and offload == "host" and offload_gib == "auto":
        agree_on_room(offloader, mesh)
    how = {"tiles": tiles, "width": width, "compiling": compile, "offloader": offloader}
    pieces = make_pieces(checkpointing, **how, stack=stack_of(model.config, strategy, regather))
    loss = partial(global_linear_cross_entropy, tiles=tiles, softmax=softmax_of(pieces))
    ops = ModelOps(pieces=pieces, loss=loss)
    layout = Layout(model, mesh, order, options, ops, precut, packed, fsdp_reshard if fsdp else None)
    layout.offloader = offloader
    # plain attributes: they hold no parameters, and are no modules
    object.__setattr__(model, "parallel", layout)
    object.__setattr__(model, "no_sync", layout.no_sync)
    # first of all hooks: inputs are cut, and refused, before any weights are gathered
    model.register_forward_pre_hook(layout.prepare_inputs, with_kwargs=True, prepend=True)
    return model


def _refuse_compile(model: Transformer, strategy: str) -> None:
    """Refuse what would be compiled anew in every step, or not at all."""
    if model.config.dropout:
        fit = f"model.dropout={model.config.dropout} draws by another key in every step, each compiled anew; use dropout 0"
        raise refuse("compile", True, fit)
    if strategy == "tp":
        raise refuse("compile", True, "strategy='tp' has collectives inside of what is compiled; use False")


class Layout:
    """How a model lies on the mesh: groups, cut parameters, and what its forward needs to know of them.

    Attributes:
        offloader: what keeps activations away from the device, and counts them; None where they stay.
    """

    offloader: Offloader | None = None

    def __init__(
        self,
        model: Transformer,
        mesh: DeviceMesh,
        order: str,
        options: AttentionOptions,
        ops: ModelOps,
        precut: bool,
        packed: bool,
        fsdp_reshard: bool | str | None = None,
    ) -> None:
        self.mesh, self.strategy, self.order, self.options, self.precut = mesh, options.strategy, order, options, precut
        strategy = options.strategy
        self._config, self._targets, self._refuse_misfits = model.config, model.targets, model.refuse_misfits
        self.cp = cp_communicator(mesh)
        self.dp, self.all = communicator(mesh, ("dp",)), communicator(mesh, ("dp", "cp"))
        self._ops = replace(ops, loss=partial(ops.loss, comm=self.all), position_rows=_rows_of_whole)
        self._seq_len = model.seq_len
        self.segment(1)  # refuses an unknown order
        both = {"cross-attention": 'model.kind="encoder_decoder"'} if self._config.kind == "encoder_decoder" else {}
        refuse_pairs(options.features() | both)
        refuse_misfit_layers(model.config, strategy=strategy, prefix=0, plain=ModelConfig())
        if strategy != "tp":
            pick_strategy(strategy)
        # refuses a number that does not fit, and makes its groups while all ranks are here
        self.cp.levels(count_inner(options.inner, strategy, self._config.n_kv_heads, self.cp.size, self.cp.per_node))
        for tensor in (*model.parameters(), *model.buffers()):
            self.all.broadcast(tensor.data, "initial weights").wait()
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}  # before any is cut
        self._tp_cuts = tp.cut_weights(model, self.cp) if strategy == "tp" and self.cp.size > 1 else {}
        self._rows: Segment | None = None
        if model.position_table is not None and self.cp.size > 1 and not packed:
            self._rows = self.segment(model.seq_len)
            model.position_table.weight = nn.Parameter(self.part(POSITION_TABLE, model.position_table.weight.data))
        self._cut = [p for name, p in model.named_parameters() if self.is_cut(name)]
        self.sharding: Sharding | None = None
        if fsdp_reshard is not None and self.all.size > 1:
            from lss.parallel.fsdp import Sharding

            self.sharding = Sharding(model, mesh, self.all, reshard=fsdp_reshard, ignored=self._cut)
        held = [p for name, p in model.named_parameters() if not self.is_cut(name)]
        self._whole, self._sharded = (held, []) if self.sharding is None else ([], held)
        self._sync = GradSync(((self._whole, self.all), (self._cut, self.dp)))

    def stand_for(self, before: int, layer_bytes: int) -> None:
        """In a trace do as with a longer sequence: take `before` tokens at a time before attention, and bring layers back
        from the host when those of so many bytes would come."""
        self._ops.pieces.stand_for(before)
        if self.offloader is not None:
            early, late = layer_bytes <= self.offloader.early_bytes, layer_bytes <= self.offloader.late_bytes
            self.offloader.early_bytes, self.offloader.late_bytes = early * sys.maxsize, late * sys.maxsize

    # -- forward -----------------------------------------------------------------------------------------------------

    def segment(self, seq_len: int, cu_seqlens: torch.Tensor | None = None) -> Segment:
        """This rank's segment of a sequence of this length, packed from documents or one."""
        return make_segment(
            seq_len, cp=self.cp.size, rank=self.cp.rank, order=self.order, cu_seqlens=cu_seqlens,
            causal=self._config.kind != "encoder", window=self._config.widest_window,
        )  # fmt: skip

    def source_segment(self, source_len: int) -> Segment:
        """This rank's segment of an encoder-decoder's source."""
        order = "contiguous" if self.order == "balanced" else self.order
        return make_segment(source_len, cp=self.cp.size, rank=self.cp.rank, order=order)

    def prepare_inputs(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Cut a whole batch (unless it comes cut) and hand the model the operations of this layout."""
        if self.sharding is not None:
            self.sharding.give_back()
        inputs = dict(zip(("input_ids", "labels"), args, strict=False)) | kwargs
        ids, borders = inputs.pop("input_ids"), inputs.pop("cu_seqlens", None)
        given = {name: inputs[name] for name in ("prefix", "attention_mask", "source_ids", "source_mask") if name in inputs}
        lengths = (inputs.get("seq_len"), inputs.get("source_len")) if self.precut else (None, None)
        self._refuse_misfits(ids, borders, **given, lengths=lengths)
        if self.precut:
            segment = self._precut_segment(ids, borders, inputs)
        else:
            segment = self.segment(ids.shape[1], borders)
            inputs = self._cut_inputs(ids, inputs, segment)
            ids = shard(ids, self.mesh, seg=segment, pad_value=0)
        self._check_positions(segment)
        refuse_packed_rows(segment, ids.shape[0])
        source = self._source(inputs, ids.device)
        inputs["places"] = moved(segment.positions, ids.device)
        if inputs.get("samples") is None:
            inputs["samples"] = self.dp.rank * ids.shape[0] + torch.arange(ids.shape[0], device=ids.device)
        return (ids,), inputs | {"ops": self.ops(segment, source)}

    def _source(self, inputs: dict[str, Any], device: torch.device) -> Segment | None:
        """Cut an encoder-decoder's source, in place; returns its segment."""
        ids, length = inputs.get("source_ids"), inputs.pop("source_len", None)
        if ids is None:
            return None
        segment = self.source_segment((length or ids.shape[1] * self.cp.size) if self.precut else ids.shape[1])
        if not self.precut:
            inputs["source_ids"] = shard(ids, self.mesh, seg=segment, pad_value=0)
            if inputs.get("source_positions") is not None:
                where = inputs["source_positions"]
                inputs["source_positions"] = shard(where, self.mesh, dim=0, seg=segment, pad_value=0)
        elif segment.local_len != ids.shape[1]:
            fit = f"a segment of {segment.seq_len} tokens has {segment.local_len}"
            raise refuse("source_ids", tuple(ids.shape), fit)
        if self._config.positions == "learned" and segment.seq_len > self._seq_len:
            raise refuse("source_ids", f"{segment.seq_len} tokens", f"the position table has {self._seq_len} rows")
        inputs["source_places"] = moved(segment.positions, device)
        return segment

    def _check_positions(self, segment: Segment) -> None:
        longest = max(b - a for a, b in pairwise(segment.documents))
        if self._config.positions == "learned" and longest > self._seq_len:
            raise refuse("input_ids", f"{longest} tokens", f"the position table has {self._seq_len} rows")
        if self._rows is None:
            return
        if segment.edges:
            fit = "every document reads a learned position table from its first row, and this one is cut over the ranks; "
            raise refuse("cu_seqlens", f"{len(segment.edges) - 1} documents", f"{fit}give parallelize packed=True")
        if segment.seq_len != self._seq_len:
            raise refuse("input_ids", f"{segment.seq_len} tokens", "the learned position table is cut for sequences of "
                         f"{self._seq_len}; give that length, or use positions='rope'")  # fmt: skip

    def _precut_segment(self, ids: torch.Tensor, borders: torch.Tensor | None, inputs: dict[str, Any]) -> Segment:
        if inputs.get("labels") is not None:
            raise Refused("labels: a segment's last label lies in the next one; give shift_labels, shifted before the cut.")
        if inputs.get("positions") is None:
            raise Refused("positions: a segment does not know its place; give its global positions.")
        segment = self.segment(inputs.pop("seq_len", None) or ids.shape[1] * self.cp.size, borders)
        if segment.local_len != ids.shape[1]:
            raise refuse("input_ids", tuple(ids.shape), f"a segment of {segment.seq_len} tokens has {segment.local_len}")
        return segment

    def _cut_inputs(self, ids: torch.Tensor, inputs: dict[str, Any], segment: Segment) -> dict[str, Any]:
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        if labels is not None and shifted is None:
            shifted = self._targets(labels, segment.documents)
        if shifted is not None:
            if shifted.shape != ids.shape:
                raise refuse("labels", tuple(shifted.shape), f"give one a token, {tuple(ids.shape)}")
            inputs["shift_labels"] = shard(shifted, self.mesh, seg=segment)
        if inputs.get("positions") is not None:
            inputs["positions"] = shard(inputs["positions"], self.mesh, dim=0, seg=segment, pad_value=0)
        else:
            inputs["positions"] = moved(segment.document_positions, ids.device)
        return inputs

    def ops(self, segment: Segment, source: Segment | None = None) -> ModelOps:
        """The model's operations for sequences cut like this one."""
        ops = self._ops
        if self._rows is not None:
            ops = replace(ops, position_rows=_local_rows)
        if self.strategy == "tp":
            return replace(
                ops,
                attention=partial(
                    tp.whole_sequence_attention, segment=segment, comm=self.cp, kernel=self.options.kernel
                ),
                positions=lambda positions: tp.gathered_positions(segment).to(positions.device),
                enter=partial(tp.enter, comm=self.cp),
                leave=partial(tp.leave, comm=self.cp),
            )
        attention = partial(attend, comm=self.cp, options=self.options)
        cut = {"segment": segment, "comm": self.cp}
        scan, conv = partial(cut_scan, **cut, kernel=self.options.scan_kernel), partial(cut_conv, **cut)
        ops = replace(ops, attention=partial(attention, segment=segment), scan=scan, conv=conv)
        if source is None:
            return ops
        cross = partial(attention, segment=segment, kv_segment=source)
        return replace(ops, source_attention=partial(attention, segment=source), cross_attention=cross)

    # -- parameters --------------------------------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager[None]:
        """Let gradients accumulate: for every micro-batch of a step but the last. Sharded ones are summed all the same."""
        return self._sync.no_sync()

    def is_cut(self, name: str) -> bool:
        """Whether each rank of the cp axis holds only its part of this parameter."""
        return name in self._tp_cuts or (name == POSITION_TABLE and self._rows is not None)

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter (or of its gradient or optimizer state), given whole; a DTensor under FSDP."""
        if name in self._tp_cuts:
            return whole.chunk(self.cp.size, self._tp_cuts[name])[self.cp.rank].clone()
        if name == POSITION_TABLE and self._rows is not None:
            return shard(whole, self.mesh, dim=0, seg=self._rows)
        return whole if self.sharding is None else self.sharding.part(whole)

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The inverse of `part`, on every rank: padding rows cut off. Collectives: one all-gather where cut or sharded."""
        if name in self._tp_cuts:
            return self.cp.all_gather(part, self._tp_cuts[name], "parameters").wait().contiguous()
        if name == POSITION_TABLE and self._rows is not None:
            return unshard(part.detach(), self.mesh, dim=0, seg=self._rows).contiguous()
        return part if self.sharding is None else self.sharding.whole(part)

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter of the plain model."""
        return self._shapes[name]

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Which boxes of a whole parameter lie where in this rank's part; padding rows are in none."""
        whole = whole_piece(self._shapes[name])
        if name in self._tp_cuts:
            dim, at, size = self._tp_cuts[name], list(whole.at), list(whole.size)
            size[dim] //= self.cp.size
            at[dim] = self.cp.rank * size[dim]
            return (Piece(tuple(at), tuple(size), whole.local),)
        if name == POSITION_TABLE and self._rows is not None:
            return tuple(Piece((start, 0), (stop - start, whole.size[1]), (local, 0))
                         for local, _, start, stop in self._rows.local_runs)  # fmt: skip
        return (whole,) if self.sharding is None else self.sharding.pieces(whole.size)

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks that hold the same part of a parameter as this one, itself included."""
        names = self.mesh.mesh_dim_names or ()
        ranks = self.mesh.mesh.movedim(names.index("cp"), -1).reshape(-1, self.cp.size)
        if self.is_cut(name):
            return tuple(ranks[:, self.cp.rank].tolist())
        everyone = tuple(ranks.flatten().tolist())
        return everyone if self.sharding is None else (everyone[self.all.rank],)

    def grad_norm(self) -> torch.Tensor:
        """Norm of the whole gradient, equal to one process's; float64."""
        return global_grad_norm(((self._whole, Communicator()), (self._cut, self.cp), (self._sharded, self.all)))


def _local_rows(table_TD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    assert len(table_TD) == len(positions_T)
    return table_TD


def _rows_of_whole(table_SD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Rows of a table that this rank holds whole; those of padding, which may lie beyond it, reach nobody."""
    return table_SD[positions_T.clamp(max=len(table_SD) - 1)]
