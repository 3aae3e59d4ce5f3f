"""The header of a .npy file, by which its items are found; nothing is loaded, and no pickle ever."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib import format as npy

from lss.config.errors import Refused

_LARGEST_HEADER = 1 << 16  # characters; a header says a dtype and a shape


def npy_header(stream: Any, what: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns stand one after another, dtype) of a .npy file, which is read up to its first item.

    Raises:
        Refused: no header that can be read, of the file called `what`.
    """
    try:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version[0]}.{version[1]}")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=_LARGEST_HEADER)
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
        return shape, fortran, dtype
    # what numpy raises for headers that are cut off, too long, or no header at all
    except (ValueError, TypeError, SyntaxError, EOFError, RecursionError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:100].rstrip(".") or type(error).__name__
        raise Refused(f"{what}: byte 0 begins no .npy header that can be read ({reason}); save it anew.") from None
