"""The process that tests fork others from: it has imported torch and what runs need on their way, once for all of them."""

from __future__ import annotations

import multiprocessing as mp

# without it each rank of each case would take seconds of a core to start, and to end with a report
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch._inductor.config", "torch.utils.tensorboard", "lss.cli.train", "lss.cli.early",
     "lss.train.trainer", "lss.report", "matplotlib.figure", "matplotlib.backends.backend_svg", "pytest", "hypothesis",
     "tests.distributed.cases", "tests.distributed.model_cases", "tests.faults.plants", "tests.faults.ranks"]
)  # fmt: skip
