"""`lss plan --calibrate FILE.json`."""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

from lss.cli.ranks import launch, must_launch, planned_ranks, share_cores
from lss.config.errors import refuse


def calibrate(options: argparse.Namespace, arguments: list[str]) -> int:
    """Measure this machine as one rank, or start the ranks that do, and write its profile."""
    path = Path(options.calibrate)
    if path.suffix != ".json" or path.is_dir() or not path.absolute().parent.is_dir():
        raise refuse("--calibrate", str(path), "give a file that ends in .json, in a folder that is there")
    if options.config:
        raise refuse("CONFIG", options.config[0], "a machine is measured without a config; leave it out")
    planned_ranks(options.nproc)
    if must_launch(options.nproc):
        return launch(options.nproc, arguments)

    import torch

    import lss
    from lss.comm import cp_communicator
    from lss.mesh import close, init_mesh, world_size
    from lss.planner.calibrate import Bench
    from lss.planner.profile import save_profile

    share_cores()
    mesh = init_mesh(cp=world_size())
    try:
        first, cuda = mesh.get_rank() == 0, mesh.device_type == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        name = torch.cuda.get_device_name(device) if cuda else f"cpu ({platform.machine()})"

        def say(line: str) -> None:
            if first:
                print(line, flush=True)

        hardware = Bench(cp_communicator(mesh), device, options.seconds, say).hardware(name)
        if first:
            facts = {"date": time.strftime("%Y-%m-%d"), "lss": lss.__version__, "torch": torch.__version__,
                     "python": platform.python_version(), "ranks": mesh.size()}  # fmt: skip
            save_profile(hardware, path, facts)
            print(f"profile: {path}; plan with --gpu {path}")
    finally:
        close()
    return 0
