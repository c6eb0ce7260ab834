"""Directions and the file of moments, against dense matrices."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from msplora_core.errors import TrainingError
from msplora_core.moments import ModuleMoments, Moments, directions, read_moments


def square_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


@pytest.fixture
def update():
    """A, B, and the inputs x and output gradients g of 300 tokens, of very uneven size."""
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0.01, 10, 40)
    return (
        rng.normal(size=(6, 40)),
        rng.normal(size=(50, 6)),
        rng.normal(size=(300, 40)) * sizes,
        rng.normal(size=(300, 50)),
    )


def test_task_weighted_singular_values_are_those_of_the_dense_product(update):
    a, b, x, g = update
    ax, bg = x @ a.T, g @ b
    found = directions(ax.T @ ax / len(x), bg.T @ bg / len(g))

    weighted = square_root(g.T @ g / len(g)) @ b @ a @ square_root(x.T @ x / len(x))
    np.testing.assert_allclose(found.sigma, np.linalg.svd(weighted, compute_uv=False)[:6], rtol=1e-9)
    np.testing.assert_allclose(b @ found.left @ found.right @ a, b @ a, rtol=1e-9)


def test_leading_directions_are_the_best_update_of_their_rank(update):
    a, b, x, g = update
    ax, bg = x @ a.T, g @ b
    found = directions(ax.T @ ax / len(x), bg.T @ bg / len(g))
    outer, inner = square_root(g.T @ g / len(g)), square_root(x.T @ x / len(x))
    for k in range(6):
        lost = b @ a - b @ found.left[:, :k] @ found.right[:k] @ a
        np.testing.assert_allclose(np.linalg.norm(outer @ lost @ inner), np.linalg.norm(found.sigma[k:]), rtol=1e-9)


def test_gram_matrices_give_the_plain_spectrum(update):
    a, b, _, _ = update
    plain = directions(a @ a.T, b.T @ b).sigma
    np.testing.assert_allclose(plain, np.linalg.svd(b @ a, compute_uv=False)[:6], rtol=1e-9)


def test_an_update_that_the_task_never_sees_is_worth_nothing():
    assert directions(np.zeros((3, 3)), np.eye(3)).sigma.tolist() == [0, 0, 0]


def moments_of_one_module():
    rng = np.random.default_rng(1)
    scores = {"plain": rng.normal(size=(4, 3)).astype(np.float32)}
    module = ModuleMoments(("global", "layer"), (2, 1), np.eye(3), 2 * np.eye(3), np.ones((2, 2)), scores)
    return Moments({"encoder.layer.0.query": module}, {"examples": 4, "labels": "sampled"})


def test_a_file_of_moments_comes_back_as_it_was(tmp_path):
    written = moments_of_one_module()
    found = read_moments(written.save(tmp_path / "moments.safetensors"))
    assert found.about == written.about
    (name,), (module,) = found.modules, found.modules.values()
    assert (name, module.scales, module.ranks) == ("encoder.layer.0.query", ("global", "layer"), (2, 1))
    np.testing.assert_array_equal(module.s_b, 2 * np.eye(3))
    np.testing.assert_array_equal(module.scores["plain"], written.modules[name].scores["plain"])
    assert module.part("layer") == slice(2, 3)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_of_something_else_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "moments.safetensors"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"moments\.safetensors"):
        read_moments(path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 99}, "moments of version 99, expected 1"),
        ({"version": "1"}, "version must be a whole number, got '1'"),
        ({"modules": {"x": {"scales": [{}], "ranks": [1]}}}, "scales[0] must be"),
        ({"modules": {"x": {"scales": ["layer"], "ranks": [None]}}}, "ranks[0] must be"),
        ({"modules": []}, "modules must be"),
        ({"about": {"draws": "many"}}, "draws must be"),
        ({"about": {"draws": 0}}, "draws must be at least 1, got 0"),
        ({"about": {"examples": [1]}}, "examples must be"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused_by_what_is_wrong_in_it(tmp_path, changes, told):
    head = {"version": 1, "modules": {}, "about": {}} | changes
    save_file({"x": np.zeros(1)}, tmp_path / "moments.safetensors", {"msplora_moments": json.dumps(head)})
    with pytest.raises(TrainingError, match=re.escape(told)):
        read_moments(tmp_path / "moments.safetensors")


def test_predicted_kl_is_half_the_mean_square_of_the_summed_scores():
    assert moments_of_one_module().predicted_kl(np.array([1.0, -3.0])) == 2.5
