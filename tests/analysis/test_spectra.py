"""Singular values against dense float64 SVD, and against mpmath where float64 cannot tell."""

import mpmath
import numpy as np
import pytest
import torch
from adapters import assert_promised, lora_config, lora_tensors, write_adapter
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from msplora_analysis import AnalysisError, load_spectra
from msplora_analysis.compute.linalg.spectra import singular_values

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def stored(values: np.ndarray, kind: torch.dtype) -> np.ndarray:
    """Values as a file of that type holds them, in float64."""
    return torch.from_numpy(values).to(kind).double().numpy()


def spectrum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return singular_values(a[None], b[None])[0]


def exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Singular values of b @ a in 80 digits, as float64."""
    with mpmath.workdps(80):
        product = mpmath.matrix(b.tolist()) * mpmath.matrix(a.tolist())
        sigma = mpmath.svd_r(product, compute_uv=False)
        sigma = sorted((float(value) for value in sigma), reverse=True)
    rank = len(a)
    return np.array((sigma + [0.0] * rank)[:rank])


def orthonormal(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, cols)))[0]


def random(rng, r, rows, cols):
    return rng.standard_normal((r, cols)), rng.standard_normal((rows, r))


def graded_rows(rng, r, rows, cols):
    a, b = random(rng, r, rows, cols)
    return a * np.logspace(0, -4, r)[:, None], b


def graded_in_both(rng, r, rows, cols):
    a, b = random(rng, r, rows, cols)
    return a * np.logspace(0, -4, r)[:, None], b * np.logspace(0, -3, r)


def graded_and_rotated(rng, r, rows, cols):
    rotation = orthonormal(rng, r, r)
    grades = np.diag(np.logspace(0, -4, r))
    return rotation @ grades @ orthonormal(rng, cols, r).T, orthonormal(rng, rows, r) @ grades @ rotation.T


def misaligned(rng, r, rows, cols):
    """The large directions of each factor meet the small ones of the other."""
    rotation = orthonormal(rng, r, r)
    down, up = np.diag(np.logspace(0, -6, r)), np.diag(np.logspace(-6, 0, r))
    return rotation @ down @ orthonormal(rng, cols, r).T, orthonormal(rng, rows, r) @ up @ rotation.T


def nearly_cancelling(rng, r, rows, cols):
    half = r // 2
    a, b = random(rng, r, rows, cols)
    a[half : 2 * half] = a[:half] + 1e-5 * rng.standard_normal((half, cols))
    b[:, half : 2 * half] = -b[:, :half]
    b[:, 2 * half :] = 0
    return a, b


def nearly_dependent_rows(rng, r, rows, cols):
    return 1 + 1e-3 * rng.standard_normal((r, cols)), 1 + 1e-3 * rng.standard_normal((rows, r))


def rank_deficient(rng, r, rows, cols):
    a, b = random(rng, r, rows, cols)
    a[-1] = a[0]
    b[:, r // 2] = b[:, 0]
    return a, b


def zero_rows_and_columns(rng, r, rows, cols):
    a, b = random(rng, r, rows, cols)
    a[0], b[:, -1], a[:, 1], b[2] = 0, 0, 0, 0
    return a, b


CASES = [
    random,
    graded_rows,
    graded_in_both,
    graded_and_rotated,
    misaligned,
    nearly_cancelling,
    nearly_dependent_rows,
    rank_deficient,
    zero_rows_and_columns,
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("shape", [(4, 9, 11), (6, 6, 12)], ids=str)
def test_hard_cases_in_every_type(case, kind, shape):
    rng = np.random.default_rng(len(case.__name__))
    a, b = (stored(factor, kind) for factor in case(rng, *shape))
    assert_promised(spectrum(a, b), exact(a, b))


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    kind=st.sampled_from(TYPES),
    r=st.integers(2, 12),
    rows=st.integers(12, 40),
    cols=st.integers(12, 40),
    seed=st.integers(0, 2**32 - 1),
    exponents=st.sampled_from([(0, 0), (30, 0), (0, -30), (30, 30), (-30, -30), (30, -30)]),
)
def test_against_dense_svd(case, kind, r, rows, cols, seed, exponents):
    a, b = (stored(factor, kind) for factor in case(np.random.default_rng(seed), r, rows, cols))
    dense = np.linalg.svd(b @ a, compute_uv=False)[:r]
    # Below, float64 cannot tell: test_hard_cases_in_every_type does.
    assume(dense[0] >= 1e-4 * np.linalg.norm(a) * np.linalg.norm(b))
    scale_a, scale_b = (10.0**exponent for exponent in exponents)
    assert_promised(spectrum(a * scale_a, b * scale_b) / scale_a / scale_b, dense)


@pytest.mark.parametrize(("scale_a", "scale_b"), [(1e-200, 1e100), (1e200, 1e-250), (1e-170, 1e-100), (1e150, 1e150)])
def test_factors_whose_squares_leave_float64(scale_a, scale_b):
    a, b = random(np.random.default_rng(0), 3, 8, 7)
    sigma = spectrum(a * scale_a, b * scale_b)
    np.testing.assert_allclose(sigma / scale_a / scale_b, spectrum(a, b), rtol=1e-12)


def test_rows_that_differ_by_more_than_float64_squares_hold():
    a, b = random(np.random.default_rng(0), 2, 8, 7)
    expected = spectrum(a, b)
    np.testing.assert_allclose(spectrum(a * [[1], [1e-250]], b * [1, 1e250]), expected, rtol=1e-9)


def test_zero_factor_gives_exact_zeros():
    a, b = random(np.random.default_rng(0), 3, 8, 7)
    assert (spectrum(a, 0 * b) == 0).all()
    assert (spectrum(0 * a, b) == 0).all()
    assert (spectrum(0 * a, 0 * b) == 0).all()


def test_parts_that_cancel_exactly_give_zeros():
    a, b = random(np.random.default_rng(0), 3, 40, 30)
    sigma = spectrum(np.concatenate([a, a]), np.concatenate([b, -b], axis=1))
    assert (sigma == 0).all()


@pytest.mark.parametrize(("rows", "cols"), [(2, 9), (9, 2), (3, 3), (1, 1)])
def test_rank_above_the_dimensions(rows, cols):
    a, b = random(np.random.default_rng(0), 5, rows, cols)
    sigma = spectrum(a, b)
    assert (sigma[min(rows, cols) :] == 0).all()
    assert_promised(sigma, exact(a, b))


def test_rank_one():
    a, b = np.array([[3.0, 4.0]]), np.array([[1.0], [2.0], [2.0]])
    np.testing.assert_allclose(spectrum(a, b), [15.0])


def test_stacks_do_not_mix():
    rng = np.random.default_rng(0)
    pairs = [case(rng, 4, 9, 11) for case in CASES]
    pairs.append((np.full((4, 11), np.nan), np.ones((9, 4))))
    stacked = singular_values(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))
    for (a, b), sigma in zip(pairs[:-1], stacked, strict=False):
        np.testing.assert_allclose(sigma, spectrum(a, b), rtol=1e-9, atol=1e-12 * sigma[0])
    assert np.isnan(stacked[-1]).all()


def test_factors_of_rank_64():
    rng = np.random.default_rng(0)
    rotation = orthonormal(rng, 64, 64)
    values = np.logspace(1, -3, 64)
    a = np.diag(values) @ rotation @ orthonormal(rng, 2048, 64).T
    b = orthonormal(rng, 512, 64)
    assert_promised(spectrum(a, b), values)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(TYPES), seed=st.integers(0, 2**32 - 1), alpha=st.floats(0.01, 100))
def test_through_a_file_of_every_type(tmp_path, kind, seed, alpha):
    rng = np.random.default_rng(seed)
    factors = {f"layer.{i}.{name}": graded_rows(rng, 4, 9, 8 + i) for i in range(3) for name in ("q", "v")}
    config = lora_config(r=4, lora_alpha=alpha)
    folder = write_adapter(tmp_path / "a", config=config)
    save_file(
        {
            f"base_model.model.{name}.lora_{factor}.weight": torch.from_numpy(values).to(kind)
            for name, pair in factors.items()
            for factor, values in zip("AB", pair, strict=True)
        },
        folder / "adapter_model.safetensors",
    )
    spectra = load_spectra(folder)
    assert len(spectra) == 24
    for name, rows in spectra.groupby("name"):
        a, b = (stored(factor, kind) for factor in factors[name])
        assert_promised(rows["sigma"].to_numpy(), np.linalg.svd(alpha / 4 * b @ a, compute_uv=False)[:4])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_nan_and_inf_are_errors_that_name_the_tensor(tmp_path, value, factor):
    tensors = lora_tensors("layer.0.query", "layer.1.query", "layer.2.query")
    name = f"base_model.model.layer.1.query.lora_{factor}.weight"
    tensors[name][1, 1] = value
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(AnalysisError) as caught:
        load_spectra(folder)
    assert str(caught.value) == (
        f"{folder}/adapter_model.safetensors: tensor {name} holds NaN or Inf; the training diverged before "
        "this was saved: leave this checkpoint out"
    )


def test_overflow_of_the_product_is_an_error(tmp_path):
    tensors = {name: values.astype(np.float64) * 1e200 for name, values in lora_tensors("layer.0.query").items()}
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(AnalysisError, match=r"the singular values of layer\.0\.query exceed float64"):
        load_spectra(folder)
