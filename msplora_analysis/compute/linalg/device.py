"""Where large matrices are computed: numpy here, or torch on a GPU. What is written once runs on either.

numpy and torch call the same operations alike (``qr``, ``eigh``, ``@``, ``.T``): ``library`` tells which an array
is of. torch is imported only where a device is named.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError

CPU = "cpu"


def check_device(device: str) -> str:
    """Raises AnalysisError for a device that is not there."""
    if device == CPU:
        return device
    try:
        import torch

        torch.zeros(1, device=device)
    except (ImportError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AnalysisError(
            f"device={device}: it cannot be used: {reason}; leave it out for the CPU", "device"
        ) from None
    return device


def to_device(matrix: NDArray[Any], device: str) -> Any:
    """The array itself for the CPU, a tensor of torch elsewhere."""
    return matrix if device == CPU else _tensor(matrix, device)


def like(matrix: NDArray[Any], other: Any) -> Any:
    """A small array where ``other`` is."""
    return matrix if isinstance(other, np.ndarray) else _tensor(matrix, other.device)


def _tensor(matrix: NDArray[Any], device: Any) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(matrix)).to(device)


def to_host(matrix: Any) -> NDArray[Any]:
    """An array of numpy, of either."""
    return matrix if isinstance(matrix, np.ndarray) else np.asarray(matrix.cpu().numpy())


def library(matrix: Any) -> Any:
    """The library of an array: its functions."""
    if isinstance(matrix, np.ndarray):
        return np
    import torch

    return torch
