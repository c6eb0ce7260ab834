"""Factors of a model in memory made small where they are, before anything is computed or copied.

Singular values and overlaps of B A depend on A and B only through the inner products of their rows and columns. With
A Aᵀ = L Lᵀ, the r×r matrix L has those of A (r×n): it holds A in an orthonormal basis of its rows. So one matrix
product a side, on the GPU, leaves matrices of r×r for the CPU, whatever the width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from msplora_analysis.compute.linalg.spectra import Array, factor_blocks, load_factors, not_finite
from msplora_analysis.formats.updates import Matrix, Sum, Update
from msplora_analysis.live.model import ModelTensors

if TYPE_CHECKING:
    import torch

_BLOCK = 2**27  # bytes of float64 factors held at once on the device, unless one matrix alone takes more


def can_be_reduced(update: Update) -> bool:
    """Whether it is a sum of products of factors that stand in the model as they are."""
    return isinstance(update, Sum) and all(
        factor.make is None for product in update.products for factor in (product.a, product.b)
    )


def alike(tensors: ModelTensors, sums: Mapping[int, Sum]) -> Iterator[list[int]]:
    """Keys of sums of equal shape and ranks and on one device, as many at once as its memory is to hold."""
    groups: dict[torch.device | None, dict[int, Sum]] = {}
    for key, update in sums.items():
        groups.setdefault(_device(tensors, update), {})[key] = update
    for device, of_device in groups.items():
        yield from factor_blocks(of_device) if device is None else factor_blocks(of_device, _BLOCK)


def small_factors(tensors: ModelTensors, matrices: Sequence[Matrix]) -> tuple[Array, Array]:
    """a (n, R, R) and b (n, R, R) with the inner products of the factors of n sums that are ``alike``.

    ``b[i] @ a[i]`` has the singular values of update i; R is the sum of the ranks of its products, whose factors are
    concatenated, and scaled. Exact to about 1e-8 of each row's norm.

    Raises:
        AnalysisError: A tensor holds NaN or Inf; it names the tensor.
    """
    updates: list[Sum] = [matrix.update for matrix in matrices]  # type: ignore[misc]
    device = _device(tensors, updates[0])
    gram_a: Array
    gram_b: Array
    with np.errstate(all="ignore"):  # what is not finite is told below
        if device is None:
            a, b, scaling = load_factors(tensors, updates)
            gram_a, gram_b = a @ a.transpose(0, 2, 1), b.transpose(0, 2, 1) @ b
            gram_b *= scaling[:, None, None] ** 2
        else:
            gram_a, gram_b = (_gram_on(device, tensors, updates, side) for side in ("a", "b"))
            scalings = np.array([[p.scaling for p in update.products for _ in range(p.rank)] for update in updates])
            gram_b *= scalings[:, :, None] * scalings[:, None, :]
    for matrix, *grams in zip(matrices, gram_a, gram_b, strict=True):
        if not np.isfinite(grams).all():
            raise not_finite(tensors, matrix.update, matrix.name)
    return _root(gram_a), _root(gram_b).transpose(0, 2, 1)


def _device(tensors: ModelTensors, update: Sum) -> torch.device | None:
    """The device of the layer's own factors, to compute there; None for the CPU, where numpy is faster than torch."""
    device = tensors.tensor(update.products[-1].a.tensors[0]).device
    return device if device.type in ("cuda", "xpu") else None  # others lack float64


def _gram_on(device: torch.device, tensors: ModelTensors, updates: Sequence[Sum], side: str) -> Array:
    """Inner products (n, R, R) of the rows of a, or the columns of b, of each of n updates."""
    import torch

    wide = []
    for update in updates:
        factors = [getattr(product, side) for product in update.products]
        parts = [tensors.tensor(factor.tensors[0]).to(device).reshape(factor.rows, factor.cols) for factor in factors]
        wide.append(torch.cat(parts, dim=0 if side == "a" else 1))
    stacked = torch.stack(wide).double()
    gram: Array = (stacked @ stacked.mT if side == "a" else stacked.mT @ stacked).cpu().numpy()
    return gram


def _root(gram: Array) -> Array:
    """L (n, R, R) with L Lᵀ = gram: Cholesky's, or, where rows depend on one another, that of the eigenvectors."""
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    safe = np.where(norms > 0, norms, 1)
    unit = gram / (safe[:, :, None] * safe[:, None, :])
    try:
        lower = np.linalg.cholesky(unit)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(unit)
        lower = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    return lower * norms[:, :, None]


def slices(update: Sum) -> list[slice]:
    """Where the factors of each product lie among the concatenated ones."""
    ends = np.cumsum([product.rank for product in update.products]).tolist()
    return [slice(end - product.rank, end) for end, product in zip(ends, update.products, strict=True)]
