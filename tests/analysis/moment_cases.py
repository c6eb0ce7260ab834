"""Moments of hand-made adapters, from inputs x and output gradients g of tokens, so that dense C and G are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msplora_core.moments import ModuleMoments, Moments, directions

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Scale -> A (r, cols) and B (rows, r), the scaling in B."""


class Tokens(NamedTuple):
    """x (examples, tokens, cols) and g (examples, tokens, rows) of one module, float64."""

    x: np.ndarray
    g: np.ndarray

    def root_in(self) -> np.ndarray:
        return square_root(np.einsum("eti,etj->ij", self.x, self.x) / self.x[..., 0].size)

    def root_out(self) -> np.ndarray:
        return square_root(np.einsum("eti,etj->ij", self.g, self.g) / self.g[..., 0].size)

    def weighted(self, update: np.ndarray) -> np.ndarray:
        """G^½ ΔW C^½."""
        return self.root_out() @ update @ self.root_in()


def square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def random_tokens(rows: int, cols: int, *, seed: int = 0, examples: int = 40, tokens: int = 6) -> Tokens:
    """Inputs and gradients whose coordinates differ in size by a factor of up to 1000."""
    rng = np.random.default_rng(seed)
    x, g = (rng.standard_normal((examples, tokens, n)) * 10 ** rng.uniform(-1.5, 1.5, n) for n in (cols, rows))
    return Tokens(x, g)


def update_of(factors: Factors) -> np.ndarray:
    return sum(b @ a for a, b in factors.values())


def module_moments(factors: Factors, tokens: Tokens) -> ModuleMoments:
    """What ``msplora-measure moments`` would record, by the definitions of ``msplora_core.moments``."""
    a = np.concatenate([a for a, _ in factors.values()])
    b = np.concatenate([b for _, b in factors.values()], axis=1)
    ax, bg = tokens.x @ a.T, tokens.g @ b
    s_a, s_b = (np.einsum("eti,etj->ij", of, of) / of[..., 0].size for of in (ax, bg))
    cores = np.einsum("eti,etj->eij", bg, ax)
    scores = {}
    for name, (left, right) in {"plain": (a @ a.T, b.T @ b), "task": (s_a, s_b)}.items():
        found = directions(left, right)
        scores[name] = np.einsum("ik,eij,kj->ek", found.left, cores, found.right).astype(np.float32)
    norms = np.array([[np.sum(f[i] ** 2) for f in factors.values()] for i in (0, 1)])
    ranks = tuple(len(a) for a, _ in factors.values())
    return ModuleMoments(tuple(factors), ranks, s_a, s_b, norms, scores)


def write_moments(
    folder: Path, modules: Mapping[str, Factors], tokens: Mapping[str, Tokens], name: str = "moments.safetensors"
) -> Path:
    """The file of the moments of an adapter, beside it."""
    measured = {module: module_moments(factors, tokens[module]) for module, factors in modules.items()}
    return Moments(measured, {"examples": 40, "draws": 1, "labels": "sampled"}).save(folder / name)


def lora_factors(tensors: Mapping[str, np.ndarray], scaling: float = 2.0) -> dict[str, Factors]:
    """Module -> factors, of tensors as ``adapters.lora_tensors`` makes them."""
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    pairs = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}
    return {
        name.removeprefix("base_model.model."): {"layer": (a.astype(float), scaling * b.astype(float))}
        for name, (a, b) in pairs.items()
    }
