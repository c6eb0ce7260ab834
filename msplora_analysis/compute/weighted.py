"""What moments say of the updates of an adapter: S_a and S_b of each matrix, in the order of its factors.

A module's moments are those of the factors of its whole update side by side; a scale's own are the sub-blocks. A pair
that several modules share acts in all of them: its moments are the means over these modules, as if their tokens were
those of one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msplora_analysis.adapters.moments import open_moments
from msplora_analysis.compute.linalg.spectra import Array, value
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.updates import Factor, Matrix, Product, Sum
from msplora_core.moments import ModuleMoments, directions

_REMEDY = "record them anew, give moments= those of this adapter, or moments=none"


class Weights(NamedTuple):
    """The moments of the factors of one update: ``s_a`` and ``s_b``, (r, r) float64."""

    s_a: Array
    s_b: Array

    def part(self, at: slice) -> Weights:
        return Weights(self.s_a[at, at], self.s_b[at, at])


class Module(NamedTuple):
    """A whole update and its moments.

    order: (R,), where the moments have the factors of the update, one after another. weights: in the update's order.
    """

    matrix: Matrix
    moments: ModuleMoments
    order: Array
    weights: Weights


def task_spectra(
    file: TensorFile, path: Path, everything: Sequence[Matrix], wanted: Sequence[Matrix], notes: list[str]
) -> list[Array]:
    """The task-weighted singular values (r,) of each matrix, descending; (0,) of one that the moments do not serve.

    Args:
        file: The adapter's tensors.
        path: The file of its moments.
        everything: All matrices of the adapter.
        wanted: Those whose spectra are wanted.
        notes: What a reader must know is added to these.

    Raises:
        AnalysisError: the moments are not those of this adapter, or their file is broken.
    """
    modules = fitting(file, path, open_moments(path, file.states).modules, everything, wanted, notes)
    weights = weights_of(wanted, modules)
    return [directions(*weights[m]).sigma if m in weights else np.empty(0) for m in wanted]


def fitting(
    file: TensorFile,
    path: Path,
    moments: Mapping[str, ModuleMoments],
    everything: Sequence[Matrix],
    wanted: Sequence[Matrix],
    notes: list[str],
) -> dict[str, Module]:
    """The whole updates that moments serve, by the name of the module; see ``task_spectra``.

    The factors of ``wanted`` alone are read, to see whether they are those that were measured.

    Raises:
        AnalysisError: the moments are those of another adapter; the message names file and module.
    """
    whole = {m.name: m for scale in ("layer", "total") for m in everything if m.scale == scale}
    if strange := next((name for name in moments if name not in whole), None):
        raise AnalysisError(f"{path}: moments of {strange}, which {file.path} does not adapt; {_REMEDY}", "moments")
    scale_of = _scales(everything)
    check = {product for matrix in wanted if isinstance(matrix.update, Sum) for product in _products(matrix)}
    squares: dict[Factor, float] = {}
    served: dict[str, Module] = {}
    for name, matrix in whole.items():
        if name in moments and isinstance(matrix.update, Sum):
            served[name] = _module(file, path, matrix, moments[name], scale_of, check, squares)
    if len(served) < len(whole):
        left = [name for name in whole if name not in served]
        more = ", ..." if len(left) > 3 else ""
        notes.append(f"{path} has no moments of {', '.join(left[:3])}{more} ({len(left)}): what needs them is empty")
    return served


def weights_of(matrices: Iterable[Matrix], modules: Mapping[str, Module]) -> dict[Matrix, Weights]:
    """The moments of each matrix that they serve: of scales, shared pairs and whole updates."""
    acting: dict[Product, list[Weights]] = {}  # a product, and its moments in every module that it acts in
    for module in modules.values():
        for product, at in products_at(module.matrix):
            acting.setdefault(product, []).append(module.weights.part(at))
    found = {module.matrix: module.weights for module in modules.values()}
    for matrix in matrices:
        if matrix not in found and isinstance(matrix.update, Sum) and matrix.update.products[0] in acting:
            (product,) = matrix.update.products  # a scale of one module is one pair
            found[matrix] = Weights(*(np.mean(of, axis=0) for of in zip(*acting[product], strict=True)))
    return found


def _scales(matrices: Iterable[Matrix]) -> dict[Product, str]:
    """The scale of each product."""
    owned = [matrix for matrix in matrices if matrix.scale != "total" and isinstance(matrix.update, Sum)]
    return {product: matrix.scale for matrix in owned for product in _products(matrix)}


def _products(matrix: Matrix) -> tuple[Product, ...]:
    assert isinstance(matrix.update, Sum)
    return matrix.update.products


def products_at(matrix: Matrix) -> list[tuple[Product, slice]]:
    """The products of an update, and where their factors stand among all."""
    products = _products(matrix)
    ends = accumulate((product.rank for product in products), initial=0)
    return [(product, slice(*at)) for product, at in zip(products, pairwise(ends), strict=True)]


def _module(
    file: TensorFile,
    path: Path,
    matrix: Matrix,
    moments: ModuleMoments,
    scale_of: Mapping[Product, str],
    check: Container[Product],
    squares: dict[Factor, float],
) -> Module:
    """Raises AnalysisError for moments of other scales, ranks or values."""
    parts: dict[str, list[Product]] = {}
    for product in _products(matrix):
        parts.setdefault(scale_of.get(product, matrix.scale), []).append(product)
    ranks = {scale: sum(product.rank for product in products) for scale, products in parts.items()}
    measured = dict(zip(moments.scales, moments.ranks, strict=True))
    if ranks != measured:
        raise AnalysisError(
            f"{path}: moments of {matrix.name} have ranks {_listed(measured)}, its update in {file.path} has "
            f"{_listed(ranks)}; {_REMEDY}",
            "moments",
        )
    norms = moments.norms.copy()
    for i, scale in enumerate(moments.scales):
        if all(product in check for product in parts[scale]):
            norms[0, i] = sum(_square(file, product.a, squares) for product in parts[scale])
            norms[1, i] = sum(product.scaling**2 * _square(file, product.b, squares) for product in parts[scale])
    if not moments.fits(norms):
        raise AnalysisError(
            f"{path}: moments of {matrix.name} are not of the values in {file.path} (another checkpoint?); {_REMEDY}",
            "moments",
        )
    order = np.concatenate([np.arange(moments.part(scale).start, moments.part(scale).stop) for scale in ranks])
    grid = np.ix_(order, order)
    return Module(matrix, moments, order, Weights(moments.s_a[grid], moments.s_b[grid]))


def _square(file: TensorFile, factor: Factor, squares: dict[Factor, float]) -> float:
    """The squared Frobenius norm of a factor; each is read once."""
    if factor not in squares:
        squares[factor] = float(np.sum(np.square(value(file, factor), dtype=np.float64)))
    return squares[factor]


def _listed(ranks: Mapping[str, int]) -> str:
    return ", ".join(f"{scale} {rank}" for scale, rank in ranks.items())
