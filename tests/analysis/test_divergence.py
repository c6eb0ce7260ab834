"""Divergences against scipy, hand-computed cases and their mathematical properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial import distance
from scipy.stats import entropy, wasserstein_distance

from msplora_analysis.compute.measures.divergence import (
    FLOOR,
    jensen_shannon,
    js_matrices,
    kl,
    kl_matrices,
    normalise,
    pairwise_kl,
    wasserstein,
)
from msplora_analysis.errors import AnalysisError

sigmas = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


def spectra(n, r=5):
    return arrays(float, (n, r), elements=sigmas).filter(lambda rows: (rows.max(axis=1) > 0).all())


def test_normalise_by_hand():
    np.testing.assert_allclose(normalise([3, 1]), [0.75, 0.25])
    np.testing.assert_allclose(normalise([[3, 1], [0, 2]]), [[0.75, 0.25], [0, 1]])


def test_normalise_of_zero_is_nan_not_zero():
    assert np.isnan(normalise([[0, 0], [1, 1]])[0]).all()
    assert not np.isnan(normalise([[0, 0], [1, 1]])[1]).any()


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1e300, 1e308])
def test_normalise_keeps_extreme_scales_in_range(scale):
    np.testing.assert_allclose(normalise(np.array([1.0, 1.0]) * scale), [0.5, 0.5])


@pytest.mark.parametrize("bad", [[1, -1], [np.inf, 1]])
def test_normalise_refuses_what_is_no_spectrum(bad):
    with pytest.raises(AnalysisError, match="finite and not negative"):
        normalise(bad)


@pytest.mark.parametrize("bad", [[], 3.0, np.zeros((2, 0))])
def test_normalise_refuses_no_values(bad):
    with pytest.raises(AnalysisError, match="at least one"):
        normalise(bad)


def test_kl_by_hand():
    # 3/4 ln(3/4 / 1/2) + 1/4 ln(1/4 / 1/2)
    assert kl([3, 1], [1, 1]) == pytest.approx(0.75 * np.log(1.5) - 0.25 * np.log(2))
    assert kl([1, 1], [3, 1]) == pytest.approx(0.5 * np.log(2 / 3) + 0.5 * np.log(2))


def test_floor_makes_a_missing_direction_dear_but_finite():
    assert kl([1, 1], [1, 0]) == pytest.approx(0.5 * np.log(0.5) + 0.5 * np.log(0.5 / FLOOR))
    assert kl([1, 0], [1, 1]) == pytest.approx(np.log(2), rel=1e-5)


def test_what_rounding_leaves_of_a_zero_moves_nothing():
    exact = 3 / 4 * np.log(1 / 4 * 3) + 1 / 4 * np.log(1 / 4 / FLOOR)
    found = [float(kl([1, 1, 1, 1], [1, 1, 1, rest])) for rest in (0, 1e-20, 1e-12, 1e-9, 9e-7)]
    assert found == pytest.approx([exact] * 5, abs=1e-6)


def test_js_matrices_are_those_of_every_two():
    spectra = np.random.default_rng(0).random((3, 4, 5))
    found = js_matrices(spectra)
    assert found.shape == (3, 4, 4)
    assert found[1, 2, 3] == pytest.approx(float(jensen_shannon(spectra[1, 2], spectra[1, 3])))
    np.testing.assert_allclose(found, found.swapaxes(-1, -2))


@pytest.mark.parametrize("distance_of", [kl, jensen_shannon, wasserstein])
def test_zero_spectrum_gives_nan_on_either_side(distance_of):
    assert np.isnan(distance_of([0, 0], [1, 1]))
    assert np.isnan(distance_of([1, 1], [0, 0]))


@pytest.mark.parametrize("distance_of", [kl, jensen_shannon, wasserstein])
def test_unequal_lengths(distance_of):
    with pytest.raises(AnalysisError, match=r"3 and 2 values .* the same number"):
        distance_of([3, 2, 1], [3, 1])


def test_wasserstein_counts_places():
    assert wasserstein([1, 0, 0], [0, 0, 1]) == pytest.approx(2)
    assert wasserstein([1, 1, 0], [0, 1, 1]) == pytest.approx(1)


def test_pairwise_kl_is_i_given_j_and_broadcasts():
    rows = np.array([[4.0, 2, 1], [3, 3, 3], [5, 1, 0.1]])
    matrix = pairwise_kl(rows)
    for i in range(3):
        for j in range(3):
            assert matrix[i, j] == pytest.approx(entropy(rows[i], rows[j]))
    np.testing.assert_array_equal(matrix, kl(rows[:, None], rows[None]))
    assert matrix[0, 2] != pytest.approx(matrix[2, 0])


def test_pairwise_kl_of_a_zero_row_is_nan_there_only():
    matrix = pairwise_kl([[1, 1], [0, 0], [2, 1]])
    np.testing.assert_array_equal(np.isnan(matrix), [[0, 1, 0], [1, 1, 1], [0, 1, 0]])


def test_pairwise_kl_takes_a_matrix():
    with pytest.raises(AnalysisError, match=r"\(n, r\)"):
        pairwise_kl([1, 2, 3])
    assert pairwise_kl(np.ones((0, 3))).shape == (0, 0)


def test_kl_matrices_are_pairwise_kl():
    sets = np.random.default_rng(0).random((3, 5, 4))
    sets[1, 2] = 0
    sets[2, 1, 2:] = 0
    for one, many in zip(sets, kl_matrices(sets), strict=True):
        np.testing.assert_allclose(many, pairwise_kl(one), atol=1e-12)


@given(arrays(float, (2, 6), elements=st.floats(1e-2, 1e3)))
def test_agrees_with_scipy(rows):
    p, q = rows
    k = np.arange(1, 7)
    assert kl(p, q) == pytest.approx(entropy(p, q), rel=1e-12, abs=1e-14)
    root = np.nan_to_num(distance.jensenshannon(p, q))  # scipy takes the root of what rounding left below 0
    assert jensen_shannon(p, q) == pytest.approx(root**2, rel=1e-12, abs=1e-14)
    assert wasserstein(p, q) == pytest.approx(wasserstein_distance(k, k, p, q), rel=1e-12, abs=1e-12)


@given(spectra(2))
def test_bounds_and_symmetry(rows):
    p, q = rows
    assert 0 <= kl(p, q) <= -np.log(FLOOR) + 1e-9
    assert 0 <= jensen_shannon(p, q) <= np.log(2)
    assert jensen_shannon(p, q) == jensen_shannon(q, p)
    assert wasserstein(p, q) == pytest.approx(wasserstein(q, p), abs=1e-12)
    assert 0 <= wasserstein(p, q) <= 4


@given(spectra(2))
def test_zero_for_equal_and_only_for_equal(rows):
    p, q = rows
    for distance_of in (kl, jensen_shannon, wasserstein):
        assert distance_of(p, p) == 0
        assert distance_of(p, 3 * p) == pytest.approx(0, abs=1e-13)
        if np.abs(normalise(p) - normalise(q)).max() > 1e-6:
            assert distance_of(p, q) > 0


@given(spectra(4))
def test_pairwise_diagonal_is_exactly_zero(rows):
    assert (pairwise_kl(rows).diagonal() == 0).all()


def test_inputs_are_not_changed():
    p, q = np.array([3.0, 0, 1]), np.array([1.0, 1, 1])
    kl(p, q), jensen_shannon(p, q), wasserstein(p, q)
    np.testing.assert_array_equal(p, [3, 0, 1])
