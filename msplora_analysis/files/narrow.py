"""Numbers of 8 and 16 bits that numpy has no type of, widened to float32, which is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# What the bytes are read as, by the names of safetensors and of PyTorch.
NARROW = {
    "BF16": "<u2", "bfloat16": "<u2", "F8_E4M3": "u1", "float8_e4m3fn": "u1", "F8_E5M2": "u1", "float8_e5m2": "u1"
}  # fmt: skip


def widened(values: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """float32 of numbers of a type in NARROW, given as whole numbers of its bits."""
    wide: NDArray[np.float32]
    if NARROW[kind] == "<u2":  # the upper half of a float32
        wide = np.left_shift(values, 16, dtype="<u4").view("<f4")
    elif kind in ("F8_E5M2", "float8_e5m2"):  # the upper half of a float16
        wide = np.left_shift(values, 8, dtype="<u2").view("<f2").astype(np.float32)
    else:
        wide = _E4M3[values]
    return wide


def _e4m3() -> NDArray[np.float32]:
    """All 256 numbers of a sign, four bits of exponent and three of fraction: 127 is NaN, none is infinite."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    size[bits & 127 == 127] = np.nan
    return np.where(bits < 128, size, -size).astype(np.float32)


_E4M3 = _e4m3()
