"""Compression in the metric of the task: against dense G and C, PEFT, and every cut that there is."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from adapters import lora_config, lora_tensors, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from moment_cases import lora_factors, random_tokens, update_of, write_moments
from safetensors.numpy import load_file
from test_task_weighted import NAMES, lora, msplora_case, run  # noqa: F401  (fixtures)

import msplora_analysis as ma
from msplora_analysis import AnalysisError
from msplora_analysis.ask.advice.calibrated import OF_MODULES, OF_RANKS, in_words
from msplora_analysis.compute.choose import below_kl
from msplora_core.moments import read_moments

PREFIX = "base_model.model."
ROOT = Path(__file__).parents[2]


def updates(folder):
    """The update of each module, dense: α / r is 1 in what compress writes."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    pairs = {name: (tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]) for name in names}
    return {name.removeprefix(PREFIX): b.astype(float) @ a.astype(float) for name, (b, a) in pairs.items()}


def best(tokens, update, k):
    """The update of rank k nearest to ``update`` in the norm of G^½ · C^½, by the dense decomposition."""
    u, sigma, vt = np.linalg.svd(tokens.weighted(update))
    return np.linalg.solve(tokens.root_out(), u[:, :k] * sigma[:k] @ vt[:k]) @ np.linalg.inv(tokens.root_in())


@pytest.mark.parametrize("k", [1, 2])
def test_lora_is_cut_to_the_best_update_in_the_weighted_norm(lora, tmp_path, k):  # noqa: F811
    folder, factors, tokens = lora
    table = ma.compress(folder, tmp_path / "out", rank=k, dtype="float64").set_index("name")
    found = updates(tmp_path / "out")
    for name in NAMES:
        update = update_of(factors[name])
        np.testing.assert_allclose(found[name], best(tokens[name], update, k), rtol=1e-6, atol=1e-6)
        lost = update - found[name]
        task_error = np.linalg.norm(tokens[name].weighted(lost)) / np.linalg.norm(tokens[name].weighted(update))
        assert table["task_error"][name] == pytest.approx(task_error, rel=1e-6)
        assert table["task_energy"][name] == pytest.approx(1 - task_error**2, rel=1e-6)
        assert table["error"][name] == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(update), rel=1e-6)


def test_msplora_is_cut_to_the_best_update_in_the_weighted_norm(tmp_path):
    factors, tokens = msplora_case(tmp_path / "a")
    ma.compress(tmp_path / "a", tmp_path / "out", rank=2, dtype="float64")
    found = updates(tmp_path / "out")
    for name in factors:
        np.testing.assert_allclose(found[name], best(tokens[name], update_of(factors[name]), 2), rtol=1e-6, atol=1e-6)


def test_without_weights_the_cut_is_the_plain_one_and_its_task_error_is_told(lora, tmp_path):  # noqa: F811
    folder, factors, tokens = lora
    with_columns = ma.compress(folder, tmp_path / "a", rank=1, weights="none")
    plain = ma.compress(folder, tmp_path / "b", rank=1, moments="none")
    assert list(plain) == [name for name in with_columns if not name.startswith("task")]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    kept = updates(tmp_path / "a")
    for row in with_columns.itertuples():
        update, of = update_of(factors[row.name]), tokens[row.name]
        error = np.linalg.norm(of.weighted(update - kept[row.name])) / np.linalg.norm(of.weighted(update))
        assert row.task_error == pytest.approx(error, rel=1e-5)


def test_at_full_rank_nothing_changes(lora, tmp_path):  # noqa: F811
    folder, factors, _ = lora
    for i, choice in enumerate(({"rank": 3}, {"rank": 99}, {"energy": 1.0}, {"budget": 10**6})):
        table = ma.compress(folder, tmp_path / str(i), dtype="float64", **choice)
        assert table["task_error"].tolist() == [0, 0, 0]
        for name, update in updates(tmp_path / str(i)).items():
            np.testing.assert_allclose(update, update_of(factors[name]), rtol=1e-12, atol=1e-12)


def test_full_rank_keeps_what_the_task_never_saw(tmp_path):
    tensors = lora_tensors("layer.0.query", rank=3)
    folder = write_adapter(tmp_path / "a", tensors, lora_config(r=3, lora_alpha=6))
    factors = lora_factors(tensors)
    write_moments(folder, factors, {"layer.0.query": random_tokens(5, 6, examples=2, tokens=1)})  # S has rank 2
    ma.compress(folder, tmp_path / "full", rank=3)
    np.testing.assert_allclose(updates(tmp_path / "full")["layer.0.query"], update_of(factors["layer.0.query"]), 1e-5)
    assert ma.compress(folder, tmp_path / "seen", energy=1.0)["rank"].tolist() == [2]


def test_energy_and_budget_are_of_the_weighted_spectrum(lora, tmp_path):  # noqa: F811
    folder, factors, tokens = lora
    sigma = {n: np.linalg.svd(tokens[n].weighted(update_of(factors[n])), compute_uv=False)[:3] for n in NAMES}
    for energy in (0.5, 0.9, 0.99):
        table = ma.compress(folder, tmp_path / "e", energy=energy, overwrite=True).set_index("name")
        for name in NAMES:
            shares = np.cumsum(sigma[name] ** 2) / np.sum(sigma[name] ** 2)
            assert table["rank"][name] == np.argmax(shares >= energy) + 1
    table = ma.compress(folder, tmp_path / "b", budget=4 * 16).set_index("name")
    best_of_all = np.sort(np.concatenate(list(sigma.values())))[-4:]
    for name in NAMES:
        assert table["rank"][name] == np.isin(sigma[name], best_of_all).sum()


def test_patterns_give_both_rank_and_alpha(lora, tmp_path):  # noqa: F811
    folder, _, _ = lora
    table = ma.compress(folder, tmp_path / "b", budget=4 * 16).set_index("name")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["r"] == config["lora_alpha"] == table["rank"].max()
    assert ma.load_spectra(tmp_path / "b", cache=False).groupby("name").size().to_dict() == {
        name: rank for name, rank in table["rank"].items() if rank
    }


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 3))
def test_no_update_of_that_rank_loses_less(seed, k):
    from msplora_analysis.compute.weighted import Weights
    from msplora_analysis.write.directions import Ranked, cut

    rng = np.random.default_rng(seed)
    a, b, tokens = rng.standard_normal((4, 7)), rng.standard_normal((9, 4)), random_tokens(9, 7, seed=seed)
    ax, bg = (tokens.x @ a.T).reshape(-1, 4), (tokens.g @ b).reshape(-1, 4)
    weights = Weights(ax.T @ ax / len(ax), bg.T @ bg / len(bg))
    sigma = np.linalg.svd(b @ a, compute_uv=False)[:4]
    kept = cut(Ranked(None, sigma, 4, weights, np.ones(4), None), a, b, k, by_task=True)
    least = np.linalg.norm(np.linalg.svd(tokens.weighted(b @ a), compute_uv=False)[k:])
    assert np.linalg.matrix_rank(kept.b @ kept.a) == k
    assert np.linalg.norm(tokens.weighted(b @ a - kept.b @ kept.a)) == pytest.approx(least, rel=1e-5)


# By predicted KL


def predicted(moments, ranks, rows=slice(None)):
    closed = sum(of.scores["task"][rows, ranks[name] :].sum(axis=1) for name, of in moments.modules.items())
    return 0.5 * float(np.mean(np.square(closed)))


def test_predicted_kl_is_that_of_the_closed_gates(lora, tmp_path):  # noqa: F811
    folder, _, _ = lora
    table = ma.compress(folder, tmp_path / "out", rank=2)
    moments = read_moments(folder / "moments.safetensors")
    assert table.attrs["predicted_kl"] == pytest.approx(predicted(moments, dict.fromkeys(NAMES, 2)), rel=1e-5)
    assert ma.compress(folder, tmp_path / "full", rank=3).attrs["predicted_kl"] == 0
    assert "predicted_kl" not in ma.compress(folder, tmp_path / "plain", rank=2, moments="none").attrs


def test_kl_keeps_the_fewest_parameters_below_it(lora, tmp_path):  # noqa: F811
    folder, _, _ = lora
    moments = read_moments(folder / "moments.safetensors")
    whole = predicted(moments, dict.fromkeys(NAMES, 0))
    sizes = []
    for share in (1e-4, 1e-2, 0.3):
        table = ma.compress(folder, tmp_path / str(share), kl=share * whole)
        ranks = dict(zip(table["name"], table["rank"], strict=True))
        assert table.attrs["predicted_kl"] == pytest.approx(predicted(moments, ranks, slice(1, None, 2)), rel=1e-5)
        assert predicted(moments, ranks, slice(0, None, 2)) <= share * whole
        assert table.attrs["predicted_kl"] <= share * whole
        sizes.append(table["rank"].sum())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_the_greedy_cut_is_near_the_best_of_all_nested_cuts():
    rng = np.random.default_rng(0)
    scores = [rng.standard_normal((400, 3)) * [4, 1, 0.2] * 10 ** rng.uniform(-1, 0.5) for _ in range(4)]
    costs = [10, 20, 10, 40]
    greedy = below_kl(scores, costs, 0.5)
    cuts = itertools.product(range(4), repeat=4)

    def cost(ranks, rows):
        return 0.5 * np.mean(sum(of[rows, k:].sum(axis=1) for of, k in zip(scores, ranks, strict=True)) ** 2)

    def size(ranks):
        return sum(k * c for k, c in zip(ranks, costs, strict=True))

    fits = [ranks for ranks in cuts if max(cost(ranks, slice(at, None, 2)) for at in (0, 1)) <= 0.5]
    assert size(greedy.ranks) <= size(min(fits, key=size)) + max(costs)
    assert greedy.predicted == pytest.approx(cost(greedy.ranks, slice(1, None, 2)))


def test_interactions_count():
    common = np.random.default_rng(0).standard_normal((100, 1))
    together, apart = below_kl([common, -common], [1, 1], 0.1), below_kl([common, common], [1, 1], 0.6)
    assert together.ranks == [1, 1]  # each alone costs 0.5: greedily, neither goes
    assert sum(apart.ranks) == 1  # the second would make it 2


def test_rows_of_one_example_stay_in_one_half():
    scores = np.repeat(np.arange(1.0, 9.0), 2)[:, None]  # two draws of each example, alike
    cut = below_kl([scores / 10], [1], 1.0, draws=2)
    examples = np.arange(1.0, 9.0) / 10
    assert cut.ranks == [0]
    assert cut.predicted == pytest.approx(0.5 * np.mean(examples[1::2] ** 2))
    assert cut.on_chosen == pytest.approx(0.5 * np.mean(examples[::2] ** 2))


# What is refused


@pytest.mark.parametrize(
    ("change", "choice", "message"),
    [
        ("none", {"kl": 0.1}, "kl=0.1 needs scores, and it has no moments.*msplora-measure moments"),
        ("none", {"rank": 1, "weights": "moments"}, "no moments beside it.*msplora-measure moments"),
        ("no scores", {"kl": 0.1}, "moments without scores.*msplora-measure moments"),
        ("some", {"rank": 1}, r"no moments of layer\.1\.query.*weights=none"),
        ("", {"rank": 1, "weights": "all"}, "weights=all: expected moments or none"),
        ("", {"kl": 0.0}, "kl=0: expected nats"),
        ("", {"kl": 1e9}, "nothing would be left.*smaller kl="),
        ("", {"kl": 0.1, "rank": 1}, "give one of"),
    ],
)
def test_refused(lora, tmp_path, change, choice, message):  # noqa: F811
    folder, factors, tokens = lora
    moments = folder / "moments.safetensors"
    if change == "none":
        moments.unlink()
    elif change == "no scores":
        whole = read_moments(moments)
        for module in whole.modules.values():
            module.scores.clear()
        whole.save(moments)
    elif change == "some":
        write_moments(folder, {NAMES[0]: factors[NAMES[0]]}, tokens)
    with pytest.raises(AnalysisError, match=message):
        ma.compress(folder, tmp_path / "out", **choice)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("predicted", "leaves_out", "regression", "expected"),
    [
        (0.001, False, False, "0.71 to 1.34 times"),
        (0.001, True, False, "0.8 to 3.72 times"),
        (0.2, True, False, "tells the size alone"),
        (0.001, False, True, "not calibrated"),
    ],
)
def test_what_the_calibration_says_of_a_prediction(predicted, leaves_out, regression, expected):
    assert expected in in_words(predicted, leaves_out=leaves_out, regression=regression)


def test_the_calibrated_ranges_are_those_of_its_table():
    table = pd.read_csv(ROOT / "figures" / "calibration" / "ratios_by_cut.csv")
    whole = table[table["what"].isna()]
    for cut, known in (("rank_task", OF_RANKS), ("rank", OF_RANKS), ("module", OF_MODULES)):
        rows = whole[whole["cut"] == cut]
        assert known[0] <= rows["p10"].min() + 0.005
        assert known[1] >= rows["p90"].max() - 0.005


def test_the_command_says_what_it_predicts(lora, tmp_path, run):  # noqa: F811
    folder, _, _ = lora
    status, said, error = run("compress", folder, "--out", tmp_path / "a", "--rank", 2)
    assert (status, error) == (0, "")
    assert "best in the metric of the task" in said
    assert "predicted KL: " in said
    table = ma.compress(folder, tmp_path / "b", rank=2)
    assert f"{table.attrs['predicted_kl']:.3g} nats an example" in said
    assert in_words(table.attrs["predicted_kl"], leaves_out=False, regression=False) in said
    status, said, error = run("compress", folder, "--out", tmp_path / "c", "--kl", 100)
    assert (status, error) == (0, "")
    assert "did not see" in said
    status, said, error = run("compress", folder, "--out", tmp_path / "d", "--rank", 2, "--weights", "none")
    assert (status, error) == (0, "")
    assert "best in Frobenius norm" in said
    assert run("compress", folder, "--out", tmp_path / "e", "--rank", 2, "--kl", 1)[0] == 2
