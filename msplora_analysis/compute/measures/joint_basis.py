"""How few parameters describe several updates in one basis, as pure functions of arrays."""

from __future__ import annotations

import numpy as np

from msplora_analysis.compute.measures.overlap import Array

SHARES = (0.9, 0.95, 0.99)


def kept_energy(left: Array, sigma: Array, right: Array) -> Array:
    """Energy of n updates in their leading common directions: ‖U_kᵀ ΔW_i V_l‖² summed over i, as a share of all.

    U and V are the principal directions of all outputs and all inputs: eigenvectors of Σ ΔW_i ΔW_iᵀ and Σ ΔW_iᵀ ΔW_i
    (the first step of Tucker's decomposition with a core for each update: Tucker 1966, Psychometrika 31).

    Args:
        left: (n, K, rows), the directions of each update, orthonormal or zero.
        sigma: (n, K).
        right: (n, K, cols).

    Returns:
        (m, l) for k = 1 ... m directions on the output side and 1 ... l on the input side.
    """
    u, v = (_principal(side, sigma) for side in (left, right))
    cores = (u @ left.swapaxes(-1, -2)) * sigma[:, None] @ (right @ v.T)
    energy: Array = (cores**2).sum(axis=0).cumsum(axis=0).cumsum(axis=1)
    return energy / (sigma**2).sum()


def _principal(side: Array, sigma: Array) -> Array:
    """(m, d), orthonormal."""
    weighted = (side * sigma[..., None]).reshape(-1, side.shape[-1])
    _, values, directions = np.linalg.svd(weighted, full_matrices=False)
    return directions[values > 1e-10 * values[0]]


def joint_parameters(left: Array, sigma: Array, right: Array, share: float) -> int:
    """The fewest parameters of one basis on either side, and a core for each update, that keep a share of the energy.

    k directions out and l in cost k · rows + l · cols + n k l. The arguments are those of ``kept_energy``.
    """
    kept = kept_energy(left, sigma, right)
    k, l_ = np.ogrid[1 : kept.shape[0] + 1, 1 : kept.shape[1] + 1]
    cost = k * left.shape[-1] + l_ * right.shape[-1] + len(left) * k * l_
    return int(cost[kept >= share * (1 - 1e-9)].min())


def separate_parameters(sigma: Array, rows: int, cols: int, share: float) -> int:
    """The fewest parameters of a factor pair for each update that keep a share of the energy of all: the largest σ² of
    any. sigma: (n, K).
    """
    energy = np.sort(sigma**2, axis=None)[::-1].cumsum()
    return int((energy >= share * energy[-1] * (1 - 1e-9)).argmax() + 1) * (rows + cols)
