"""`lss verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lss.config.errors import refuse


def verify(options: argparse.Namespace) -> int:
    """Check every byte of a checkpoint, a run's newest where its folder is given; prints one line where it is good.

    Raises:
        Refused: naming the first file that is changed, missing, not the checkpoint's or a link.
    """
    from lss.checkpoint import verify as verify_checkpoint

    path = checkpoint_folder(options.checkpoint)
    checkpoint = verify_checkpoint(path)
    size = sum(facts["bytes"] for facts in checkpoint.files.values())
    print(f"{path}: good, step {checkpoint.step}, {len(checkpoint.files)} files of {size:,} bytes beside the manifest")
    return 0


def checkpoint_folder(name: str) -> Path:
    """The folder of a checkpoint, or of a run's newest where the run's folder is given."""
    from lss.checkpoint import saved_steps

    path = Path(name)
    if (path / "checkpoints").is_dir():
        steps = saved_steps(path / "checkpoints")
        if not steps:
            raise refuse("CKPT", path, "a run without a checkpoint; train it further or name another")
        path = path / "checkpoints" / f"step_{steps[0]}"
    return path
