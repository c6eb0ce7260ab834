"""Overlaps, angles and directions against dense SVD, scipy's principal angles, and random subspaces."""

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from msplora_analysis.compute.linalg.directions import singular_directions
from msplora_analysis.compute.linalg.truncated import largest
from msplora_analysis.compute.measures.overlap import (
    expected_overlap,
    inner_products,
    overlap_deviation,
    subspace_overlap,
    update_cosine,
)

RNG = np.random.default_rng(0)


def subspaces(n, k, d, rng=RNG):
    """n random k-dimensional subspaces of R^d, a direction a row."""
    return np.linalg.qr(rng.standard_normal((n, d, k)))[0].transpose(0, 2, 1)


def factors(kind, n=3, r=6, rows=40, cols=50):
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((n, r, cols)), rng.standard_normal((n, rows, r))
    if kind == "graded":
        a *= np.logspace(0, -4, r)[:, None]
        b *= np.logspace(0, -1, r)
    elif kind == "dependent":  # too close for Cholesky
        a = 1 + 1e-5 * a
    elif kind == "deficient":
        a[:, -1], b[:, :, -2] = a[:, 0], 0
    elif kind == "mixed":
        a[1] = 1 + 1e-6 * a[1]
    elif kind == "tiny":
        a *= 1e-160
    return a, b


@pytest.mark.parametrize("kind", ["random", "graded", "dependent", "deficient", "mixed", "tiny"])
def test_directions_are_those_of_the_dense_svd(kind):
    a, b = factors(kind)
    sigma, left, right = singular_directions(a, b)
    for i in range(len(a)):
        u, exact, vt = np.linalg.svd(b[i] @ a[i], full_matrices=False)
        rank = np.count_nonzero(exact[:6] > 1e-6 * exact[0])
        assert rank == np.count_nonzero(sigma[i] > 1e-6 * sigma[i, 0])
        np.testing.assert_allclose(sigma[i, :rank], exact[:rank], rtol=1e-7)
        for ours, theirs in ((left[i], u.T), (right[i], vt)):
            np.testing.assert_allclose(ours[:rank] @ ours[:rank].T, np.eye(rank), atol=1e-7)
            agreement = (ours[:rank] * theirs[:rank]).sum(axis=1)
            np.testing.assert_allclose(np.abs(agreement), 1, atol=1e-6)
        product = left[i, :rank].T * sigma[i, :rank] @ right[i, :rank]
        np.testing.assert_allclose(product, b[i] @ a[i], atol=1e-5 * exact[0])


def test_directions_of_more_rank_than_columns_and_of_zero():
    a, b = RNG.standard_normal((2, 6, 4)), RNG.standard_normal((2, 5, 6))
    b[1] = 0
    sigma, left, right = singular_directions(a, b)
    assert (sigma[0] > 0).sum() == 4
    np.testing.assert_allclose(left[0, :4].T * sigma[0, :4] @ right[0, :4], b[0] @ a[0], atol=1e-12)
    assert (sigma[1] == 0).all()


def test_triplets_of_a_large_matrix():
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((1700, 40)) * np.logspace(0, -2, 40) @ rng.standard_normal((40, 1600))
    for given in (matrix, matrix.T):
        found = largest(given, 5, vectors=True)
        np.testing.assert_allclose(given @ found.right, found.left * found.sigma, atol=1e-4 * found.sigma[0])
        np.testing.assert_allclose(found.left.T @ found.left, np.eye(5), atol=1e-10)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(k):
    x, y = subspaces(4, 7, 30), subspaces(5, 7, 30)
    overlap = subspace_overlap(inner_products(x, y), np.full((4, 5), k))
    for i in range(4):
        for j in range(5):
            angles = subspace_angles(x[i, :k].T, y[j, :k].T)
            assert overlap[i, j] == pytest.approx((np.cos(angles) ** 2).mean())


def test_overlap_with_a_k_of_its_own_for_each_pair():
    x = subspaces(3, 5, 12)
    k = np.array([[5, 2, 0], [2, 5, 1], [0, 1, 3]])
    overlap = subspace_overlap(inner_products(x, x), k)
    for i, j in np.ndindex(3, 3):
        top = k[i, j]
        expected = np.linalg.norm(x[i, :top] @ x[j, :top].T) ** 2 / top if top else np.nan
        np.testing.assert_allclose(overlap[i, j], expected)


def test_overlap_of_equal_rotated_and_orthogonal_subspaces():
    basis = subspaces(1, 12, 12)[0]
    x, y = basis[:4], basis[4:8]
    rotation = subspaces(1, 4, 4)[0]
    assert subspace_overlap(x @ (rotation @ x).T, 4) == pytest.approx(1)
    assert subspace_overlap(x @ y.T, 4) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("k", "d"), [(1, 8), (2, 10), (8, 40), (3, 4), (5, 5)])
def test_chance_is_what_random_subspaces_give(k, d):
    rng = np.random.default_rng(k * d)
    n = 4000
    x, y = subspaces(n, k, d, rng), subspaces(n, k, d, rng)
    overlap = subspace_overlap(x @ y.transpose(0, 2, 1), np.full(n, k))
    deviation = overlap_deviation(k, d)
    assert abs(overlap.mean() - expected_overlap(k, d)) <= 4 * deviation / np.sqrt(n) + 1e-12
    assert overlap.std() == pytest.approx(deviation, rel=0.08, abs=1e-7)


def test_chance_without_directions_is_nan():
    assert np.isnan(expected_overlap(0, 8))
    assert np.isnan(overlap_deviation(0, 8))


def test_cosine_is_that_of_the_dense_updates():
    a, b = RNG.standard_normal((4, 3, 20)), RNG.standard_normal((4, 15, 3))
    a[1], b[1] = a[0], -b[0]
    b[3] = 0
    sigma, left, right = singular_directions(a, b)
    cosine = update_cosine(inner_products(left, left), inner_products(right, right), sigma[:, None], sigma[None])
    dense = (b @ a).reshape(4, -1)
    norms = np.linalg.norm(dense, axis=1)
    np.testing.assert_allclose(cosine[:3, :3], (dense @ dense.T)[:3, :3] / np.outer(norms, norms)[:3, :3], atol=1e-12)
    assert cosine[0, 1] == pytest.approx(-1)
    assert np.isnan(cosine[3]).all()
