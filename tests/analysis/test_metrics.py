"""Metrics against values worked out by hand."""

import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
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
from msplora_analysis.compute.measures.registry import Measure, columns, measures

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


NEW = """
    from msplora_analysis.compute.measures.registry import Measure

    @Measure("spread", label="spread", formula="sigma_1 - sigma_r", source="nobody", high="broad", {more})
    def spread(sigma):
        return sigma[..., 0] - sigma.min(axis=-1)
"""


@pytest.mark.parametrize(("more", "shown"), [('shown=("metrics", "report")', True), ('shown=("report",)', False)])
def test_a_new_measure_is_one_file(tmp_path, more, shown):
    (tmp_path / "a_new_file.py").write_text(textwrap.dedent(NEW.format(more=more)))
    script = f"""
        from msplora_analysis.compute import measures

        measures.__path__.append({str(tmp_path)!r})

        import msplora_analysis as ma

        ma.load_metrics("examples/runs/lora-8/checkpoint-45", cache=False).to_csv({str(tmp_path / "metrics.csv")!r})
        ma.load_spectra("examples/runs/lora-8/checkpoint-45", cache=False).to_csv({str(tmp_path / "spectra.csv")!r})
        from msplora_analysis.compute.measures.registry import measures

        assert [found.label for found in measures("report") if found.name == "spread"] == ["spread"]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    table = pd.read_csv(tmp_path / "metrics.csv")
    always = ["m_eff_1", "m_eff_2", "m_eff_4"]
    if shown:
        sigma = pd.read_csv(tmp_path / "spectra.csv").groupby("name", sort=False)["sigma"]
        np.testing.assert_allclose(table["spread"], sigma.max() - sigma.min())
    assert list(table.columns[-len(always) - shown :]) == [*always, "spread"][: len(always) + shown]


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="frobenius"):
        Measure("frobenius", label="", formula="", source="", high="")(lambda sigma: sigma)


def test_where_only_the_largest_values_are_known():
    """Of (4, 3, 1): the first two and the norm. What needs the third is empty."""
    norm = 26**0.5
    table = columns(measures("metrics", [2]), [np.array([4.0, 3.0]), np.array([4.0, 3.0, 1.0])], [norm, None])
    empty = {name for name, (cut, _) in table.items() if np.isnan(cut)}
    assert empty == {"nuclear", "effective_rank", "participation_ratio", "m_eff_2"}
    for name in table.keys() - empty:
        assert table[name][0] == pytest.approx(table[name][1])


def test_a_place_says_which_of_a_family_it_shows():
    assert [of.name for of in measures("live")] == ["frobenius", "effective_rank", "m_eff_1", "m_eff_4"]
    assert [of.name for of in measures("matrices")][-2:] == ["rank_needed_90", "rank_needed_99"]
    k90 = measures("matrices")[-2]
    assert (k90.symbol, k90.label) == ("k90", "directions for 90 % of Σσ²")
    assert k90.function([4.0, 2.0, 1.0, 1.0]) == 2
