"""Metrics against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from msplora_analysis.compute.measures.metrics import (
    effective_rank,
    frobenius,
    m_eff,
    nuclear,
    participation_ratio,
    stable_rank,
)

RATIOS = [effective_rank, stable_rank, participation_ratio, lambda s: m_eff(s, 1), lambda s: m_eff(s, 9)]


def test_by_hand():
    sigma = [4.0, 3.0, 1.0]  # p = 1/2, 3/8, 1/8
    assert m_eff(sigma, 1) == pytest.approx(0.5)
    assert m_eff(sigma, 2) == pytest.approx(0.875)
    assert nuclear(sigma) == pytest.approx(8)
    assert frobenius(sigma) == pytest.approx(26**0.5)
    assert stable_rank(sigma) == pytest.approx(26 / 16)
    assert participation_ratio(sigma) == pytest.approx(26**2 / (256 + 81 + 1))
    # exp(H): 2^(1/2) * (8/3)^(3/8) * 8^(1/8)
    assert effective_rank(sigma) == pytest.approx(2**0.5 * (8 / 3) ** 0.375 * 8**0.125)


@pytest.mark.parametrize("r", [1, 3, 8])
def test_flat_spectrum_has_full_rank_and_a_single_value_has_rank_one(r):
    for ratio in (effective_rank, stable_rank, participation_ratio):
        assert ratio(np.full(r, 0.3)) == pytest.approx(r)
        assert ratio([0.3] + [0.0] * (r - 1)) == pytest.approx(1)


def test_k_of_at_least_the_length_gives_exactly_one():
    sigma = np.random.default_rng(0).random((50, 3))
    assert (m_eff(sigma, 3) == 1).all()
    assert (m_eff(sigma, 100) == 1).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_all_zero_spectrum_has_no_ratio(ratio):
    values = ratio([[0.0, 0.0], [2.0, 2.0]])
    assert np.isnan(values[0])
    assert np.isfinite(values[1])


def test_all_zero_spectrum_has_norms():
    assert frobenius([0.0, 0.0]) == 0
    assert nuclear([0.0, 0.0]) == 0


spectra = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(1e-150, 1e150)).map(lambda s: np.sort(s)[::-1])


@given(spectra, st.sampled_from([1e-100, 3.0, 1e100]))
def test_ratios_do_not_depend_on_scale_and_ignore_padding(sigma, scale):
    for ratio in RATIOS:
        value = ratio(sigma)
        assert ratio(sigma * scale) == pytest.approx(value, rel=1e-9)
        assert ratio(np.append(sigma, np.zeros(4))) == pytest.approx(value, rel=1e-12)


@given(spectra)
def test_order_of_the_measures(sigma):
    r = len(sigma)
    assert 1 - 1e-9 <= stable_rank(sigma) <= r + 1e-9
    assert stable_rank(sigma) - 1e-9 <= participation_ratio(sigma) + 1e-9
    assert 1 - 1e-9 <= effective_rank(sigma) <= r + 1e-9
    assert 1 / r - 1e-9 <= m_eff(sigma, 1) <= m_eff(sigma, 2) <= 1
    assert sigma[0] * (1 - 1e-9) <= frobenius(sigma) <= nuclear(sigma) * (1 + 1e-9)


def test_batches_over_leading_axes():
    sigma = np.sort(np.random.default_rng(0).random((4, 5, 6)))[..., ::-1]
    for ratio in RATIOS:
        assert ratio(sigma).shape == (4, 5)
        assert ratio(sigma)[2, 3] == pytest.approx(ratio(sigma[2, 3]))
