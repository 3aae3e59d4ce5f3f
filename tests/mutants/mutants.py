"""Faults that systems of this kind have had, each planted by one exact replacement, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` stands exactly once in `file`; with `new` in its place at least one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


TWO_LEVEL = "tests/distributed/test_two_level.py::test_gradients_equal_one_process"
NODES = "tests/distributed/test_hierarchical.py::test_gradients_equal_one_process"
PARITY = "tests/distributed/test_parity.py::test_gradients_equal_one_process"
FSDP = "tests/distributed/test_fsdp.py::test_gradients_equal_one_process"
CP2 = "cp2-dp1-head_tail-rope-S24-4_2heads-1chunks"

MUTANTS = (
    Mutant(
        "loss is a mean per rank",
        "lss/context_parallel/loss.py",
        "count = totals[1]",
        "count = local_count.double()",
        ("tests/distributed/test_loss.py",),
    ),
    Mutant(
        "label at the border of a segment is lost",
        "lss/parallel/parallelize.py",
        'inputs["shift_labels"] = shard(shifted, self.mesh, seg=segment)',
        'inputs["shift_labels"] = shift(shard(torch.cat((ids[:, :1], shifted[:, :-1]), 1), self.mesh, seg=segment))',
        ("tests/distributed/test_model.py",),
    ),
    Mutant(
        "positions restart in every segment",
        "lss/parallel/parallelize.py",
        'inputs["positions"] = moved(segment.document_positions, ids.device)',
        'inputs["positions"] = torch.arange(segment.local_len)',
        (f"{PARITY}[float32-lss-cp2-dp1]", f"{PARITY}[float32-ring-cp2-dp1]"),
    ),
    Mutant(
        "causal mask is not offset by the segment's place",
        "lss/kernels/sdpa.py",
        "    if not _needs_split(q, causal, past):\n        return call(q, k, v, causal and past == 0, scale)",
        "    if True:\n        return call(q, k, v, causal, scale)",
        ("tests/kernels/test_kernels.py", f"{PARITY}[float32-lss-cp2-dp1]"),
    ),
    Mutant(
        "dK and dV of other ranks are dropped",
        "lss/comm/collectives.py",
        "work = _reduce_scatter(dkv_T2BKH, dkv_S2BKH, group=self.group, async_op=True)",
        "work = _all_gather(torch.empty_like(dkv_S2BKH), dkv_T2BKH.copy_(dkv_S2BKH.chunk(self.size)[self.rank]), "
        "group=self.group, async_op=True)",
        ("tests/distributed/test_attention.py", f"{PARITY}[float32-lss-cp2-dp1]"),
    ),
    Mutant(
        "dK and dV are averaged over ranks",
        "lss/comm/collectives.py",
        "return Pending((work,), lambda: split_kv(dkv_T2BKH), dkv_S2BKH)",
        "return Pending((work,), lambda: split_kv(dkv_T2BKH / self.size), dkv_S2BKH)",
        ("tests/distributed/test_attention.py", f"{PARITY}[float32-lss-cp2-dp1]"),
    ),
    Mutant(
        "gradient norm counts replicated gradients once per rank",
        "lss/parallel/parallelize.py",
        "return global_grad_norm(((self._whole, Communicator()), ",
        "return global_grad_norm(((self._whole, self.cp), ",
        (f"{PARITY}[float32-lss-cp2-dp1]",),
    ),
    Mutant(
        "every rank draws the same dropout",
        "lss/model/transformer.py",
        "samples_B=samples, positions_T=where[tokens])",
        "samples_B=samples, positions_T=torch.arange(len(where))[tokens])",
        (f"{PARITY}[dropout-recompute-lss-cp2-dp1]",),
    ),
    Mutant(
        "data-parallel ranks draw the same dropout",
        "lss/parallel/parallelize.py",
        'inputs["samples"] = self.dp.rank * ids.shape[0] + ',
        'inputs["samples"] = ',
        (f"{PARITY}[dropout-recompute-lss-cp1-dp2]",),
    ),
    Mutant(
        "a resumed run reads its data from the start again",
        "lss/train/trainer.py",
        "batches = [self.loader.batch(step, micro)",
        "batches = [self.loader.batch(step - self.done_steps, micro)",
        ("tests/train/test_trainer.py",),
    ),
    Mutant(
        "every accumulation window is divided by the first one's count",
        "lss/train/steps.py",
        "local = sum(int((batch.labels != -100).sum()) for batch in batches)",
        "local = len(batches) * int((batches[0].labels != -100).sum())",
        ("tests/train/test_steps.py",),
    ),
    Mutant(
        "evaluation divides by this rank's count",
        "lss/train/evaluate.py",
        'labels = int(layout_of(model).all.all_reduce(labels, "labels").wait())',
        "labels = int(labels)",
        ("tests/train/test_steps.py",),
    ),
    Mutant(
        "position rows are summed over the sequence group too",
        "lss/parallel/parallelize.py",
        "self._sync = GradSync(((self._whole, self.all), (self._cut, self.dp)))",
        "self._sync = GradSync(((self._whole, self.all), (self._cut, self.all)))",
        (f"{PARITY}[precut-lss-cp2-dp1]",),
    ),
    Mutant(
        "gradients are averaged instead of summed",
        "lss/parallel/grad_sync.py",
        "    *parts, flags = _parts(bucket, summed)",
        "    *parts, flags = _parts(bucket, summed / bucket.comm.size)",
        (f"{PARITY}[float32-lss-cp2-dp1]",),
    ),
    Mutant(
        "sharded gradients are averaged",
        "lss/parallel/fsdp.py",
        "sharded.set_gradient_divide_factor(1.0)",
        "sharded.set_gradient_divide_factor(float(self._mesh.size()))",
        (f"{FSDP}[plain-lss-cp2-dp1]",),
    ),
    Mutant(
        "a cut position table is sharded too",
        "lss/parallel/parallelize.py",
        "reshard=fsdp_reshard, ignored=self._cut)",
        "reshard=fsdp_reshard, ignored=())",
        (f"{FSDP}[learned-precut-lss-cp2-dp1]",),
    ),
    Mutant(
        "the norm of sharded gradients is that of this rank's",
        "lss/parallel/parallelize.py",
        "(self._sharded, self.all)))",
        "(self._sharded, self.cp)))",
        (f"{FSDP}[plain-lss-cp1-dp2]",),
    ),
    Mutant(
        "what a pass without backward gathered is found again after the update",
        "lss/parallel/parallelize.py",
        "        if self.sharding is not None:\n            self.sharding.give_back()\n        inputs",
        "        inputs",
        ("tests/distributed/test_fsdp.py::test_passes_in_any_order",),
    ),
    Mutant(
        "padding counts as a label",
        "lss/context_parallel/sharding.py",
        "pad_value = IGNORE_INDEX if not",
        "pad_value = 0 if not",
        (f"{PARITY}[float32-lss-cp4-dp1]", "tests/distributed/test_model.py"),
    ),
    Mutant(
        "documents see the one before them",
        "lss/segment/mask.py",
        "zip(pairwise(edges), pairwise(k_edges or edges), strict=True)",
        "zip(pairwise(edges), pairwise(k_edges or (0, *edges[:-2], edges[-1])), strict=True)",
        ("tests/segment/test_order.py", "tests/distributed/test_masks.py"),
    ),
    Mutant(
        "a window is one key too wide",
        "lss/segment/mask.py",
        "if window is None else window - 1",
        "if window is None else window",
        ("tests/segment/test_order.py", f"{PARITY}[windows-head_tail-cp2-dp1]"),
    ),
    Mutant(
        "positions run on from one document to the next",
        "lss/segment/order.py",
        "return positions_in_document(self.documents, self.positions)",
        "return self.positions",
        # rotary positions are relative, and inside a document the same; a learned table is not
        (f"{PARITY}[documents-learned-head_tail-cp2-dp1]",),
    ),
    Mutant(
        "attention drops out by a token's place in its segment",
        "lss/kernels/blocks.py",
        '"places": (block.q_place, block.k_place)}',
        '"places": (block.q_start, block.k_start)}',
        (f"{PARITY}[window-dropout-head_tail-cp2-dp1]",),
    ),
    Mutant(
        "the last token of a document is to say the next one's first",
        "lss/model/transformer.py",
        "if len(documents) > 2:",
        "if len(documents) > 2 and False:",
        ("tests/distributed/test_model.py",),
    ),
    Mutant(
        "what several ranks return for one token is not added up",
        "lss/comm/collectives.py",
        "total[a:b] += received[at : at + b - a]",
        "total[a:b] = received[at : at + b - a]",
        (f"{PARITY}[windows-head_tail-cp2-dp1]",),
    ),
    Mutant(
        "a window hides nothing from a mask_mod's tiles",
        "lss/kernels/tiled.py",
        "(lowest, highest) if masked else None",
        "None",
        ("tests/kernels/test_rules.py",),
    ),
    Mutant(
        "a loss's last short tile is dropped",
        "lss/tiled.py",
        "for at in range(0, len(x), size):",
        "for at in range(0, len(x) - size + 1, size):",
        ("tests/test_tiled.py",),
    ),
    Mutant(
        "a head's gradient is that of the last tile",
        "lss/tiled.py",
        "        total.addmm_(a, b)",
        "        torch.mm(a, b, out=total)",
        ("tests/test_tiled.py",),
    ),
    Mutant(
        "a recomputed weight's gradient is that of the last tile",
        "lss/tiled.py",
        "total if part is None else total.add_(part)",
        "total if part is None else part",
        ("tests/test_tiled.py",),
    ),
    Mutant(
        "tiles draw dropout by their own places",
        "lss/model/transformer.py",
        "positions_T=where[tokens])",
        "positions_T=where[: x_BTD.shape[1]])",
        ("tests/distributed/test_step.py::test_gradients_where_only_linear_parts_are_recomputed[lss-cp1-dropout]",),
    ),
    Mutant(
        "attention is computed again in backward",
        "lss/parallel/activation.py",
        "        if self._full:\n",
        "        if True:\n",
        ("tests/distributed/test_step.py::test_recomputing_linear_parts_costs_no_collective",),
    ),
    Mutant(
        "queries, keys and values are kept after all",
        "lss/parallel/activation.py",
        "number = numbers.get(_bytes_of(tensor))",
        "number = None",
        ("tests/distributed/test_step.py::test_what_exists_and_what_is_kept",),
    ),
    Mutant(
        "a chunk's dQ takes the place of those before",
        "lss/context_parallel/chunked.py",
        "runs, add_dq=True)",
        "runs, add_dq=False)",
        ("tests/distributed/test_chunked.py::test_a_whole_model",),
    ),
    Mutant(
        "a rank's place in the world is taken for its place in the group",
        "lss/comm/collectives.py",
        "to = dist.get_global_rank(self.group, (self.rank + 1) % self.size)",
        "to = (self.rank + 1) % self.size",
        (f"{PARITY}[float32-ring-cp2-dp2]",),
    ),
    Mutant(
        "a part's own lse gets no gradient",
        "lss/kernels/flex.py",
        "own_dlse = w_BTN * (dout * (",
        "own_dlse = 0 * w_BTN * (dout * (",
        ("tests/kernels/test_flex.py",),
    ),
    Mutant(
        "blocks of a mask outlive a change of what it reads",
        "lss/kernels/flex_mask.py",
        "return _Same(value), value._version",
        "return _Same(value), 0",
        ("tests/kernels/test_flex.py",),
    ),
    Mutant(
        "two runs of queries add to the same keys in one varlen call",
        "lss/kernels/varlen.py",
        "block.q_start < last.q_stop or block.k_start < last.k_stop",
        "block.q_start < last.q_stop",
        ("tests/kernels/test_varlen.py",),
    ),
    Mutant(
        "groups that share out heads are the whole sequence group",
        "lss/comm/hierarchical.py",
        "comm.cut = lambda inner: (_communicator(mesh, inner, 1), ",
        "comm.cut = lambda inner: (_communicator(mesh, cp, 1), ",
        # the result is right: it is that of Ulysses, and so are the bytes
        ("tests/distributed/test_two_level.py::test_heads_travel_inside_a_node_and_a_share_of_keys_across",),
    ),
    Mutant(
        "heads that were shared out count from 0 in every share",
        "lss/context_parallel/two_level.py",
        "work=spec.work.of_heads(mine.q).of_queries(",
        "work=spec.work.of_heads(slice(0, mine.n_q)).of_queries(",
        (f"{TWO_LEVEL}[alibi-cp4-dp1]",),
    ),
    Mutant(
        "gradients of a key head in several shares are not added up",
        "lss/context_parallel/heads.py",
        "grad_k[:, :, s.k] += part",
        "grad_k[:, :, s.k] = part",
        (f"{TWO_LEVEL}[rope-cp4-dp1-inner2]",),
    ),
    Mutant(
        "keys that came over nodes are taken in the order of the ranks",
        "lss/comm/hierarchical.py",
        "for place in range(inside.size) for node in range(across.size))",
        "for node in range(across.size) for place in range(inside.size))",
        (f"{NODES}[rope-4-1-2]",),
    ),
    Mutant(
        "dK and dV are summed inside a node and not across",
        "lss/comm/hierarchical.py",
        "partial(_scatter, self.across, dkv_T2BKH, summed)",
        "lambda: _gather(self.across, torch.empty_like(summed), "
        "dkv_T2BKH.copy_(summed.chunk(self.across.size)[self.across.rank]))",
        (f"{NODES}[rope-4-1-2]",),
    ),
    Mutant(
        "groups inside a node are made in the first data-parallel row only",
        "lss/mesh.py",
        "for members in rank_groups(ranks, size, stride):",
        "for members in rank_groups(ranks[:1] * len(ranks), size, stride):",
        ("tests/test_mesh.py::test_groups_of_many_ranks",),
    ),
    Mutant(
        "a fast rank overwrites what a slow one still reads",
        "lss/comm/routes.py",
        'peers.reach("free")\n        peers.barrier("free")',
        'peers.reach("free")',
        ("tests/distributed/test_symmetric.py::test_parity_holds_when_ranks_are_late",),
    ),
    Mutant(
        "a fast rank overwrites what a slow one still reads, all at once",
        "lss/comm/peers.py",
        'self.reach("free")\n        self.barrier("free")',
        'self.reach("free")',
        ("tests/distributed/test_symmetric.py::test_parity_holds_when_ranks_are_late",),
    ),
    Mutant(
        "a rank reads what has not come yet",
        "lss/comm/routes.py",
        'self._peers.reach("arrived")\n        self._peers.barrier(f"arrived{leg}")',
        'self._peers.reach("arrived")',
        ("tests/distributed/test_symmetric.py::test_parity_holds_when_ranks_are_late",),
    ),
    Mutant(
        "a rank reads what has not come yet, all at once",
        "lss/comm/peers.py",
        'self.reach("arrived")\n        self.barrier("arrived0")',
        'self.reach("arrived")',
        ("tests/distributed/test_symmetric.py::test_parity_holds_when_ranks_are_late",),
    ),
    Mutant(
        "gradients leave before the call that computes them has been issued",
        "lss/kernels/blocks.py",
        "more and call.closes and done is not None:",
        "more and done is not None and not done(1 - call.room):",
        ("tests/distributed/test_symmetric.py::test_attention_is_exact",),
    ),
    Mutant(
        "a gradient that several calls give is written over",
        "lss/kernels/blocks.py",
        "            place.add_(piece)",
        "            place.copy_(piece)",
        ("tests/distributed/test_symmetric.py::test_attention_is_exact",),
    ),
    Mutant(
        "a rank adds its gradients to those of the call before",
        "lss/comm/peers.py",
        "        self.wait_for(self.read.get(name))\n        if cleared is not None:\n            cleared.zero_()",
        "        self.wait_for(self.read.get(name))",
        ("tests/distributed/test_symmetric.py::test_documents_windows_and_encoders",),
    ),
    Mutant(
        "stale async save: what is written is not copied",
        "lss/checkpoint/save.py",
        "if not self._background and not box.is_cuda:",
        "if True:",
        ("tests/checkpoint/test_background.py",),
    ),
    Mutant(
        "stale async save: the update does not wait for the copies",
        "lss/train/trainer.py",
        "self.saving.before_update()",
        "pass",
        ("tests/checkpoint/test_background.py",),
    ),
    Mutant(
        "loader state of rank 0 only",
        "lss/train/saving.py",
        'self._loader.resume(newest.step, state["loader"])',
        'self._control.rank or self._loader.resume(newest.step, state["loader"])',
        ("tests/train/test_saving.py",),
    ),
    Mutant(
        "a resume reads from the step, not from where the data stood",
        "lss/data/loader.py",
        "self._known = (step, state",
        "self._known = (0, 0) if state else (step, state",
        ("tests/train/test_saving.py",),
    ),
    Mutant(
        "a damaged save is loaded",
        "lss/checkpoint/manifest.py",
        'if hash_file(path, facts.get("piece", 0)) != facts["sha256"]:',
        "if False:",
        ("tests/checkpoint/test_find.py", "tests/checkpoint/test_verify.py"),
    ),
    Mutant(
        "a failed save is known to one rank only",
        "lss/checkpoint/save.py",
        'reason = next((one["reason"] for one in told if one["reason"]), "")',
        'reason = told[self._control.rank]["reason"]',
        ("tests/checkpoint/test_disk_full.py",),
    ),
    Mutant(
        "weights that a checkpoint brings do not reach the host's copies",
        "lss/train/host_optim.py",
        "if part._version != bucket.seen[number]:",
        "if bucket.seen[number] == -1:",
        ("tests/train/test_host_optim.py",),
    ),
    Mutant(
        "gradients of two buckets share one buffer on their way to the host",
        "lss/train/host_optim.py",
        "self._staging[number % 2]",
        "self._staging[0]",
        ("tests/train/test_host_optim.py",),
    ),
    Mutant(
        "windows count what they overlap twice",
        "lss/data/windows.py",
        "np.where(k == 0, start, start + window - stride)",
        "start",
        ("tests/data/test_windows.py",),
    ),
    Mutant(
        "losses by token are summed on each rank alone",
        "lss/train/evaluate.py",
        'total = layout_of(model).all.all_reduce(total, "loss").wait()',
        "pass",
        ("tests/train/test_evaluate.py",),
    ),
)
