"""How much of one update acts in the space of another, as a pure function of arrays."""

from __future__ import annotations

import numpy as np

from msplora_analysis.compute.measures.overlap import Array


def shared_energy(inner: Array, sigma: Array) -> Array:
    """‖ΔW_j P_i‖² / ‖ΔW_j‖², with P_i the projection on the space of the directions of update i.

    Unlike ``subspace_overlap`` it counts each direction of ΔW_j by its energy, and all directions of ΔW_i alike. Random
    directions give K / d, for K directions of ΔW_i in d dimensions.

    Args:
        inner: (..., K, L), inner products of the directions of i with those of j, on the input or the output side.
        sigma: (..., L), the singular values of j.

    Returns:
        (...), from 0 (ΔW_j does nothing there) to 1 (nothing elsewhere); NaN for an update of zero.

    Example:
        >>> shared_energy(np.array([[1.0, 0.0]]), np.array([2.0, 1.0]))  # of 5 parts of energy, 4
        array(0.8)
    """
    squares = sigma**2
    total = squares.sum(axis=-1)
    kept = np.einsum("...ab,...ab,...b->...", inner, inner, squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        share: Array = np.where(total > 0, kept / total, np.nan)
    return np.minimum(share, 1.0)
