"""merge against dense float64 references: every method, weights, ranks, names of other trainers."""

import numpy as np
import pytest
from adapters import lora_config, lora_tensors, write_adapter
from moment_cases import lora_factors, random_tokens, write_moments
from safetensors.numpy import load_file
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import cli
from msplora_analysis.compute.merging import methods

NAME = "layer.0.query"
KEY = f"base_model.model.{NAME}"
WEIGHTS = [1.0, 0.5, 0.25]


def dense(folder, scaling=1.0):
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"{KEY}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    return scaling * b @ a


@pytest.fixture
def three(tmp_path):
    """Adapters of rank 2, scaling 2."""
    return [write_adapter(tmp_path / f"{i}", lora_tensors(NAME, rows=9, cols=8, seed=i)) for i in range(3)]


def merged(three, **settings):
    out = three[0].parent / "out"
    ma.merge(three, out, dtype="float64", overwrite=True, **settings)
    return dense(out)


def top(matrix, k):
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :k] * sigma[:k]) @ vt[:k]


def ties(updates, density):
    kept = []
    for update in updates:
        least = np.sort(np.abs(update), axis=None)[-max(1, int(density * update.size))]
        kept.append(np.where(np.abs(update) >= least, update, 0))
    sign = np.sign(sum(kept))
    agree = [np.where(np.sign(one) == sign, one, 0) for one in kept]
    return sum(agree) / np.maximum(sum(one != 0 for one in agree), 1)


def by_ties(updates):
    return top(ties(updates, 0.5), 6)


def by_knots(updates):
    n = updates[0].shape[1]
    u, sigma, vt = np.linalg.svd(np.concatenate([x / w for x, w in zip(updates, WEIGHTS, strict=True)], axis=1))
    vt = vt[:6]
    own = [w * vt[:, i * n : (i + 1) * n] for i, w in enumerate(WEIGHTS)]
    return (u[:, :6] * sigma[:6]) @ ties(own, 0.5)


def by_tsv(updates):
    us, ss, vs = [], [], []
    for update in updates:
        u, s, vt = np.linalg.svd(update)
        us.append(u[:, :2]), ss.append(s[:2]), vs.append(vt[:2].T)
    sides = []
    for side in (us, vs):
        p, _, q = np.linalg.svd(np.concatenate(side, axis=1), full_matrices=False)
        sides.append(p @ q)
    return (sides[0] * np.concatenate(ss)) @ sides[1].T


def by_iso(updates):
    u, sigma, vt = np.linalg.svd(sum(updates))
    return sigma[:6].mean() * u[:, :6] @ vt[:6]


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        ("cat", sum),
        ("svd", lambda updates: top(sum(updates), 2)),
        ("ties", by_ties),
        ("knots", by_knots),
        ("tsv", by_tsv),
        ("iso", by_iso),
    ],
)
def test_a_method_is_what_it_is_of_dense_updates(three, method, reference):
    updates = [w * dense(path, 2.0) for w, path in zip(WEIGHTS, three, strict=True)]
    np.testing.assert_allclose(merged(three, method=method, weights=WEIGHTS), reference(updates), atol=1e-8)


def test_linear_adds_the_factors_as_peft_does(three):
    tensors = [load_file(path / "adapter_model.safetensors") for path in three]
    roots = np.sqrt(2.0 * np.array(WEIGHTS))
    a, b = (
        sum(root * of[f"{KEY}.lora_{side}.weight"].astype(np.float64) for root, of in zip(roots, tensors, strict=True))
        for side in "AB"
    )
    np.testing.assert_allclose(merged(three, method="linear", weights=WEIGHTS), b @ a, atol=1e-10)


def test_dare_of_all_entries_is_the_sum_and_of_some_is_so_in_the_mean(three):
    whole = sum(dense(path, 2.0) for path in three)
    np.testing.assert_allclose(merged(three, method="dare", density=1.0), whole, atol=1e-8)
    draws = [merged(three, method="dare", density=0.5, seed=seed, rank=8) for seed in range(60)]
    spread = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - whole) < 5 * spread).all()


def test_lego_finds_units_that_adapters_share(tmp_path):
    pytest.importorskip("sklearn")
    tensors = lora_tensors(NAME, rows=9, cols=8, seed=1)
    turned = dict(tensors)
    mix = np.array([[0.6, 0.8], [-0.8, 0.6]], np.float32)  # other factors of the same update
    turned[f"{KEY}.lora_A.weight"] = mix @ tensors[f"{KEY}.lora_A.weight"]
    turned[f"{KEY}.lora_B.weight"] = tensors[f"{KEY}.lora_B.weight"] @ mix.T
    paths = [write_adapter(tmp_path / "one", tensors), write_adapter(tmp_path / "two", turned)]
    np.testing.assert_allclose(merged(paths, method="lego"), dense(paths[0], 2.0), atol=1e-5)


@pytest.mark.parametrize("method", ["cat", "svd", "ties", "dare", "knots", "tsv", "iso", "lego"])
def test_rank_and_energy_bound_the_result(three, method):
    if method == "lego":
        pytest.importorskip("sklearn")
    table = ma.merge(three, three[0].parent / "small", method=method, rank=3)
    assert table["rank"].max() <= 3
    whole = merged(three, method=method)
    sigma = np.linalg.svd(merged(three, method=method, energy=0.6), compute_uv=False)
    if method != "svd":  # of which energy takes the place of its rank
        share = np.cumsum(np.linalg.svd(whole, compute_uv=False) ** 2) / np.linalg.norm(whole) ** 2
        assert (sigma > 1e-8).sum() <= 1 + np.searchsorted(share, 0.6)


def test_every_method_is_tried_here():
    assert set(methods()) == {"cat", "svd", "linear", "ties", "dare", "knots", "tsv", "iso", "lego"}


def test_a_module_that_one_adapter_has_stays(tmp_path):
    one = write_adapter(tmp_path / "one", lora_tensors(NAME, "layer.1.query"))
    two = write_adapter(tmp_path / "two", lora_tensors(NAME, seed=1))
    table = ma.merge([one, two], tmp_path / "out", method="cat")
    assert dict(zip(table["name"], table["adapters"], strict=True)) == {NAME: 2, "layer.1.query": 1}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "average"}, "method=average: expected one of cat"),
        ({"weights": [1.0]}, "expected one for each of the 3 adapters"),
        ({"weights": [0.0, 0.0, 0.0]}, "not all 0"),
        ({"rank": 2, "energy": 0.5}, "one of rank=, energy= and kl="),
        ({"energy": 1.5}, "energy=1.5"),
        ({"density": 0.0}, "density=0"),
        ({"method": "linear", "weights": [1, 1, -1]}, "above 0"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_stays(three, tmp_path, settings, told):
    with pytest.raises(ma.AnalysisError, match=told):
        ma.merge(three, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_linear_takes_one_rank(three, tmp_path):
    other = write_adapter(tmp_path / "other", lora_tensors(NAME, rank=3, rows=9, cols=8), lora_config(r=3))
    with pytest.raises(ma.AnalysisError, match="one rank"):
        ma.merge([three[0], other], tmp_path / "out", method="linear")


def test_the_command_merges_and_says_what(three, tmp_path):
    options = ["--out", str(tmp_path / "out"), "--method", "cat", "--weight", "1", "--weight", "0.5", "--weight", "2"]
    done = CliRunner().invoke(cli.make_app(), ["merge", *map(str, three), *options])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out") in done.stdout
    expected = sum(w * dense(path, 2.0) for w, path in zip([1, 0.5, 2], three, strict=True))
    np.testing.assert_allclose(dense(tmp_path / "out"), expected, atol=1e-4)


def test_kl_cuts_each_part_by_its_own_task(tmp_path):
    paths, names = [], ("layer.0.query", "layer.1.query")
    for seed in (1, 2):
        tensors = lora_tensors(*names, rank=3, rows=9, cols=8, seed=seed)
        folder = write_adapter(tmp_path / f"{seed}", tensors, lora_config(r=3, lora_alpha=6))
        tokens = {name: random_tokens(9, 8, seed=10 * seed + i) for i, name in enumerate(names)}
        write_moments(folder, lora_factors(tensors), tokens)
        paths.append(folder)
    kl = 0.2 * ma.compress(paths[0], tmp_path / "least", rank=1).attrs["predicted_kl"]
    table = ma.merge(paths, tmp_path / "out", method="cat", weights=[1, 0.5], kl=kl)
    assert max(table.attrs["predicted_kl"]) <= kl
    assert table["rank"].sum() < 12
    # a half of an adapter costs a quarter
    cuts = [ma.compress(path, tmp_path / f"cut{i}", kl=kl * 4**i) for i, path in enumerate(paths)]
    assert table["rank"].sum() == sum(cut["rank"].sum() for cut in cuts)
    np.testing.assert_allclose(
        table.attrs["predicted_kl"], [cut.attrs["predicted_kl"] / 4**i for i, cut in enumerate(cuts)], rtol=1e-6
    )
    ma.merge([tmp_path / "cut0", tmp_path / "cut1"], tmp_path / "both", method="cat", weights=[1, 0.5])
    whole = tmp_path / "both", tmp_path / "out"
    for name in names:
        assert ma.relate(*whole).set_index("name").loc[name, "norm_difference"] < 1e-5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "cat", "kl": 0.1}, "/0/adapter_model.*kl=0.1 needs scores, and it has no moments.*msplora-measure"),
        ({"method": "svd", "kl": 0.1}, "give method=cat"),
        ({"method": "cat", "kl": 0.0}, "above 0"),
        ({"method": "cat", "kl": 0.1, "rank": 2}, "give one of"),
    ],
)
def test_kl_says_what_it_needs(three, settings, told):
    with pytest.raises(ma.AnalysisError, match=told):
        merged(three, **settings)
