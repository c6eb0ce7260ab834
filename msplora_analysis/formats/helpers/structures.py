"""Updates that are not one plain product: Tucker cores, Hadamard and Kronecker products of low-rank matrices.

None is multiplied out where its spectrum is that of smaller factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.formats.helpers.parts import expect_shape, leading, make_product
from msplora_analysis.formats.names import module_of, stack_and_layer
from msplora_analysis.formats.updates import Factor, Matrix, Product, Shapes, Sum, Whole

Array = NDArray[np.float64]


# Factors


def low_rank(down: str, up: str, shapes: Shapes) -> Product:
    """``up @ down``, of tensors (rank, in, ...) and (out, rank, 1, ...)."""
    return make_product(down, up, shapes, leading(shapes[down]) or 1, {})


def tucker(core: str, down: str, up: str, shapes: Shapes, *, up_transposed: bool) -> Product:
    """A convolution (out, in, *kernel) flattened to (out, in · kernel), as the product of ``up`` and core x down.

    W[o, n, k] = sum over i and j of up[o, i] core[i, j, k] down[j, n] (Tucker-2: Kim et al. 2016, arXiv
    1511.06530), so its rank is at most that of ``up``. core: (r, r, *kernel), down: (r, in), up: (out, r) or
    with ``up_transposed`` (r, out); axes of size 1 may follow.
    """
    shape, shape_down, shape_up = shapes[core], shapes[down], shapes[up]
    up_matrix = shape_up[1::-1] if up_transposed else shape_up[:2]
    fits = (
        len(shape) >= 3
        and 0 not in (*shape, *shape_down, *shape_up)
        and shape_down[:1] == shape[1:2]
        and len(shape_up) >= 2
        and up_matrix[1] == shape[0]
        and len(shape_down) >= 2
        and math.prod(shape_down[2:]) == math.prod(shape_up[2:]) == 1
    )
    if not fits:
        raise AnalysisError(
            f"tensors {core}, {down} and {up} have shapes {list(shape)}, {list(shape_down)} and {list(shape_up)}, "
            "which do not make a Tucker product; save the adapter again"
        )
    rows, rank = up_matrix
    return Product(
        Factor((core, down), rank, shape_down[1] * math.prod(shape[2:]), _core_times_down),
        Factor((up,), rows, rank, transposed if up_transposed else None),
        1.0,
    )


def whole(tensor: str, shapes: Shapes, scaling: float = 1.0) -> Whole:
    """A tensor (out, ...) as a matrix whose columns are all its further axes."""
    shape = shapes[tensor]
    if len(shape) < 2 or 0 in shape:
        raise AnalysisError(f"tensor {tensor} has shape {list(shape)}; expected a matrix that is not empty")
    return Whole(Factor((tensor,), shape[0], math.prod(shape[1:])), scaling)


def hadamard(left: Product, right: Product, scaling: float) -> Sum | Whole:
    """``scaling * (B1 A1) ∘ (B2 A2)``, the elementwise product (FedPara, Hyeon-Woo et al. 2022, arXiv 2108.06098).

    It is B A where B has the products of every column of B1 with every one of B2, and A those of the rows: exactly
    a product of rank r1 r2. Where that is no smaller than the matrix itself, the matrix is multiplied out.
    """
    if (left.rows, left.cols) != (right.rows, right.cols):
        raise AnalysisError(
            f"tensors {left.a.tensors[-1]} and {right.a.tensors[-1]} belong to matrices of shapes "
            f"{[left.rows, left.cols]} and {[right.rows, right.cols]}, whose product needs one shape"
        )
    scaling *= left.scaling * right.scaling
    if left.rank * right.rank < min(left.rows, left.cols):
        a = joined((left.a, right.a), left.rank * right.rank, left.cols, _row_products)
        b = joined((left.b, right.b), left.rows, left.rank * right.rank, _column_products)
        return Sum((Product(a, b, scaling),))
    return Whole(joined((left.a, left.b, right.a, right.b), left.rows, left.cols, _hadamard), scaling)


def rows_scaled(values: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float64]:
    """diag(scales) @ values, in float64."""
    return np.multiply(values, scales.reshape(-1, 1), dtype=np.float64)


def block_diagonal(values: NDArray[Any], blocks: int) -> NDArray[np.float64]:
    """The (rows, cols * blocks) matrix that has ``values`` (rows, cols, 1, ...), in blocks of rows, on its diagonal."""
    rows, cols = values.reshape(len(values), -1).shape
    full = np.zeros((blocks, rows // blocks, blocks, cols))
    for i, block in enumerate(values.reshape(blocks, -1, cols)):
        full[i, :, i] = block
    return full.reshape(rows, blocks * cols)


def expert_matrices(name: str, a: str, b: str, scaling: float, shapes: Shapes) -> Iterator[Matrix]:
    """The matrix of each expert of A (experts, rank, in) and B (experts, out, rank), called ``<name>.<expert>``.

    One of the two may be of one expert: all share it.
    """
    of_a, rank, cols = expect_shape(shapes, a, None, None, None)
    of_b, rows, _ = expect_shape(shapes, b, of_a if of_a > 1 and shapes[b][:1] != (1,) else None, None, rank)
    for i in range(max(of_a, of_b)):
        inner = Factor((a,), rank, cols, partial(expert, index=i if of_a > 1 else 0))
        outer = Factor((b,), rows, rank, partial(expert, index=i if of_b > 1 else 0))
        update = Sum((Product(inner, outer, scaling),))
        yield Matrix("layer", stack_and_layer(name)[1], module_of(name), f"{name}.{i}", update)


def not_plain_pairs(matrices: Iterable[Matrix]) -> str | None:
    """Why not all updates are one pair of factors each; None if they are."""
    for matrix in matrices:
        if isinstance(matrix.update, Sum):
            (product,) = matrix.update.products
            if product.a.make or product.b.make:
                return f"{matrix.name}: its update is not one plain pair of factors; only such are written"
    return None


def joined(factors: tuple[Factor, ...], rows: int, cols: int, combine: Callable[..., Array]) -> Factor:
    """The matrix that ``combine`` makes of the matrices of ``factors``."""

    def make(*tensors: NDArray[Any]) -> Array:
        values, rest = [], tensors
        for factor in factors:
            own, rest = rest[: len(factor.tensors)], rest[len(factor.tensors) :]
            values.append(factor.make(*own) if factor.make else _matrix(own[0], factor.rows))
        return combine(*values)

    return Factor(tuple(name for factor in factors for name in factor.tensors), rows, cols, make)


def _matrix(tensor: NDArray[Any], rows: int) -> Array:
    return tensor.astype(np.float64).reshape(rows, -1)


def transposed(tensor: NDArray[Any]) -> Array:
    """A matrix (n, m) as (m, n), in float64."""
    return _matrix(tensor, len(tensor)).T.copy()


def rows_of(tensor: NDArray[Any], start: int, count: int) -> Array:
    """``count`` rows of a matrix, whose further axes are of one element, in float64."""
    return tensor[start : start + count].reshape(count, -1).astype(np.float64)


def rows_transposed(tensor: NDArray[Any], start: int, count: int) -> Array:
    """``count`` rows of a matrix (n, m) as (m, count), in float64."""
    return rows_of(tensor, start, count).T


def expert(tensor: NDArray[Any], index: int) -> Array:
    """The matrix of one expert of (experts, n, m), in float64."""
    return tensor[index].astype(np.float64)


def _core_times_down(core: NDArray[Any], down: NDArray[Any]) -> Array:
    kernels = core.astype(np.float64).reshape(*core.shape[:2], -1)
    return np.einsum("ijk,jn->ink", kernels, _matrix(down, len(down)), optimize=True).reshape(len(core), -1)


def _row_products(left: Array, right: Array) -> Array:
    """Every row of one times every row of the other: (r1, n), (r2, n) -> (r1 r2, n)."""
    return (left[:, None] * right[None]).reshape(-1, left.shape[1])


def _column_products(left: Array, right: Array) -> Array:
    return (left[:, :, None] * right[:, None]).reshape(len(left), -1)


def _hadamard(left_a: Array, left_b: Array, right_a: Array, right_b: Array) -> Array:
    product: Array = left_b @ left_a
    product *= right_b @ right_a
    return product
