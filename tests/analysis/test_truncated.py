"""The largest singular values of large matrices against LAPACK, and the bounds that go with them."""

import numpy as np
import pytest
from adapters import assert_promised

from msplora_analysis.compute.linalg import truncated
from msplora_analysis.compute.linalg.truncated import largest, matrix_spectrum


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    """Matrices that are quick to decompose take the way of large ones."""
    monkeypatch.setattr(truncated, "SMALL", 64)


def with_spectrum(rows, cols, sigma, seed=0):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, len(sigma))))[0] for n in (rows, cols))
    return left * sigma @ right.T


def noise(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols))


CASES = {
    "decay": lambda: with_spectrum(700, 500, np.arange(1, 501) ** -1.0),
    "fast decay": lambda: with_spectrum(500, 700, 10.0 ** -np.linspace(0, 14, 500)),
    "low rank, and noise": lambda: with_spectrum(600, 500, np.linspace(3, 1, 6)) + 1e-3 * noise(600, 500),
    "exactly low rank": lambda: with_spectrum(600, 500, np.linspace(3, 1, 5)),
    "flat": lambda: noise(700, 450),
    "all equal": lambda: np.linalg.qr(noise(600, 450))[0],
    "pairs": lambda: with_spectrum(600, 450, np.repeat(np.linspace(5, 1, 40), 2)),
    "one large": lambda: with_spectrum(600, 450, np.r_[1e6, np.ones(449)]),
    "one outlying entry": lambda: noise(600, 450) + 1e4 * np.eye(600, 450, 3) * (np.arange(600) == 7)[:, None],
    "huge": lambda: 1e200 * with_spectrum(600, 450, np.arange(1, 451) ** -1.0),
    "tiny": lambda: 1e-200 * with_spectrum(600, 450, np.arange(1, 451) ** -1.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 20])
def test_largest_are_lapacks_within_the_bound(case, k):
    matrix = CASES[case]()
    exact = np.linalg.svd(matrix, compute_uv=False)
    sigma, bound, *_ = largest(matrix, k)
    assert sigma.shape == bound.shape == (k,)
    rounding = 1e-13 * exact[0]
    assert (np.abs(sigma - exact[:k]) <= bound + rounding).all()
    assert (bound <= 1e-5 * np.maximum(sigma, exact[0] / 100)).all()
    assert (np.diff(sigma) <= 0).all()
    assert_promised(sigma, exact[:k])


@pytest.mark.parametrize("case", ["decay", "flat", "huge"])
def test_torch_gives_what_numpy_does(case):
    torch = pytest.importorskip("torch")
    matrix = CASES[case]()
    for options in ({}, {"vectors": True}):
        ours, theirs = largest(matrix, 20, **options), largest(torch.from_numpy(matrix), 20, **options)
        np.testing.assert_allclose(theirs.sigma, ours.sigma, rtol=1e-5)
        assert theirs.left.shape == ours.left.shape


@pytest.mark.slow
def test_krylov_does_not_fall_back_where_the_spectrum_decays(monkeypatch):
    matrix = CASES["decay"]()
    monkeypatch.setattr(truncated, "_dense", None)
    largest(matrix, 20)


@pytest.mark.parametrize("shape", [(50, 600), (600, 300)], ids=["small side", "k near the small side"])
def test_all_from_lapack(shape):
    matrix = noise(*shape)
    exact = np.linalg.svd(matrix, compute_uv=False)
    k = min(shape) - 10
    np.testing.assert_allclose(largest(matrix, k)[0], exact[:k], rtol=1e-13)


def test_zeros():
    found = matrix_spectrum(np.zeros((600, 500)), 4)
    assert found.sigma.tolist() == largest(np.zeros((600, 500)), 4).bound.tolist() == [0] * 4
    assert found.frobenius == 0


def test_same_values_every_time():
    matrix = CASES["decay"]()
    np.testing.assert_array_equal(largest(matrix, 20)[0], largest(matrix, 20)[0])


@pytest.mark.parametrize(
    ("shape", "top_k", "count", "whole"),
    [
        ((64, 600), None, 64, True),
        ((64, 600), 8, 8, False),
        ((600, 200), None, truncated.TOP_K, False),
        ((600, 200), 300, 200, True),
    ],
)
def test_how_many(shape, top_k, count, whole):
    matrix = 1e200 * noise(*shape)
    found = matrix_spectrum(matrix, top_k)
    assert (len(found.sigma), found.frobenius is None) == (count, whole)
    exact = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(found.sigma, exact[:count], rtol=1e-9)
    if not whole:
        np.testing.assert_allclose(found.frobenius, exact[0] * np.sqrt(((exact / exact[0]) ** 2).sum()), rtol=1e-12)
