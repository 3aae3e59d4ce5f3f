"""Starting local ranks by torch's own elastic launcher, on loopback."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from lss.config.errors import refuse


def launch_local(nproc: int, arguments: Sequence[str]) -> int:
    """Run `python -m lss ARGUMENTS` as `nproc` ranks on this machine; returns the exit status of the run.

    The ranks meet on 127.0.0.1 at a port that the system picks. If one fails, all are ended; its exit status is
    returned (2 for a refusal), 130 or 143 where the launcher itself was interrupted or terminated.
    """
    if nproc < 1:
        raise refuse("--nproc", nproc, "give the number of ranks to start, 1 or more")
    # imported here: every command would pay for it at start, and one uses it
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from lss.one_host import one_host

    rendezvous_handler_registry.register("lss", one_host)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="lss",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    _share_cores(nproc)
    # the ranks have said what went wrong; the launcher's own account of exit codes would bury it
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", "lss", *arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        # ranks that were ended because another failed show a signal, a negative code
        own = [code for code in codes if code > 0]
        return 2 if 2 in own else own[0] if own else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 130
    return 0


def _share_cores(nproc: int) -> None:
    """Give each rank its share of the cores: each would otherwise start as many threads as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
