"""Memory that is used again: for these block sizes, getting it fresh costs more than the work done in it."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

_of_thread = threading.local()


def scratch(use: str, size: int) -> NDArray[np.uint8]:
    """``size`` bytes, not cleared, that the next call of this thread with the same ``use`` gives again.

    The array starts at a multiple of 64 bytes.
    """
    arrays: dict[str, NDArray[np.uint8]] = _of_thread.__dict__.setdefault("arrays", {})
    array = arrays.get(use)
    if array is None or len(array) < size:
        fresh = np.empty(size + 63, dtype=np.uint8)
        start = -fresh.ctypes.data % 64
        array = arrays[use] = fresh[start : start + size]
    return array[:size]
