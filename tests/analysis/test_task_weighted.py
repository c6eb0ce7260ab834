"""Task-weighted spectra, against dense matrices: G^½ ΔW C^½ of inputs and gradients that the test made."""

import json
import os
import re

import numpy as np
import pandas as pd
import pytest
from adapters import lora_config, lora_tensors, msplora_config, msplora_tensors, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from moment_cases import lora_factors, module_moments, random_tokens, square_root, update_of, write_moments
from safetensors.numpy import load_file, save_file

import msplora_analysis as ma
import msplora_analysis.show.figures
from msplora_analysis import AnalysisError, cli
from msplora_core.moments import directions

NAMES = ("layer.0.query", "layer.1.query", "layer.1.value")


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line: exit status, standard output and error."""

    def command(*words):
        monkeypatch.setattr("sys.argv", ["msplora-analyze", *map(str, words)])
        monkeypatch.setattr("warnings.showwarning", None)  # main sets it: put it back afterwards
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return command


@pytest.fixture
def lora(tmp_path):
    """A LoRA of three modules with moments beside it, and the tokens that these come from."""
    tensors = lora_tensors(*NAMES, rank=3, rows=9, cols=7)
    folder = write_adapter(tmp_path / "lora", tensors, lora_config(r=3, lora_alpha=6))
    factors = lora_factors(tensors)
    tokens = {name: random_tokens(9, 7, seed=i) for i, name in enumerate(NAMES)}
    write_moments(folder, factors, tokens)
    return folder, factors, tokens


def exact(tokens, update, rank):
    return np.linalg.svd(tokens.weighted(update), compute_uv=False)[:rank]


def assert_weighted(found, expected):
    large = expected >= 1e-3 * expected[0]
    np.testing.assert_allclose(np.asarray(found)[large], expected[large], rtol=1e-4)


def test_task_sigma_of_a_lora_is_that_of_the_dense_product(lora):
    folder, factors, tokens = lora
    spectra, metrics = ma.load_tables(folder, cache=False)
    for name in NAMES:
        rows = spectra[spectra["name"] == name]
        expected = exact(tokens[name], update_of(factors[name]), 3)
        assert_weighted(rows["task_sigma"], expected)
        row = metrics[metrics["name"] == name].iloc[0]
        p = expected / expected.sum()
        assert row["task_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-6)
        assert row["task_effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def msplora_case(folder, seed=0):
    """Two modules of five layers in two mid groups, and moments whose scales stand in another order."""
    ranks, layers, firsts = {"global": 3, "mid": 2, "layer": 1}, list(range(5)), [0, 3]
    tensors = msplora_tensors(layers, firsts, ranks, ("query", "value"), rows=10, cols=8, seed=seed)
    write_adapter(folder, tensors, msplora_config(ranks=ranks, mid_groups=2))
    factors, tokens = {}, {}
    for module in ("query", "value"):
        for layer in layers:
            owners = {"layer": layer, "global": 0, "mid": 0 if layer < 3 else 3}
            name = f"encoder.layer.{layer}.self.{module}"
            factors[name] = {}
            for scale, owner in owners.items():
                a, b = (
                    tensors[f"base_model.model.encoder.layer.{owner}.self.{module}.msplora_{scale}.{of}"].astype(float)
                    for of in "AB"
                )
                factors[name][scale] = a, 16 / ranks[scale] * b
            tokens[name] = random_tokens(10, 8, seed=100 * seed + len(tokens))
    write_moments(folder, factors, tokens)
    return factors, tokens


def test_task_sigma_of_msplora_is_exact_for_totals_and_every_scale(tmp_path):
    factors, tokens = msplora_case(tmp_path / "msplora")
    spectra = ma.load_spectra(tmp_path / "msplora", cache=False)
    assert spectra["task_sigma"].notna().all()
    for (scale, name, group), rows in spectra.groupby(["scale", "name", "group"]):
        module = name.rpartition(".")[2]
        if scale == "total":
            expected = exact(tokens[name], update_of(factors[name]), 6)
        elif scale == "layer":
            expected = exact(tokens[name], update_of({"layer": factors[name]["layer"]}), 1)
        else:  # acts in several layers: as if their tokens were those of one
            layers = range(5) if scale == "global" else (range(3), range(3, 5))[group]
            names = [f"encoder.layer.{layer}.self.{module}" for layer in layers]
            roots = [
                square_root(np.mean([root(tokens[of]) @ root(tokens[of]) for of in names], axis=0))
                for root in (lambda of: of.root_out(), lambda of: of.root_in())
            ]
            a, b = factors[name][scale]
            expected = np.linalg.svd(roots[0] @ b @ a @ roots[1], compute_uv=False)[: len(a)]
        assert_weighted(rows["task_sigma"], expected)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 6), spread=st.floats(0, 3))
def test_task_sigma_does_not_depend_on_how_an_update_is_split_into_factors(seed, rank, spread):
    rng = np.random.default_rng(seed)
    a, b, tokens = rng.standard_normal((rank, 9)), rng.standard_normal((8, rank)), random_tokens(8, 9, seed=seed)
    turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0] * 10 ** rng.uniform(-spread, spread, rank)
    plain = module_moments({"layer": (a, b)}, tokens)
    turned = module_moments({"layer": (np.linalg.solve(turn, a), b @ turn)}, tokens)
    assert_weighted(directions(turned.s_a, turned.s_b).sigma, directions(plain.s_a, plain.s_b).sigma)


def test_without_moments_nothing_changes_and_none_ignores_them(lora, tmp_path):
    folder, _, _ = lora
    (tmp_path / "bare").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "bare" / name).write_bytes((folder / name).read_bytes())
    bare = ma.load_tables(tmp_path / "bare", cache=False)
    ignored = ma.load_tables(folder, moments="none", cache=False)
    for without, beside in zip(bare, ignored, strict=True):
        assert not [column for column in without if column.startswith("task")]
        pd.testing.assert_frame_equal(without.drop(columns="run"), beside.drop(columns="run"))


def test_of_two_adapters_the_one_without_moments_has_empty_cells(lora, tmp_path):
    folder, _, _ = lora
    write_adapter(tmp_path / "other", lora_tensors("layer.0.query"))
    spectra, metrics = ma.load_tables([folder, tmp_path / "other"], cache=False)
    for table, column in ((spectra, "task_sigma"), (metrics, "task_norm"), (metrics, "task_effective_rank")):
        assert table.groupby("run")[column].apply(lambda of: of.notna().all()).to_dict() == {
            "lora": True,
            "other": False,
        }


def test_a_file_of_moments_may_be_named(lora, tmp_path):
    folder, _, _ = lora
    beside = ma.load_spectra(folder, cache=False)
    moved = (folder / "moments.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert "task_sigma" not in ma.load_spectra(folder, cache=False)
    pd.testing.assert_frame_equal(ma.load_spectra(folder, moments=moved, cache=False), beside)
    with pytest.raises(AnalysisError, match=r"nothing\.safetensors.*moments="):
        ma.load_spectra(folder, moments=tmp_path / "nothing.safetensors", cache=False)


def test_moments_lie_beside_a_lone_file_too(lora):
    folder, _, _ = lora
    lone = (folder / "adapter_model.safetensors").rename(folder / "mine.safetensors")
    (folder / "adapter_config.json").unlink()
    tensors = load_file(lone)
    keys = [key.removesuffix("lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    alphas = {f"{key.replace('base_model.model.', '')}alpha": np.array(6.0, dtype=np.float32) for key in keys}
    plain = {key.replace("base_model.model.", ""): value for key, value in tensors.items()}
    save_file(plain | alphas, lone)
    spectra = ma.load_spectra(folder, cache=False)
    assert spectra["run"].unique().tolist() == ["mine"]
    assert spectra["task_sigma"].notna().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda factors: factors | {"layer.7.key": factors["layer.0.query"]}, r"layer\.7\.key"),
        (lambda factors: {k: {"layer": (f["layer"][0][:2], f["layer"][1][:, :2])} for k, f in factors.items()}, "rank"),
        (lambda factors: {k: {"global": f["layer"]} for k, f in factors.items()}, "global 3"),
        (lambda factors: {k: {"layer": (f["layer"][0], 1.1 * f["layer"][1])} for k, f in factors.items()}, "values"),
    ],
)
def test_moments_of_another_adapter_are_an_error_that_names_file_and_module(lora, change, said, run):
    folder, factors, tokens = lora
    other = change(factors)
    write_moments(folder, other, dict.fromkeys(other, tokens["layer.0.query"]))
    with pytest.raises(AnalysisError, match=rf"moments\.safetensors: moments of .*{said}.*moments=none"):
        ma.load_spectra(folder, cache=False)
    status, _, error = run("spectra", folder, "--out", folder / "tables", "--no-cache")
    assert status == 1
    assert "--moments none" in error
    assert not list((folder / "tables").glob("*.*"))


def test_moments_of_some_modules_leave_the_others_empty_with_a_warning(lora):
    folder, factors, tokens = lora
    write_moments(folder, {NAMES[0]: factors[NAMES[0]]}, tokens)
    with pytest.warns(UserWarning, match=r"no moments of layer\.1\.query, layer\.1\.value"):
        spectra = ma.load_spectra(folder, cache=False)
    assert (spectra["task_sigma"].notna() == (spectra["name"] == NAMES[0])).all()


def test_an_update_of_zero_is_worth_nothing(tmp_path):
    tensors = lora_tensors("layer.0.query")
    tensors["base_model.model.layer.0.query.lora_B.weight"][:] = 0
    folder = write_adapter(tmp_path / "zero", tensors)
    write_moments(folder, lora_factors(tensors), {"layer.0.query": random_tokens(5, 6)})
    spectra, metrics = ma.load_tables(folder, cache=False)
    assert spectra["task_sigma"].tolist() == [0, 0]
    assert metrics["task_norm"].tolist() == [0]
    assert metrics["task_effective_rank"].isna().all()


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_the_command_writes_the_columns_and_reading_gives_them_back(lora, tmp_path, format, run):
    folder, _, _ = lora
    status, said, _ = run("spectra", folder, "--out", tmp_path / "t", "--format", format, "--no-cache")
    assert status == 0
    assert "task" in said
    read = ma.read_spectra(tmp_path / f"t/spectra.{format}")
    pd.testing.assert_frame_equal(read, ma.load_spectra(folder, cache=False), check_dtype=False)


def test_the_cache_keeps_task_sigma_and_sees_new_moments(lora, tmp_path, monkeypatch):
    folder, factors, tokens = lora
    monkeypatch.setenv("MSPLORA_CACHE", str(tmp_path / "cache"))
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    monkeypatch.setattr("msplora_analysis.compute.cache._SETTLED", -10.0)
    first = ma.load_spectra(folder)
    pd.testing.assert_frame_equal(ma.load_spectra(folder), first)
    write_moments(folder, factors, {name: random_tokens(9, 7, seed=99) for name in tokens})
    assert not np.allclose(ma.load_spectra(folder)["task_sigma"], first["task_sigma"])
    (folder / "moments.safetensors").unlink()
    assert "task_sigma" not in ma.load_spectra(folder)


def test_parts_of_a_large_adapter_agree_with_the_whole(tmp_path, monkeypatch):
    msplora_case(tmp_path / "msplora")
    whole = ma.load_spectra(tmp_path / "msplora", cache=False)
    monkeypatch.setattr("msplora_analysis.compute.tasks._TASK", 2**11)
    pd.testing.assert_frame_equal(ma.load_spectra(tmp_path / "msplora", cache=False), whole)


# Figures


@pytest.fixture
def training(tmp_path):
    """A run of MSPLoRA of three checkpoints with moments each."""
    for i, step in enumerate((10, 20, 30)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        msplora_case(folder, seed=i)
        (folder / "trainer_state.json").write_text(f'{{"epoch": {i + 1}, "global_step": {step}}}')
    return tmp_path / "run"


@pytest.mark.slow
def test_figures_are_drawn_of_task_weighted_spectra(training):
    spectra = ma.load_spectra(training, cache=False)
    plain, weighted = ma.draw_figures(spectra), ma.draw_figures(spectra, weights="moments")
    assert len(plain) == len(weighted)
    for name in ("figure3", "spectra_by_layer", "rank_needed"):
        assert "task-weighted" in weighted[f"{name}_task"].get_suptitle()
        assert "task-weighted" not in plain[name].get_suptitle()
    rows = spectra[(spectra["scale"] == "mid") & (spectra["k"] == 1) & (spectra["epoch"] == 2)]
    shown = weighted["figure3_task: MSPLoRA 3/2/1"].axes[1].collections[0].get_array()
    assert shown[0, 1] == pytest.approx(rows["task_sigma"].mean())


@pytest.mark.slow
def test_figures_take_weights_by_themselves_and_on_the_command_line(training, tmp_path, run):
    spectra = ma.load_spectra(training, cache=False)
    for draw in (ma.show.figures.plot_figure3, ma.show.figures.plot_spectra_by_layer):
        assert "task-weighted" in draw(spectra, weights="moments").get_suptitle()
    words = ("figures", training, "--out", tmp_path / "f", "--format", "svg", "--no-cache")
    status, said, _ = run(*words, "--weights", "moments")
    assert status == 0
    assert "task_sigma" in (tmp_path / "f/figure3_msplora-3-2-1_task.csv").read_text()
    assert all("_task." in line for line in said.splitlines())
    status, _, error = run(*words, "--weights", "moments", "--moments", "none")
    assert status == 1
    assert "--weights moments: no adapter has moments" in error


def test_the_report_shows_both_spectra_beside_each_other(training, tmp_path):
    spectra, metrics = ma.load_tables(training, cache=False)
    html = ma.report(training, tmp_path / "report.html", cache=False).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    (panel,) = (of for of in data["spectra"][0]["panels"] if (of["place"], of["kind"]) == ("query", "whole"))
    rows = spectra.query("scale == 'total' and module == 'query' and epoch == 3")
    for name, column in (("values", "sigma"), ("task", "task_sigma")):
        assert panel[name][2] == pytest.approx(rows[column].tolist(), rel=1e-3)
    last = metrics.query("epoch == 3")
    assert data["matrices"]["task_norm"] == pytest.approx(last["task_norm"].tolist(), rel=1e-3)
    assert "task_norm" in data["measures"]
    plain = ma.report(training, tmp_path / "plain.html", moments="none", cache=False).read_text()
    without = json.loads(re.search(r'id="data">(.*?)</script>', plain)[1])
    assert "task_norm" not in without["matrices"]
    assert not any("task" in panel for of in without["spectra"] for panel in of["panels"])


# What layers and scales share


def basis(rows):
    return np.linalg.qr(rows.T)[0]


def leading(tokens, update, rank):
    """Inputs and outputs of the task directions that hold 99 % of the task energy, rows; by the dense decomposition."""
    u, sigma, vt = np.linalg.svd(tokens.weighted(update))
    k = int(np.argmax(np.cumsum(sigma[:rank] ** 2) >= 0.99 * np.sum(sigma[:rank] ** 2))) + 1
    # ΔW = Σ_k G^-½ u_k σ_k v_kᵀ C^-½
    return k, vt[:rank] @ np.linalg.inv(tokens.root_in()), u[:, :rank].T @ np.linalg.inv(tokens.root_out())


def test_overlap_of_leading_task_directions_between_layers(tmp_path):
    factors, tokens = msplora_case(tmp_path / "a")
    pairs = ma.load_pairs(tmp_path / "a").query("scale == 'total' and module == 'query'")
    for row in pairs.itertuples():
        i, j = (
            leading(tokens[name], update_of(factors[name]), 6)
            for name in (f"encoder.layer.{layer}.self.query" for layer in (row.group_i, row.group_j))
        )
        k = min(i[0], j[0])
        for side, found in ((1, row.task_overlap_in), (2, row.task_overlap_out)):
            cosines = np.linalg.svd(basis(i[side][:k]).T @ basis(j[side][:k]), compute_uv=False)
            assert found == pytest.approx(np.sum(cosines**2) / k, rel=1e-4)
        assert row.task_overlap_expected == pytest.approx((k / 8 + k / 10) / 2)


def test_scales_of_a_layer_are_compared_in_its_own_metric(tmp_path):
    factors, tokens = msplora_case(tmp_path / "a")
    for row in ma.load_scale_pairs(tmp_path / "a").itertuples():
        of = tokens[row.name]
        one, other = (of.weighted(update_of({"_": factors[row.name][scale]})) for scale in (row.scale_i, row.scale_j))
        cosine = np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other)
        assert row.task_cosine == pytest.approx(cosine, abs=1e-6)
        (u, s, v), (x, t, y) = np.linalg.svd(one), np.linalg.svd(other)
        k = min(int(np.argmax(np.cumsum(of**2) >= 0.99 * np.sum(of**2))) + 1 for of in (s, t))
        assert row.task_overlap_in == pytest.approx(np.sum((v[:k] @ y[:k].T) ** 2) / k, rel=1e-6)
        assert row.task_overlap_out == pytest.approx(np.sum((u[:, :k].T @ x[:, :k]) ** 2) / k, rel=1e-6)


def test_without_moments_tables_of_redundancy_are_as_before(tmp_path):
    msplora_case(tmp_path / "a")
    weighted, plain = ma.load_redundancy(tmp_path / "a"), ma.load_redundancy(tmp_path / "a", moments="none")
    for with_task, without in zip(weighted, plain, strict=True):
        kept = [column for column in with_task if not column.startswith("task")]
        assert len(kept) == len(with_task.columns) - 3
        pd.testing.assert_frame_equal(with_task[kept], without)
