"""The tables of pairs and of scales against the dense updates, PEFT's own delta weights, and cases made by hand."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from adapters import dense, lora_config, lora_tensors, msplora_config, msplora_tensors, write_adapter
from scipy.linalg import subspace_angles
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, wasserstein_distance
from test_cli import run

import msplora_analysis as ma
from msplora_analysis.compute import pairs as between
from msplora_analysis.tables.pair_means import adjacent, summary

PAIRS = [
    *("run", "step", "epoch", "scale", "module", "group_i", "group_j", "kl_ij", "kl_ji", "js", "wasserstein"),
    *("overlap_in", "overlap_out", "overlap_expected", "cosine"),
]
KEY = "base_model.model."


def lora(tensors, name, scaling=2.0):
    a, b = (tensors[f"{KEY}{name}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return scaling * b @ a


def assert_row(row, x, y, k, lengths):
    """Every measure of two dense updates: the first k directions, and spectra of these lengths."""
    (u, s, v), (p, t, q) = (np.linalg.svd(m, full_matrices=False) for m in (x, y))
    for column, one, two in (("overlap_in", v[:k].T, q[:k].T), ("overlap_out", u[:, :k], p[:, :k])):
        assert row[column] == pytest.approx((np.cos(subspace_angles(one, two)) ** 2).mean(), abs=1e-6)
    assert row["overlap_expected"] == pytest.approx((k / x.shape[0] + k / x.shape[1]) / 2)
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert row["cosine"] == pytest.approx(cosine, abs=1e-6)
    r = min(lengths)
    s, t = s[:r] / s[:r].sum(), t[:r] / t[:r].sum()
    expected = {
        **{"kl_ij": entropy(s, t), "kl_ji": entropy(t, s), "js": jensenshannon(s, t) ** 2},
        "wasserstein": wasserstein_distance(range(r), range(r), s, t),
    }
    for column, value in expected.items():
        assert row[column] == pytest.approx(value, rel=1e-6, abs=1e-9), column


def names(count, module="query"):
    return [f"encoder.layer.{layer}.attention.{module}" for layer in range(count)]


@pytest.mark.parametrize("top_k", [None, 1, 2, 9])
def test_pairs_are_those_of_the_dense_updates(tmp_path, top_k):
    tensors = lora_tensors(*names(11), rank=3, rows=14, cols=18)
    pairs = ma.load_pairs(write_adapter(tmp_path / "run" / "checkpoint-5", tensors, lora_config(r=3, lora_alpha=6), 1))
    assert pairs.columns.tolist() == PAIRS
    assert list(zip(pairs["group_i"], pairs["group_j"], strict=True)) == list(combinations(range(11), 2))
    assert set(pairs["run"]) == {"run"}
    assert set(pairs["step"]) == {5}
    assert set(pairs["epoch"]) == {1}
    assert set(pairs["scale"]) == {"layer"}
    assert set(pairs["module"]) == {"query"}
    capped = ma.load_pairs(tmp_path, top_k=top_k)
    for row in capped.to_dict("records"):
        x, y = (lora(tensors, names(11)[row[f"group_{side}"]]) for side in "ij")
        assert_row(row, x, y, min(top_k or 3, 3), (3, 3))


def test_unequal_ranks_are_matched_and_it_is_said(tmp_path):
    ranks = (2, 5, 3)
    tensors = {}
    for seed, (name, rank) in enumerate(zip(names(3), ranks, strict=True)):
        tensors |= lora_tensors(name, rank=rank, rows=14, cols=18, seed=seed)
    pattern = dict(zip(names(3), ranks, strict=True))
    write_adapter(tmp_path / "run", tensors, lora_config(rank_pattern=pattern))
    with pytest.warns(UserWarning, match="query: layers have 2 to 5 singular values; divergences compare the same"):
        pairs = ma.load_pairs(tmp_path / "run")
    for row in pairs.to_dict("records"):
        i, j = row["group_i"], row["group_j"]
        x, y = (lora(tensors, names(3)[g]) for g in (i, j))
        assert_row(row, x, y, min(ranks[i], ranks[j]), (ranks[i], ranks[j]))


def test_equal_rotated_and_orthogonal_layers(tmp_path):
    """Equal spectra say nothing of directions: only equal layers overlap."""
    rng = np.random.default_rng(0)
    tensors = lora_tensors(*names(4), rank=4, rows=64, cols=64)
    a, b = (tensors[f"{KEY}{names(4)[0]}.lora_{factor}.weight"] for factor in "AB")
    rotation, other = (np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2))
    # 1: the same update by other factors. 2: rotated on both sides. 3: orthogonal to it on both sides.
    mix = rng.standard_normal((4, 4))
    off_a, off_b = np.linalg.svd(a)[2][4:8], np.linalg.svd(b.T)[2][4:8]
    for layer, (x, y) in enumerate([(mix @ a, b @ np.linalg.inv(mix)), (a @ rotation, other @ b), (off_a, off_b.T)], 1):
        tensors[f"{KEY}{names(4)[layer]}.lora_A.weight"] = np.ascontiguousarray(x, dtype=np.float64)
        tensors[f"{KEY}{names(4)[layer]}.lora_B.weight"] = np.ascontiguousarray(y, dtype=np.float64)
    pairs = ma.load_pairs(write_adapter(tmp_path / "run", tensors, lora_config(r=4))).set_index(["group_i", "group_j"])
    same, rotated, orthogonal = (pairs.loc[0, layer] for layer in (1, 2, 3))
    assert same[["overlap_in", "overlap_out", "cosine"]].tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    np.testing.assert_allclose(pairs.loc[[(0, 1), (0, 2)], ["kl_ij", "kl_ji", "js", "wasserstein"]], 0, atol=1e-6)
    assert rotated["overlap_expected"] == 4 / 64
    assert 0 < rotated["overlap_in"] < 0.15
    assert 0 < rotated["overlap_out"] < 0.15
    assert orthogonal[["overlap_in", "overlap_out", "cosine"]].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    # What holds of one factorisation of an update holds of another.
    columns = [c for c in PAIRS[7:] if c not in ("kl_ij", "kl_ji")]
    np.testing.assert_allclose(
        pairs.loc[(0, 2), columns].astype(float), pairs.loc[(1, 2), columns].astype(float), atol=1e-6
    )


def test_a_negative_scaling_turns_the_cosine(tmp_path):
    tensors = lora_tensors(*names(2))
    for factor in "AB":
        tensors[f"{KEY}{names(2)[1]}.lora_{factor}.weight"] = tensors[f"{KEY}{names(2)[0]}.lora_{factor}.weight"]
    config = lora_config(alpha_pattern={names(2)[1]: -3})
    row = ma.load_pairs(write_adapter(tmp_path / "run", tensors, config)).iloc[0]
    assert row["cosine"] == pytest.approx(-1, abs=1e-6)
    assert row["overlap_in"] == pytest.approx(1, abs=1e-6)


def test_numerical_rank_and_updates_of_zero(tmp_path):
    tensors = lora_tensors(*names(3), rank=3, rows=20, cols=20)
    tensors[f"{KEY}{names(3)[1]}.lora_B.weight"][:, 1:] = 0
    tensors[f"{KEY}{names(3)[2]}.lora_B.weight"][:] = 0
    write_adapter(tmp_path / "run", tensors, lora_config(r=3))
    pairs = ma.load_pairs(tmp_path / "run", details=True)
    assert pairs["k"].tolist() == [1, 0, 0]
    assert pairs["overlap_expected"].iloc[0] == 1 / 20
    x, y = (lora(tensors, names(3)[layer]) for layer in (0, 1))
    (u, _, v), (p, _, q) = (np.linalg.svd(m) for m in (x, y))
    assert pairs["overlap_in"].iloc[0] == pytest.approx((v[0] @ q[0]) ** 2, abs=1e-6)
    assert pairs["overlap_out"].iloc[0] == pytest.approx((u[:, 0] @ p[:, 0]) ** 2, abs=1e-6)
    assert pairs.iloc[1:][PAIRS[7:]].isna().all(axis=None)


def test_what_is_not_compared(tmp_path):
    """Encoder with decoder, self- with cross-attention, other shapes, experts with one another, single modules."""
    places = {
        **{f"encoder.block.{i}.layer.0.SelfAttention.q": (8, 8) for i in range(2)},
        **{f"decoder.block.{i}.layer.0.SelfAttention.q": (8, 8) for i in range(2)},
        **{f"decoder.block.{i}.layer.1.EncDecAttention.q": (8, 8) for i in range(2)},
        **{f"model.layers.{i}.mlp.experts.{e}.up": (8, 6) for i in range(2) for e in range(3)},
        "model.layers.0.wide": (9, 8),
        "model.layers.1.wide": (8, 9),
        "pooler.dense": (8, 8),
    }
    tensors = {}
    for seed, (name, (rows, cols)) in enumerate(places.items()):
        tensors |= lora_tensors(name, rows=rows, cols=cols, seed=seed)
    pairs = ma.load_pairs(write_adapter(tmp_path / "run", tensors), details=True)
    cross = ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q")
    assert sorted(zip(pairs["name_i"], pairs["name_j"], strict=True)) == [
        *((f"decoder.block.0.{rest}", f"decoder.block.1.{rest}") for rest in cross),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.0.SelfAttention.q"),
        *((f"model.layers.0.mlp.experts.{e}.up", f"model.layers.1.mlp.experts.{e}.up") for e in range(3)),
    ]  # fmt: skip
    assert pairs["module"].tolist().count("q") == 3


def test_blocks_and_processes_do_not_change_the_tables(tmp_path, monkeypatch):
    ranks = {"global": 5, "mid": 3, "layer": 2}
    for step in (1, 2):
        tensors = msplora_tensors(range(9), [0, 3, 6], ranks, ("query", "value"), rows=30, cols=20, seed=step)
        write_adapter(tmp_path / "run" / f"checkpoint-{step}", tensors, msplora_config())
    whole = ma.load_redundancy(tmp_path, details=True)
    parallel = ma.load_redundancy(tmp_path, details=True, workers=2)
    monkeypatch.setattr(between, "_HELD", 8 * 50 * 2 * 4)  # four layers, or one total
    monkeypatch.setattr(between, "_PRODUCTS", 200)
    blocks = ma.load_redundancy(tmp_path, details=True)
    for table, other, of_blocks in zip(whole, parallel, blocks, strict=True):
        assert len(table)
        pd.testing.assert_frame_equal(table, other)
        pd.testing.assert_frame_equal(table, of_blocks, atol=1e-6, rtol=1e-5)


def test_scales_of_one_layer(tmp_path):
    ranks = {"global": 5, "mid": 3, "layer": 2}
    mid_of = [0, 0, 0, 1, 1, 2, 2]
    tensors = msplora_tensors(range(7), [0, 3, 5], ranks, rows=20, cols=18)
    tables = ma.load_redundancy(write_adapter(tmp_path / "run", tensors, msplora_config()))
    groups = tables.pairs.groupby("scale").size()
    assert dict(groups) == {"mid": 3, "layer": 21, "total": 21}
    assert len(tables.scales) == 3 * 7
    scales = ma.load_scale_pairs(tmp_path / "run")
    pd.testing.assert_frame_equal(scales, tables.scales)
    firsts = {"global": [0], "mid": [0, 3, 5], "layer": range(7)}
    for row in scales.to_dict("records"):
        layer = row["group"]
        assert row["name"] == f"encoder.layer.{layer}.self.query"
        unit = {"global": 0, "mid": mid_of[layer], "layer": layer}
        both = [row["scale_i"], row["scale_j"]]
        assert both in (["global", "mid"], ["global", "layer"], ["mid", "layer"])
        assert [row["group_i"], row["group_j"]] == [unit[scale] for scale in both]
        keys = [f"encoder.layer.{firsts[scale][unit[scale]]}.self.query.msplora_{scale}" for scale in both]
        x, y = (dense(tensors, key, 16) for key in keys)
        lengths = [ranks[scale] for scale in both]
        assert_row(row, x, y, min(lengths), lengths)


def test_totals_are_compared_as_the_sum_of_their_scales(tmp_path):
    ranks = {"global": 3, "mid": 2, "layer": 1}
    tensors = msplora_tensors(range(3), [0, 1, 2], ranks, rows=20, cols=18)
    pairs = ma.load_pairs(write_adapter(tmp_path / "run", tensors, msplora_config(ranks=ranks)))
    total = [
        dense(tensors, "encoder.layer.0.self.query.msplora_global", 16)
        + sum(dense(tensors, f"encoder.layer.{i}.self.query.msplora_{scale}", 16) for scale in ("mid", "layer"))
        for i in range(3)
    ]
    for row in pairs[pairs["scale"] == "total"].to_dict("records"):
        assert_row(row, total[row["group_i"]], total[row["group_j"]], 6, (6, 6))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "lokr", "loha", "adalora"])
def test_adapters_that_peft_writes(tmp_path, method):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from test_formats import bert

    torch.set_num_threads(1)
    torch.manual_seed(0)
    common = {"target_modules": ["query"]}
    config = {
        "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **common),
        "lokr": lambda: peft.LoKrConfig(r=4, decompose_factor=4, **common),
        "loha": lambda: peft.LoHaConfig(r=2, alpha=4, **common),
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, **common),
    }[method]()
    model = peft.get_peft_model(bert(), config)
    updates = []
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            for key, factor in module.named_parameters():
                if "default" in key and factor.requires_grad:
                    torch.nn.init.normal_(factor)
            updates.append(module.get_delta_weight("default").detach().double().numpy())
    model.save_pretrained(tmp_path / "run")
    pairs = ma.load_pairs(tmp_path / "run", details=True)
    assert len(pairs) == len(updates) * (len(updates) - 1) / 2 > 0
    for row in pairs.to_dict("records"):
        x, y = updates[row["group_i"]], updates[row["group_j"]]
        assert row["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-5)
        v, q = (np.linalg.svd(m)[2][: row["k"]] for m in (x, y))
        assert row["overlap_in"] == pytest.approx(np.linalg.norm(v @ q.T) ** 2 / row["k"], abs=1e-4)


def test_large_whole_matrices_give_their_largest_directions_and_no_cosine(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    from msplora_analysis.compute.linalg import truncated

    monkeypatch.setattr(truncated, "SMALL", 30)
    rng = np.random.default_rng(0)
    keys = [f"model.layers.{layer}.up.weight" for layer in range(2)]
    base = {key: rng.standard_normal((50, 40)) for key in keys}
    tuned = {key: weight + rng.standard_normal((50, 3)) @ rng.standard_normal((3, 40)) for key, weight in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    how = {"base": str(tmp_path / "base")}
    row = ma.load_pairs(tmp_path / "tuned", top_k=3, **how).iloc[0]
    v, q = (np.linalg.svd(tuned[key] - base[key])[2][:3] for key in keys)
    assert row["overlap_in"] == pytest.approx(np.linalg.norm(v @ q.T) ** 2 / 3, abs=1e-5)
    assert np.isnan(row["cosine"])
    monkeypatch.undo()
    row = ma.load_pairs(tmp_path / "tuned", top_k=3, **how).iloc[0]
    x, y = (tuned[key] - base[key] for key in keys)
    assert row["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)


def test_details_tell_chance_on_each_side(tmp_path):
    tensors = lora_tensors(*names(2), rank=2, rows=10, cols=40)
    row = ma.load_pairs(write_adapter(tmp_path / "run", tensors), details=True).iloc[0]
    assert (row["name_i"], row["name_j"], row["k"]) == (*names(2), 2)
    assert (row["expected_in"], row["expected_out"]) == (2 / 40, 2 / 10)
    assert row["overlap_expected"] == (2 / 40 + 2 / 10) / 2
    assert row["deviation_in"] < row["deviation_out"]


def test_nan_is_an_error_that_names_the_tensor(tmp_path):
    tensors = lora_tensors(*names(3))
    tensors[f"{KEY}{names(3)[1]}.lora_A.weight"][0, 0] = np.nan
    write_adapter(tmp_path / "run", tensors)
    with pytest.raises(ma.AnalysisError, match=r"layer\.1\.attention\.query\.lora_A\.weight holds NaN or Inf"):
        ma.load_pairs(tmp_path / "run")


# Summary and command


def test_adjacent_are_neighbours_among_the_compared_layers():
    pairs = pd.DataFrame(
        {
            **{"run": "r", "scale": "layer", "module": ["q", "q", "q", "v"]},
            **{"group_i": [0, 0, 4, 0], "group_j": [4, 9, 9, 9]},
        }
    )
    assert adjacent(pairs).tolist() == [True, False, True, True]


def test_summary_takes_the_last_checkpoint(tmp_path):
    ranks = {"global": 5, "mid": 3, "layer": 2}
    for step in (1, 2):
        tensors = msplora_tensors(range(6), [0, 2, 4], ranks, seed=step)
        write_adapter(tmp_path / "run" / f"checkpoint-{step}", tensors, msplora_config(), epoch=step)
    tables = ma.load_redundancy(tmp_path)
    means = summary(*tables).set_index("between")
    assert means.index.tolist() == [
        *("global-mid", "global-layer", "mid-layer", "mid, adjacent", "mid, all", "layer, adjacent", "layer, all"),
    ]
    assert set(means["epoch"]) == {2}
    assert means["pairs"].tolist() == [6, 6, 6, 2, 3, 5, 15]
    last = tables.pairs[(tables.pairs["epoch"] == 2) & (tables.pairs["scale"] == "layer")]
    near = last[last["group_j"] - last["group_i"] == 1]
    assert means.loc["layer, all", "overlap_in"] == pytest.approx(last["overlap_in"].mean())
    assert means.loc["layer, adjacent", "cosine"] == pytest.approx(near["cosine"].mean())


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_command_writes_both_tables(tmp_path, capsys, monkeypatch, suffix):
    ranks = {"global": 5, "mid": 3, "layer": 2}
    write_adapter(tmp_path / "run", msplora_tensors(range(3), [0, 1, 2], ranks), msplora_config())
    out = tmp_path / "out"
    arguments = ("redundancy", tmp_path / "run", "--out", out, "--format", suffix, "--top-k", 1)
    status, text, error = run(capsys, monkeypatch, *arguments)
    assert (status, error) == (0, "")
    for part in ("run: means over pairs", "global-layer", "layer, adjacent", f"{out}/pairs.{suffix}"):
        assert part in text
    read = {"parquet": pd.read_parquet, "csv": pd.read_csv}[suffix]
    pairs, scales = (read(out / f"{name}.{suffix}") for name in ("pairs", "scales"))
    assert pairs.columns.tolist() == PAIRS
    assert (len(pairs), len(scales)) == (9, 9)
    assert pairs["overlap_expected"].to_numpy() == pytest.approx((1 / 20 + 1 / 18) / 2, rel=1e-12)


def test_the_command_says_when_there_is_nothing_to_compare(tmp_path, capsys, monkeypatch):
    write_adapter(tmp_path / "run", lora_tensors("encoder.layer.0.query"))
    status, _, error = run(capsys, monkeypatch, "redundancy", tmp_path / "run", "--out", tmp_path / "out")
    assert status == 1
    assert error.startswith(f"error: {tmp_path / 'run'}: nothing to compare")
    assert error.count("\n") == 1
