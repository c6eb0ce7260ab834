"""The space that several updates span, against dense matrices."""

import numpy as np
import pytest

from msplora_analysis.compute.linalg.core_space import core_space


def drawn(seed, rows, cols, ranks):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(r, cols)), rng.normal(size=(rows, r))) for r in ranks]


@pytest.mark.parametrize(("rows", "cols", "ranks"), [(30, 20, (3, 2)), (6, 9, (4, 4, 4)), (5, 5, (1,))])
def test_updates_are_their_cores_between_orthonormal_bases(rows, cols, ranks):
    factors = drawn(0, rows, cols, ranks)
    space = core_space(factors)
    np.testing.assert_allclose(space.left.T @ space.left, np.eye(space.left.shape[1]), atol=1e-12)
    np.testing.assert_allclose(space.right @ space.right.T, np.eye(len(space.right)), atol=1e-12)
    for core, (a, b) in zip(space.cores, factors, strict=True):
        np.testing.assert_allclose(space.left @ core @ space.right, b @ a, atol=1e-12)


def test_the_same_update_twice_and_one_of_zero_are_no_exception():
    ((a, b),) = drawn(1, 12, 10, (3,))
    one, two, zero = core_space([(a, b), (a, -b), (0 * a, b)]).cores
    np.testing.assert_allclose(one, -two, atol=1e-12)
    np.testing.assert_allclose(zero, 0, atol=1e-12)


def test_factors_are_the_truncated_svd_of_the_dense_sum():
    factors = drawn(2, 16, 14, (3, 4))
    space = core_space(factors)
    a, b = space.factors(sum(space.cores), rank=2)
    u, sigma, vt = np.linalg.svd(sum(b @ a for a, b in factors))
    np.testing.assert_allclose(b @ a, (u[:, :2] * sigma[:2]) @ vt[:2], atol=1e-12)
    np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-12)  # half of each singular value in either
