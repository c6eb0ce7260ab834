"""Comparison of two methods: the numbers of figure 4, and verdicts against cases whose truth is known."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from typer.testing import CliRunner

from msplora_analysis.ask.comparison.compare import Side, compare
from msplora_analysis.ask.comparison.pairing import Unit, pair, units
from msplora_analysis.ask.comparison.statements import forest, sentences, verdict
from msplora_analysis.ask.comparison.uncertainty import adjacent_test
from msplora_analysis.cli import app
from msplora_analysis.compute.measures.divergence import jensen_shannon, kl
from msplora_analysis.errors import AnalysisError
from msplora_analysis.show.figures.comparison import plot_comparison
from msplora_analysis.show.figures.rank_needed import plot_rank_needed, plots
from msplora_analysis.tables import layer_kl
from msplora_analysis.tables.matrices import prepare

FIRST_LOOK = Path(__file__).parents[1] / "data" / "first_look"


def table(spectra: dict[str, np.ndarray], epochs: int = 1) -> pd.DataFrame:
    """Spectra table of runs: name -> (modules, L, r)."""
    return pd.DataFrame(
        [
            {"run": run, "step": 10 * epoch, "epoch": epoch, "scale": "layer", "group": layer, "module": f"m{module}"}
            | {"name": f"layer.{layer}.m{module}", "k": k + 1, "sigma": sigma}
            for run, modules in spectra.items()
            for epoch in range(1, epochs + 1)
            for module, layers in enumerate(modules)
            for layer, values in enumerate(layers)
            for k, sigma in enumerate(values)
        ]
    )


def random_spectra(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return -np.sort(-rng.random(shape), axis=-1) + 0.01


def runs(rng: np.random.Generator, method: str, rank: int, spread: float = 1.0, seeds: int = 3) -> pd.DataFrame:
    """Runs of two tasks; ``spread`` is how much the layers differ."""
    spectra = {}
    for task in ("cola", "mrpc"):
        for seed in range(seeds):
            steep = 1 + spread * np.arange(4)[:, None] + 0.05 * rng.standard_normal((2, 4, 1))
            spectra[f"{task}/{method}/seed-{seed}"] = np.exp(-np.arange(rank) * steep / rank)
    return table(spectra)


def row(result: pd.DataFrame, **chosen: Any) -> dict[str, Any]:
    for name, value in chosen.items():
        result = result[result[name] == value]
    assert len(result) == 1
    return result.iloc[0].to_dict()


def test_values_are_those_of_figure_4() -> None:
    rng = np.random.default_rng(0)
    sides = [
        table({f"cola/{name}/seed-{s}": random_spectra(rng, 2, 5, rank) for s in range(3)})
        for name, rank in (("a", 6), ("b", 4))
    ]
    result = compare(Side("A", sides[0]), Side("B", sides[1]))
    for pairs, column in (("all", "kl_all_pairs"), ("adjacent", "kl_adjacent")):
        found = row(result, measure="kl", pairs=pairs, question="difference")
        expected = [layer_kl.summary(prepare(side))[column].item() for side in sides]
        assert [found["value_a"], found["value_b"]] == pytest.approx(expected, abs=1e-12)
        assert found["estimate"] == pytest.approx(expected[0] - expected[1], abs=1e-12)
        assert (found["n_a"], found["n_b"], found["paired"], found["k_a"], found["k_b"]) == (3, 3, True, 6, 4)


def test_divergences_first_is_the_mean_over_runs_and_modules() -> None:
    rng = np.random.default_rng(1)
    spectra = random_spectra(rng, 3, 2, 4, 5)
    side = table({f"r{i}": one for i, one in enumerate(spectra)})
    other = table({f"s{i}": one for i, one in enumerate(random_spectra(rng, 3, 2, 4, 5))})
    result = compare(Side("A", side), Side("B", other), averaging="divergences")
    expected = np.mean(
        [kl(one[i], one[j]) for run in spectra for one in run for i in range(4) for j in range(4) if i != j]
    )
    assert row(result, measure="kl", pairs="all", question="difference")["value_a"] == pytest.approx(expected)


def test_rank_matching_removes_what_is_only_rank() -> None:
    """B is A without its smaller values: unlike as it stands, the same once matched."""
    rng = np.random.default_rng(2)
    spectra = random_spectra(rng, 4, 2, 5, 6)
    a = table({f"a/seed-{i}": one for i, one in enumerate(spectra)})
    b = table({f"b/seed-{i}": one[..., :2] for i, one in enumerate(spectra)})
    result = compare(Side("A", a), Side("B", b))
    assert abs(row(result, measure="kl", pairs="all", question="difference")["estimate"]) > 1e-3
    matched = row(result, measure="kl_matched", pairs="all", question="difference")
    assert (matched["k_a"], matched["k_b"]) == (2, 2)
    assert [matched[name] for name in ("estimate", "low", "high")] == pytest.approx([0, 0, 0], abs=1e-12)
    assert not matched["decided"]


def test_a_planted_difference_is_decided_with_its_sign() -> None:
    rng = np.random.default_rng(3)
    far, near = runs(rng, "far", 4, spread=2.0), runs(rng, "near", 4, spread=0.5)
    for averaging in ("spectra", "divergences"):
        found = row(
            compare(Side("far", far), Side("near", near), averaging=averaging),
            measure="js",
            pairs="all",
            question="difference",
        )
        assert found["decided"]
        assert 0 < found["low"] < found["estimate"] < found["high"]
        assert (found["tasks"], found["resampled"]) == (2, "signs of pairs")
        assert 0 < found["same_layer"] < found["estimate"]
    result = compare(Side("near", near), Side("far", far))
    assert "under near layers differ less in their spectra, by " in verdict(result)
    assert "the same layer of two runs" in verdict(result)
    assert "layers differ less in their spectra under near" in list(sentences(result))[2]
    assert any("●" in line and "JS of spectra" in line for line in forest(result))
    assert all(len(line) <= 80 for line in forest(result))


def test_few_runs_cannot_decide_and_say_so_in_one_line() -> None:
    rng = np.random.default_rng(4)
    for seeds, what in ((1, "one run of each"), (5, "5 pairs of runs")):
        sides = []
        for name, power in (("A", 1), ("B", 9)):
            sides.append(table({f"{name}/seed-{i}": random_spectra(rng, 1, 4, 3) ** power for i in range(seeds)}))
        result = compare(Side("A", sides[0]), Side("B", sides[1]))
        differences = result[result["question"] == "difference"]
        assert not differences["decided"].any()
        assert differences[["low", "high"]].isna().all(axis=None) == (seeds == 1)
        expected = f"A − B, {what}: so few cannot decide. Six pairs of runs can: train more seeds of both."
        assert verdict(result) == expected
        assert "cannot decide whether it is more than chance" in next(sentences(result))
        plot_comparison(result)


def test_unequal_numbers_of_values_have_no_verdict() -> None:
    rng = np.random.default_rng(3)
    far, near = runs(rng, "far", 6, spread=2.0, seeds=4), runs(rng, "near", 2, spread=0.5, seeds=4)
    result = compare(Side("far", far), Side("near", near))
    found = row(result, measure="kl", pairs="all", question="difference")
    assert found["low"] > 0
    assert np.isnan(found["p_value"])
    assert not found["decided"]
    assert row(result, measure="js", pairs="all", question="difference")["p_value"] < 0.05
    assert "Not judged, since the numbers of values differ: KL, as Figure 4." in verdict(result)
    assert "6 values against 2 allow no verdict" in next(sentences(result))
    assert any(line.endswith("6 against 2 values") for line in forest(result))


def test_updates_of_zero_have_no_place_on_the_plot() -> None:
    zero, other = (table({f"{x}/seed-1": np.full((1, 4, 3), value)}) for x, value in (("a", 0.0), ("b", 1.0)))
    result = compare(Side("A", zero), Side("B", other))
    assert result.loc[result["question"] == "difference", "estimate"].isna().all()
    assert "cannot decide" in verdict(result)
    assert not any("○" in line or "●" in line for line in forest(result)[1:-1])


def test_a_run_is_not_compared_with_itself() -> None:
    rng = np.random.default_rng(0)
    one, other = (random_spectra(rng, 1, 4, 3) for _ in range(2))
    with pytest.raises(AnalysisError, match=r"copy/seed-1 stands on both sides .*a/seed-2"):
        compare(Side("A", table({"a/seed-1": one, "a/seed-2": other})), Side("B", table({"copy/seed-1": other})))


def test_a_claim_about_tasks_takes_one_value_a_task() -> None:
    rng = np.random.default_rng(3)
    names = ["cola", "mrpc", "rte", "stsb", "sst2", "qnli"]
    sides = []
    for method, shift in (("a", 2.0), ("b", 0.5)):
        spectra = {
            f"{task}/{method}/seed-{seed}": np.exp(
                -np.arange(4) * (1 + (shift + 0.1 * place) * np.arange(4)[:, None] + 0.05 * rng.random((2, 4, 1))) / 4
            )
            for place, task in enumerate(names)
            for seed in range(2)
        }
        sides.append(Side(method, table(spectra)))
    result = compare(*sides, claim="tasks", averaging="divergences")
    found = row(result, measure="js", pairs="all", question="difference")
    assert (found["resampled"], found["claim"], found["decided"]) == ("signs of tasks", "tasks", True)
    # Six values, one a task: the t interval of their mean, by scipy.
    per_run = [{run: np.mean(rows) for run, rows in _js_of(side.spectra).items()} for side in sides]
    differences = [
        np.mean([per_run[0][f"{task}/a/seed-{s}"] - per_run[1][f"{task}/b/seed-{s}"] for s in range(2)])
        for task in names
    ]
    low, high = scipy.stats.t.interval(0.95, 5, np.mean(differences), scipy.stats.sem(differences))
    assert [found["low"], found["high"]] == pytest.approx([low, high])
    few = [Side(x.label, x.spectra[x.spectra["run"].str.startswith(("cola", "rte"))]) for x in sides]
    with pytest.raises(AnalysisError, match=r"6 tasks or more.*these are of 2"):
        compare(*few, claim="tasks")


def _js_of(spectra: pd.DataFrame) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for (run, _), part in spectra.groupby(["run", "module"]):
        layers = [rows["sigma"].to_numpy() for _, rows in part.groupby("group")]
        found.setdefault(str(run), []).extend(
            float(jensen_shannon(x, y)) for i, x in enumerate(layers) for j, y in enumerate(layers) if i != j
        )
    return found


def test_a_margin_tests_equality() -> None:
    rng = np.random.default_rng(1)
    a, b = (runs(rng, name, 4, seeds=5) for name in ("a", "b"))
    result = compare(Side("A", a), Side("B", b), margin={"js": 0.1, "kl": 1e-9})
    found = {name: row(result, measure=name, pairs="all", question="difference") for name in ("js", "kl", "kl_matched")}
    assert (found["js"]["equivalent"], found["kl"]["equivalent"]) == (True, False)
    assert np.isnan(found["kl_matched"]["margin"])
    assert "below the margin are the differences of JS of spectra of all pairs of layers (± 0.1)" in verdict(result)
    for margin, message in (({"jz": 1}, "margin is given for jz"), (-1.0, "greater than 0, not -1")):
        with pytest.raises(AnalysisError, match=message):
            compare(Side("A", a), Side("B", b), margin=margin)


def test_overlaps_come_from_the_pairs_table() -> None:
    rng = np.random.default_rng(5)
    sides = []
    expected = []
    for name in "ab":
        spectra = {f"{name}/seed-{s}": random_spectra(rng, 1, 4, 3) for s in range(3)}
        rows = [
            {"run": run, "step": 10, "epoch": 1, "scale": "layer", "module": "m0", "group_i": i, "group_j": j}
            | {"overlap_in": rng.random(), "overlap_out": rng.random(), "overlap_expected": 0.25}
            | ({"expected_in": 0.2, "expected_out": 0.3} if name == "b" else {})
            for run in spectra
            for i in range(4)
            for j in range(i + 1, 4)
        ]
        pairs = pd.DataFrame(rows)
        sides.append(Side(name, table(spectra), pairs))
        adjacent = pairs[pairs["group_j"] - pairs["group_i"] == 1]
        chance = (0.2, 0.3) if name == "b" else (0.25, 0.25)
        expected.append((pairs["overlap_in"].mean() - chance[0], adjacent["overlap_out"].mean() - chance[1]))
    result = compare(*sides)
    for measure, kind, which in (("overlap_in", "all", 0), ("overlap_out", "adjacent", 1)):
        found = row(result, measure=measure, pairs=kind, question="difference")
        assert [found["value_a"], found["value_b"]] == pytest.approx([e[which] for e in expected])
    assert any("overlap beyond chance of the input directions" in text for text in sentences(result))
    incomplete = Side("a", sides[0].spectra, sides[0].pairs[sides[0].pairs["run"] != "a/seed-1"])
    with pytest.raises(AnalysisError, match="lacks a/seed-1"):
        compare(incomplete, sides[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"averaging": "runs"}, "averaging must be one of spectra, divergences"),
        ({"claim": "layers"}, "claim must be one of runs, tasks"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"epoch": 7}, "epoch 7"),
        ({"claim": "tasks"}, "needs runs of 6 tasks"),
    ],
)
def test_bad_choices(change: dict[str, Any], message: str) -> None:
    a, b = (table({f"{x}{i}": random_spectra(np.random.default_rng(i + x), 1, 4, 3) for i in range(2)}) for x in (5, 7))
    with pytest.raises(AnalysisError, match=message):
        compare(Side("A", a), Side("B", b), **change)


def test_other_layers_and_several_methods_are_errors() -> None:
    rng = np.random.default_rng(0)
    four, five = (table({"r": random_spectra(rng, 1, layers, 3)}) for layers in (4, 5))
    with pytest.raises(AnalysisError, match="do not adapt the same"):
        compare(Side("A", four), Side("B", five))
    mixed = table({"r": random_spectra(rng, 1, 4, 3), "s": random_spectra(rng, 1, 4, 2)})
    with pytest.raises(AnalysisError, match=r"A: holds several methods \(LoRA r=3, LoRA r=2\)"):
        compare(Side("A", mixed), Side("B", four))


def test_permutation_p_is_that_of_all_orders() -> None:
    rng = np.random.default_rng(5)
    matrices = rng.random((2, 5, 5))
    matrices[0] += 2 * np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    near, far, p = adjacent_test(matrices)

    def difference(matrix: np.ndarray, order: tuple[int, ...]) -> float:
        both: dict[bool, list[float]] = {True: [], False: []}
        for x in range(5):
            for y in range(x + 1, 5):
                i, j = order[x], order[y]
                both[y - x == 1].append((matrix[i, j] + matrix[j, i]) / 2)
        return float(np.mean(both[True]) - np.mean(both[False]))

    everything = np.array([[difference(matrix, order) for matrix in matrices] for order in permutations(range(5))])
    np.testing.assert_allclose(near - far, everything[0])
    away = np.abs(everything - everything.mean(axis=0)) / everything.std(axis=0)
    first = (away.max(axis=1) >= away[0, 0] - 1e-9).mean()  # the largest of both
    assert away[0, 0] > away[0, 1]
    assert p == pytest.approx([first, max(first, (away[:, 1] >= away[0, 1] - 1e-9).mean())])


def test_permutation_p_is_uniform_without_order() -> None:
    """Layers in random order: some p below 0.1 in about a tenth of cases, however many tables."""
    rng = np.random.default_rng(0)
    p = [np.min(adjacent_test(rng.random((3, 6, 6)))[2]) for _ in range(200)]
    assert 0.04 < np.mean(np.array(p) <= 0.1) < 0.17
    assert np.isnan(adjacent_test(rng.random((1, 2, 2)))[2])


def test_units_from_names_and_from_the_record(tmp_path: Path) -> None:
    from msplora_analysis.adapters.discovery import discover

    names = ["cola/lora-8/seed-1", "STS-B/x/seed_12", "mine/run3", "a/seed-2b"]
    assert units(names) == [
        Unit(names[0], "cola", 1),
        Unit(names[1], "stsb", 12),
        Unit(names[2], None, None),
        Unit(names[3], None, 2),
    ]
    adapters = discover(FIRST_LOOK)
    found = units(["lora-4"], adapters)
    record = json.loads((FIRST_LOOK / "lora-4" / "run.json").read_text())["settings"]
    assert found == [Unit("lora-4", record["task"], record["seed"])]


def test_runs_that_do_not_pair() -> None:
    ours = [Unit("a", "cola", 1), Unit("b", "cola", 2)]
    assert pair(ours, [Unit("c", "cola", 2), Unit("d", "mrpc", 1)]) == [(ours[1], Unit("c", "cola", 2))]
    assert pair(ours, [Unit("c", "cola", None)]) == []
    assert pair(ours, [Unit("c", "cola", 1), Unit("d", "cola", 1)]) == []  # which one would it be?
    rng = np.random.default_rng(0)
    a = table({f"a/seed-{i}": random_spectra(rng, 1, 4, 3) for i in (1, 2, 3)})
    b = table({f"b/seed-{i}": random_spectra(rng, 1, 4, 3) for i in (2, 3)})
    with pytest.warns(UserWarning, match=r"A: a/seed-1 \(1 in all\) left out, without a partner"):
        result = compare(Side("A", a), Side("B", b))
    assert result["n_a"].unique().tolist() == [2]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    both = pd.concat([runs(rng, "msplora", 4, 2.0), runs(rng, "lora", 6, 0.5)])
    both.to_csv(tmp_path / "spectra.csv", index=False)
    return tmp_path / "spectra.csv"


def test_command_on_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    a, b = (str(FIRST_LOOK / run) for run in ("msplora-4-4-4", "lora-4"))
    result = CliRunner().invoke(app, ["compare", a, "--with", b, "--out", str(out), "--no-cache"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "one run of each: so few cannot decide" in result.stdout
    assert result.stdout.rstrip().endswith("comparison.parquet")
    written = pd.read_parquet(out / "comparison.parquet")
    assert set(written["measure"]) == {"kl", "kl_matched", "js", "overlap_in", "overlap_out"}
    assert set(written["epoch"]) == {6}


def test_command_on_tables(stored: Path, tmp_path: Path) -> None:
    methods = ["--method", "LoRA r=4", "--with-method", "LoRA r=6", "--format", "csv", "--out", str(tmp_path / "o")]
    methods += ["--figure", "png"]
    result = CliRunner().invoke(app, ["compare", str(stored), "--with", str(stored), *methods])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "6 pairs of runs on 2 tasks" in result.stdout.replace("\n", " ")
    assert set(pd.read_csv(tmp_path / "o" / "comparison.csv")["measure"]) == {"kl", "kl_matched", "js"}
    assert (tmp_path / "o" / "comparison_differences.png").is_file()
    result = CliRunner().invoke(app, ["compare", str(stored), "--with", str(stored), "--out", str(tmp_path / "o")])
    assert isinstance(result.exception, AnalysisError)
    assert all(word in str(result.exception) for word in (str(stored), "--with-method", "LoRA r=4, LoRA r=6"))


def test_with_takes_several_paths(tmp_path: Path) -> None:
    """As a shell's pattern gives them; none may end up on the other side."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    others = [str(tmp_path / "x"), str(tmp_path / "y")]
    args = ["compare", str(FIRST_LOOK / "lora-4"), "--with", *others, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, AnalysisError)
    assert str(result.exception).startswith(f"{tmp_path / 'x'}: no adapter found")


def test_figures_of_a_comparison(stored: Path) -> None:
    spectra = pd.read_csv(stored)
    parts = [spectra[spectra["run"].str.contains(f"/{name}/")] for name in ("msplora", "lora")]
    result = compare(Side("A", parts[0]), Side("B", parts[1]))
    ax, _ = plot_comparison(result).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["KL, as Figure 4", "KL, ranks matched"]
    ends = sorted(float(x) for line in ax.lines for x in line.get_xdata() if len(line.get_xdata()) == 2)
    shown = result[(result["question"] == "difference") & result["measure"].str.startswith("kl")]
    assert set(shown["low"]) | set(shown["high"]) <= set(ends)
    with pytest.raises(AnalysisError, match="no differences"):
        plot_comparison(result[result["question"] != "difference"])


@pytest.mark.parametrize("layers", [6, 32])
def test_rank_needed_map_shows_every_layer(layers: int) -> None:
    spectra = np.tile(np.array([1, 0.4, 0.05, 0.001]), (3, layers, 1))
    spectra[1, 2] = [1, 1, 1, 1]
    (plot,) = plots(prepare(table({"r": spectra})))
    assert (plot.stem, len(plot.numbers)) == ("rank_needed_lora-4", 2 * 3 * layers)
    figure = plot_rank_needed(table({"r": spectra}))
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["90% of the energy", "99% of the energy"]
    for ax, used, most in zip(panels, (2, 2), (4, 4), strict=True):
        assert [label.get_text() for label in ax.get_xticklabels()] == [str(layer) for layer in range(layers)]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["m0", "m1", "m2"]
        values = ax.collections[0].get_array().reshape(3, layers)
        assert values[1, 2] == most
        assert set(np.delete(values.ravel(), layers + 2)) == {used}
