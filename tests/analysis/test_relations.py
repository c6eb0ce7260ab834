"""relate against dense float64: every column, the rows of two adapters in all, names of other trainers."""

import numpy as np
import pytest
from adapters import lora_config, lora_tensors, msplora_config, msplora_tensors, write_adapter
from safetensors.numpy import save_file
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import cli
from msplora_analysis.ask.relations import groups, sentences
from msplora_analysis.formats.matching import matched

NAMES = ("encoder.layer.0.query", "encoder.layer.1.query")


def dense(tensors, name, scaling=2.0):
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    return scaling * b @ a


def space(matrix):
    """The projections on the column and on the row space."""
    u, sigma, vt = np.linalg.svd(matrix)
    rank = int((sigma > 1e-6 * sigma[0]).sum())
    return u[:, :rank] @ u[:, :rank].T, vt[:rank].T @ vt[:rank]


def expected(x, y, k):
    (out_x, in_x), (out_y, in_y) = space(x), space(y)
    inside = {"a": out_y @ x @ in_y, "b": out_x @ y @ in_x}
    (u, _, v), (w, _, z) = np.linalg.svd(x), np.linalg.svd(y)
    return {
        "norm_a": np.linalg.norm(x),
        "norm_b": np.linalg.norm(y),
        "cosine": (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y),
        "overlap_in": np.linalg.norm(v[:k] @ z[:k].T) ** 2 / k,
        "overlap_out": np.linalg.norm(u[:, :k].T @ w[:, :k]) ** 2 / k,
        "expected_in": k / x.shape[1],
        "expected_out": k / x.shape[0],
        "k": k,
        "energy_a_in_b": (np.linalg.norm(inside["a"]) / np.linalg.norm(x)) ** 2,
        "energy_b_in_a": (np.linalg.norm(inside["b"]) / np.linalg.norm(y)) ** 2,
        "norm_sum": np.linalg.norm(x + y),
        "norm_difference": np.linalg.norm(x - y),
        "rank_a": np.linalg.matrix_rank(x),
        "rank_b": np.linalg.matrix_rank(y),
        "rank_sum": np.linalg.matrix_rank(x + y, rtol=1e-6) if (x + y).any() else 0,
    }


@pytest.fixture
def two(tmp_path):
    """Adapters of ranks 2 and 3 that share an input direction in the second module."""
    first = lora_tensors(*NAMES, rank=2, rows=12, cols=10, seed=1)
    second = lora_tensors(*NAMES, rank=3, rows=12, cols=10, seed=2)
    key = f"base_model.model.{NAMES[1]}.lora_A.weight"
    second[key][0] = first[key][0]
    paths = [
        write_adapter(tmp_path / "one", first),
        write_adapter(tmp_path / "two", second, lora_config(r=3, lora_alpha=6)),
    ]
    return paths, first, second


def test_each_module_is_as_the_dense_updates_have_it(two):
    paths, first, second = two
    table = ma.relate(*paths)
    assert list(table.columns[:14]) == [
        *("a", "b", "module", "name", "norm_a", "norm_b", "cosine", "overlap_in", "overlap_out"),
        *("expected_in", "expected_out", "k", "energy_a_in_b", "energy_b_in_a"),
    ]
    assert table["name"].tolist() == [*NAMES, ""]
    for name in NAMES:
        row = table.set_index("name").loc[name]
        for column, value in expected(dense(first, name), dense(second, name), 2).items():
            assert row[column] == pytest.approx(value, rel=1e-9, abs=1e-9), (name, column)


def test_in_all_two_adapters_are_one_block_diagonal_matrix(two):
    paths, first, second = two
    row = ma.relate(*paths).query("module == 'all'").iloc[0]
    x, y = (np.zeros((24, 20)) for _ in "xy")
    for i, name in enumerate(NAMES):
        place = np.s_[12 * i : 12 * i + 12, 10 * i : 10 * i + 10]
        x[place], y[place] = dense(first, name), dense(second, name)
    of_dense = expected(x, y, 4)
    for column in ("norm_a", "norm_b", "cosine", "norm_sum", "norm_difference", "energy_a_in_b", "energy_b_in_a"):
        assert row[column] == pytest.approx(of_dense[column], rel=1e-9), column
    assert [row[column] for column in ("k", "rank_a", "rank_b", "rank_sum")] == [4, 4, 6, of_dense["rank_sum"]]
    assert row["expected_in"] == pytest.approx(2 / 10)  # of spaces that keep to their module


def test_an_adapter_against_itself_its_opposite_and_zero(tmp_path):
    tensors = lora_tensors(NAMES[0], rows=8, cols=9)
    b = f"base_model.model.{NAMES[0]}.lora_B.weight"
    opposite, zero = tensors | {b: -tensors[b]}, tensors | {b: 0 * tensors[b]}
    paths = [
        write_adapter(tmp_path / name, of) for name, of in zip("pqrs", (tensors, tensors, opposite, zero), strict=True)
    ]
    table = ma.relate(paths)
    assert table["cosine"].abs().max() <= 1  # rounding too must not go beyond
    rows = table.query("module == 'all'").set_index(["a", "b"])
    same, against, none = (rows.loc[("p", other)] for other in "qrs")
    assert (same["cosine"], same["energy_a_in_b"], same["rank_sum"]) == (pytest.approx(1), pytest.approx(1), 2)
    assert (against["cosine"], against["rank_sum"]) == (pytest.approx(-1), 0)
    assert against["norm_sum"] == pytest.approx(0, abs=1e-6 * against["norm_a"])
    assert (np.isnan(none["cosine"]), none["norm_sum"], none["rank_sum"]) == (True, pytest.approx(none["norm_a"]), 2)


def test_scales_of_msplora_count_as_one_update(tmp_path):
    config = msplora_config()
    tensors = msplora_tensors(range(3), [0, 1, 2], config["ranks"])
    paths = [write_adapter(tmp_path / "pyramid", tensors, config)]
    ma.export(paths[0], tmp_path / "plain")
    row = ma.relate(paths[0], tmp_path / "plain").query("module == 'all'").iloc[0]
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    assert row["norm_difference"] < 1e-5 * row["norm_a"]


def test_names_of_trainers_are_matched():
    peft = ["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"]
    diffusers = [f"text_encoder.{name}" for name in peft]
    kohya = ["lora_te_" + name.replace(".", "_") for name in peft]
    body = [name.removeprefix("text_model.") for name in peft]  # of the model without its head
    for other in (diffusers, kohya, body):
        assert matched([peft, other])[1] == dict(zip(other, peft, strict=True))
    assert matched([peft, ["something.else"]])[1] == {"something.else": "something.else"}


def test_kohyas_file_and_pefts_folder_of_one_update_agree(tmp_path):
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors = lora_tensors(name)
    folder = write_adapter(tmp_path / "peft", tensors)
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    key = "lora_te_" + name.replace(".", "_")
    kohya = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": np.array(4.0, np.float32)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    row = ma.relate(folder, tmp_path / "kohya.safetensors").iloc[0]
    assert row["cosine"] == pytest.approx(1)


def test_of_several_runs_the_last_checkpoint_of_one_all(tmp_path):
    for run in ("one", "two"):
        for step in (10, 20):
            tensors = lora_tensors(NAMES[0], seed=step + len(run))
            write_adapter(tmp_path / run / f"checkpoint-{step}", tensors, epoch=step / 10)
    across = ma.relate(tmp_path)
    assert set(across["a"]) | set(across["b"]) == {"one", "two"}
    moved = ma.relate(tmp_path / "one")
    assert (moved["a"].iloc[0], moved["b"].iloc[0]) == ("one step 10", "one step 20")
    named = ma.relate(tmp_path / "one" / "checkpoint-10", tmp_path / "two")
    assert (named["a"].iloc[0], named["b"].iloc[0]) == ("one", "two")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: lora_tensors("decoder.layer.0.value"), "shares no module"),
        (lambda t: lora_tensors(*NAMES, cols=7), "5 × 7"),
    ],
)
def test_adapters_of_other_models_are_refused(tmp_path, change, told):
    one = write_adapter(tmp_path / "one", lora_tensors(*NAMES))
    two = write_adapter(tmp_path / "two", change(None))
    with pytest.raises(ma.AnalysisError, match=told) as error:
        ma.relate(one, two)
    assert str(two / "adapter_model.safetensors") in str(error.value)
    with pytest.raises(ma.AnalysisError, match="one adapter alone"):
        ma.relate(one)


def test_what_has_no_counterpart_is_told(tmp_path):
    one = write_adapter(tmp_path / "one", lora_tensors(*NAMES))
    two = write_adapter(tmp_path / "two", lora_tensors(NAMES[0], seed=3))
    assert ma.relate(one, two).attrs["unmatched"] == {"one": [NAMES[1]]}


def test_sentences_say_which_are_alike(tmp_path):
    rng = np.random.default_rng(0)
    style, other = (lora_tensors(NAMES[0], rows=150, cols=150, seed=seed) for seed in (1, 2))
    nearly = {key: (of + 0.3 * rng.standard_normal(of.shape)).astype(np.float32) for key, of in style.items()}
    paths = [write_adapter(tmp_path / name, of) for name, of in zip("xyz", (style, nearly, other), strict=True)]
    table = ma.relate(*paths)
    assert groups(table.query("module == 'all'")) == [["x", "y"], ["z"]]
    assert sentences(table)[0].startswith("most alike: x and y")
    (about_two,) = sentences(ma.relate(paths[0], paths[1]))
    assert "add to each other" in about_two
    (about_others,) = sentences(ma.relate(paths[0], paths[2]))
    assert "hardly touch" in about_others


def test_of_one_run_it_says_how_far_it_moved(tmp_path):
    first = lora_tensors(NAMES[0], rows=50, cols=50, seed=1)
    later = {key: of * (1.2 if "lora_B" in key else 1.0) for key, of in first.items()}
    for step, of in ((10, first), (20, later), (30, later)):
        write_adapter(tmp_path / "run" / f"checkpoint-{step}", of)
    (moved,) = sentences(ma.relate(tmp_path / "run"))
    assert "moved by 0.0% of its norm from run step 20 to 30, before that 16.7% of its norm from" in moved


def test_of_alike_ones_it_says_what_they_have_in_common(tmp_path):
    rng = np.random.default_rng(0)
    common = lora_tensors(NAMES[0], rows=150, cols=150, rank=2, seed=1)
    paths, updates = [], []
    for label in "xyz":
        own = {key: (of + rng.standard_normal(of.shape)).astype(np.float32) for key, of in common.items()}
        paths.append(write_adapter(tmp_path / label, own))
        updates.append(dense(own, NAMES[0]))
    share = np.linalg.norm(np.mean(updates, axis=0)) ** 2 / np.mean([np.linalg.norm(one) ** 2 for one in updates])
    assert f"has {share:.0%} of the squared norm (of unrelated ones 33%)" in sentences(ma.relate(paths))[1]


def test_the_command_writes_table_and_figure_and_tells_the_rest(two, tmp_path):
    paths, _, _ = two
    out = tmp_path / "out"
    options = ["--out", str(out), "--format", "csv", "--figure", "svg"]
    done = CliRunner().invoke(cli.make_app(), ["relate", *map(str, paths), *options])
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"relations.csv", "relations.svg"}
    assert done.stdout.startswith("one and two ")
    assert str(out / "relations.svg") in done.stdout
