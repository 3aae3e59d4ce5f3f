"""`lss plan --plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lss.config.errors import refuse

if TYPE_CHECKING:
    from lss.planner import Curve, Hardware

FORMS = (".svg", ".png")


def picture_file(name: str) -> Path:
    """Where the picture will be.

    Raises:
        Refused: another form, or a folder that is not there.
    """
    path = Path(name)
    if path.suffix.lower() not in FORMS:
        raise refuse("--plot", name, "pictures are .svg or .png; give a name that ends in one of them")
    if not path.parent.is_dir():
        raise refuse("--plot", name, f"there is no folder {path.parent}; make it, or name another")
    if path.is_dir():
        raise refuse("--plot", name, "it is a folder; name a file")
    return path


def write_picture(path: Path, curve: Curve, hardware: Hardware) -> None:
    """Draw memory over the moments of a step, and say where the picture is.

    Raises:
        Refused: matplotlib is missing, or the file cannot be written.
    """
    from lss.planner.curve import ON_DEVICE
    from lss.report.plots import stack_plot

    layers = {name: (curve.of(name) / 2**30).tolist() for name in ON_DEVICE}
    picture = stack_plot(layers, curve.parts, "GiB", line=(hardware.name, hardware.memory / 2**30),
                         png=path.suffix.lower() == ".png")  # fmt: skip
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise refuse("--plot", str(path), f"cannot be written ({error.strerror}); name another file") from error
    print(f"written: {path}")
