"""What layers could share: pyramids that are found again, fits against dense arithmetic, and what PEFT loads."""

import json

import numpy as np
import pytest
import torch
from moment_cases import lora_factors, random_tokens, update_of, write_moments
from safetensors.numpy import load_file
from torch import nn
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import AnalysisError, cli
from msplora_analysis.compute.sharing import Part, Ranks, contiguous_groups, nearest_pyramid
from msplora_analysis.write.share import COLUMNS

peft = pytest.importorskip("peft")
from msplora_core import MSPLoraConfig  # noqa: E402
from msplora_core.tuners.msplora import pyramid as core  # noqa: E402

torch.set_num_threads(1)


def part(rng, rows, cols, rank):
    return Part(rng.normal(size=(rows, rank)), rng.normal(size=(rank, cols)))


def pyramid(rng, layers, rows, cols, ranks, groups=3):
    """The updates of layers that are a pyramid."""
    group_of = contiguous_groups(range(layers), groups)
    shared = part(rng, rows, cols, ranks[0])
    mid = [part(rng, rows, cols, ranks[1]) for _ in range(max(group_of) + 1)]
    updates = []
    for group in group_of:
        parts = [shared, mid[group], part(rng, rows, cols, ranks[2])]
        updates.append(Part(np.hstack([one.b for one in parts]), np.vstack([one.a for one in parts])))
    return updates, group_of


def left(updates, group_of, fit):
    """The squared norm of what a fit leaves of each layer, from dense matrices."""
    rest = (
        update.whole - fit.shared.whole - fit.mid[group].whole - own.whole
        for update, group, own in zip(updates, group_of, fit.layer, strict=True)
    )
    return np.array([np.sum(one**2) for one in rest])


@pytest.mark.parametrize(
    ("layers", "rows", "cols", "ranks", "asked"),
    [
        (6, 40, 30, (8, 4, 2), (8, 4, 2)),
        (12, 40, 50, (2, 3, 4), (2, 3, 4)),
        (6, 40, 30, (4, 2, 1), (8, 8, 8)),  # ranks to spare
        (3, 40, 30, (4, 2, 2), (4, 2, 2)),  # each group is one layer
        (5, 16, 16, (8, 4, 2), (8, 4, 2)),  # the layers span all there is
        (4, 40, 30, (8, 0, 2), (8, 0, 2)),
        (4, 40, 30, (0, 4, 2), (0, 4, 2)),
    ],
)
def test_a_pyramid_is_found_again(layers, rows, cols, ranks, asked):
    updates, group_of = pyramid(np.random.default_rng(0), layers, rows, cols, ranks)
    fit = nearest_pyramid(updates, group_of, Ranks(*asked))
    whole = np.array([np.sum(update.whole**2) for update in updates])
    assert (left(updates, group_of, fit) <= 1e-20 * whole).all()
    assert (fit.lost <= 1e-20 * whole).all()
    assert [len(one.a) for one in (fit.shared, fit.mid[0], fit.layer[0])] == list(asked)


def test_one_scale_alone_has_a_closed_form():
    rng = np.random.default_rng(1)
    updates = [part(rng, 20, 30, 4) for _ in range(5)]
    group_of = contiguous_groups(range(5), 3)
    fit = nearest_pyramid(updates, group_of, Ranks(6, 0, 0))
    mean = np.mean([update.whole for update in updates], axis=0)
    sigma = np.linalg.svd(mean, compute_uv=False)
    spread = sum(np.sum((update.whole - mean) ** 2) for update in updates)
    assert fit.lost.sum() == pytest.approx(spread + 5 * np.sum(sigma[6:] ** 2), rel=1e-10)
    np.testing.assert_allclose(fit.lost, left(updates, group_of, fit), rtol=1e-9)
    fit = nearest_pyramid(updates, group_of, Ranks(0, 0, 3))
    least = [np.linalg.svd(update.whole, compute_uv=False)[3] ** 2 for update in updates]
    np.testing.assert_allclose(fit.lost, least, rtol=1e-10)


def test_a_fit_cannot_be_made_better_scale_by_scale():
    rng = np.random.default_rng(2)
    exact, group_of = pyramid(rng, 6, 30, 24, (6, 3, 2))
    updates = [Part(np.hstack([one.b, two.b]), np.vstack([one.a, two.a]))
               for one, two in zip(exact, (part(rng, 30, 24, 5) for _ in exact), strict=True)]  # fmt: skip
    fit = nearest_pyramid(updates, group_of, Ranks(6, 3, 2))
    np.testing.assert_allclose(fit.lost, left(updates, group_of, fit), rtol=1e-8)
    truth = sum(np.sum((update.whole - one.whole) ** 2) for update, one in zip(updates, exact, strict=True))
    assert fit.lost.sum() < truth  # the pyramid that was hidden is one candidate
    for ranks in (Ranks(6, 3, 0), Ranks(6, 0, 0)):
        assert nearest_pyramid(updates, group_of, ranks).lost.sum() > fit.lost.sum()


def test_weights_favour_a_layer():
    rng = np.random.default_rng(3)
    updates = [part(rng, 20, 30, 4) for _ in range(4)]
    plain = nearest_pyramid(updates, [0, 0, 1, 1], Ranks(4, 2, 1))
    weighted = nearest_pyramid(updates, [0, 0, 1, 1], Ranks(4, 2, 1), [1.0, 0.01, 0.01, 0.01])
    assert weighted.lost[0] < 0.2 * plain.lost[0]
    assert weighted.lost.sum() > plain.lost.sum()


@pytest.mark.parametrize(("layers", "groups"), [(range(6), 3), (range(32), 3), ([4, 1, 9], 5), ([0, 0, 1, 2, 2], 2)])
def test_groups_are_those_of_training(layers, groups):
    expected = core.contiguous_groups(list(layers), groups)
    assert contiguous_groups(list(layers), groups) == [expected[layer] for layer in layers]


# Adapters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(24, 24, bias=False)
        self.value = nn.Linear(24, 16)

    def forward(self, x):
        return self.query(x) + self.value(x).repeat(1, 2)[:, :24]


class Blocks(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def saved(folder, config):
    """An adapter with random factors, as PEFT saves it; and its model."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Blocks(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "msplora_" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return model


def updates_of(model):
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().double().numpy()
    return found


LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}


def test_an_exported_msplora_comes_back(tmp_path):
    config = MSPLoraConfig(ranks={"global": 4, "mid": 2, "layer": 1}, target_modules=["query", "value"])
    model = saved(tmp_path / "msplora", config)
    ma.export(tmp_path / "msplora", tmp_path / "plain")
    for adapter, ranks in ((tmp_path / "plain", (4, 2, 1)), (tmp_path / "msplora", None)):
        table = ma.share(adapter, tmp_path / "shared", ranks=ranks, overwrite=True)
        assert (table.loc[table["scales"] == "global+mid+layer", "error"] < 1e-6).all()
        loaded = peft.PeftModel.from_pretrained(Blocks(), tmp_path / "shared")
        assert loaded.peft_config["default"].peft_type == "MSPLORA"
        assert loaded.peft_config["default"].ranks == {"global": 4, "mid": 2, "layer": 1}
        expected, found = updates_of(model), updates_of(loaded)
        assert expected.keys() == found.keys()
        for name, update in expected.items():
            np.testing.assert_allclose(found[name], update, atol=1e-4 * np.abs(update).max())


def test_what_is_written_has_the_error_that_is_told(tmp_path):
    model = saved(tmp_path / "lora", peft.LoraConfig(**LORA, modules_to_save=["head"]))
    table = ma.share(tmp_path / "lora", tmp_path / "shared", ranks=(4, 3, 1), groups=2, format="csv")
    loaded = peft.PeftModel.from_pretrained(Blocks(), tmp_path / "shared")
    before, after = updates_of(model), updates_of(loaded)
    whole = table[table["scales"] == "global+mid+layer"]
    layers = whole[whole["unit"] == "layer"].set_index("name")
    for name, update in before.items():
        error = np.linalg.norm(update - after[name]) / np.linalg.norm(update)
        assert layers.loc[name, "error"] == pytest.approx(error, rel=1e-4)
        assert layers.loc[name, "norm"] == pytest.approx(np.linalg.norm(update), rel=1e-5)
        assert layers.loc[name, "energy"] == pytest.approx(1 - error**2, abs=1e-5)
    for module, rows in whole[whole["unit"] == "module"].groupby("module"):
        names = [name for name in before if name.endswith(module)]
        lost = sum(np.sum((before[name] - after[name]) ** 2) for name in names)
        square = sum(np.sum(before[name] ** 2) for name in names)
        row = rows.iloc[0]
        assert row["error"] == pytest.approx((lost / square) ** 0.5, rel=1e-4)
        out, into = before[names[0]].shape
        assert row["parameters"] == (out + into) * (4 + 3 * 2 + 1 * 4)
        sigma = np.sort(np.concatenate([np.linalg.svd(before[name], compute_uv=False) for name in names]) ** 2)[::-1]
        assert row["unshared"] == pytest.approx(sigma[: 4 + 6 + 4].sum() / square, rel=1e-6)
    groups = whole[whole["unit"] == "group"]
    assert groups.groupby("module").size().tolist() == [2, 2]
    assert torch.equal(
        loaded.base_model.model.head.modules_to_save["default"].weight,
        model.base_model.model.head.modules_to_save["default"].weight,
    )
    config = json.loads((tmp_path / "shared" / "adapter_config.json").read_text())
    assert config["mid_groups"] == 2


@pytest.mark.slow
def test_random_layers_share_what_chance_gives(tmp_path):
    saved(tmp_path / "lora", peft.LoraConfig(**LORA))
    out = ["--out", str(tmp_path / "shared")]
    command = ["share", str(tmp_path / "lora"), *out, "--ranks", "2,1,1", "--figure", "svg"]
    result = CliRunner().invoke(cli.make_app(), command)
    assert result.exit_code == 0, result.output
    assert "what could layers share? nothing beyond chance" in result.output
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "sharing.parquet"),
        *("layers_share.svg", "layers_share.csv"),
    }
    again = CliRunner().invoke(cli.make_app(), [*command, "--overwrite"])
    assert again.output == result.output
    saved(tmp_path / "msplora", MSPLoraConfig(r=4, target_modules=["query", "value"]))
    result = CliRunner().invoke(cli.make_app(), ["share", str(tmp_path / "msplora"), *out, "--overwrite"])
    assert "of the energy beyond chance: global and mid parts keep" in result.output
    assert "as MSPLoRA 4/2/1" in result.output


def test_bad_input_is_one_line(tmp_path):
    saved(tmp_path / "lora", peft.LoraConfig(**LORA))
    for options, message in (
        ({"ranks": (8, 4)}, "ranks=8,4"),
        ({"ranks": (8, 4, 0)}, "layer at least 1"),
        ({"ranks": (0, 0, 2)}, "one of the others"),
        ({"ranks": (17, 1, 1)}, "16 x 24 weights"),
        ({"groups": 0}, "groups=0"),
        ({"weights": "moments"}, "no moments"),
        ({"format": "txt"}, "format=txt"),
    ):
        with pytest.raises(AnalysisError, match=message):
            ma.share(tmp_path / "lora", tmp_path / "shared", **options)
        assert not (tmp_path / "shared").exists()
    result = CliRunner().invoke(
        cli.make_app(), ["share", str(tmp_path / "lora"), "--out", str(tmp_path / "o"), "--ranks", "8,x,1"]
    )
    assert result.exit_code == 2
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.ModuleDict({"one": nn.Linear(8, 8)}), peft.LoraConfig(r=2, target_modules=["one"]))
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(AnalysisError, match="no linear module in a numbered layer"):
        ma.share(tmp_path / "alone", tmp_path / "shared", ranks=(2, 1, 1))


@pytest.mark.slow
def test_moments_price_the_fit(tmp_path):
    model = saved(tmp_path / "lora", peft.LoraConfig(**LORA))
    factors = lora_factors(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    tokens = {
        name: random_tokens(*update_of(pair).shape, seed=seed) for seed, (name, pair) in enumerate(factors.items())
    }
    write_moments(tmp_path / "lora", factors, tokens)
    tables = [
        ma.share(tmp_path / "lora", tmp_path / weights, ranks=(2, 1, 1), weights=weights)
        for weights in ("none", "moments")
    ]
    np.testing.assert_array_equal(*(table["task_error_weighted"] for table in tables))
    layers = tables[0].query("unit == 'layer' and scales == 'global+mid+layer'").set_index("name")
    before = updates_of(model)
    for weights, column in (("none", "task_error"), ("moments", "task_error_weighted")):
        after = updates_of(peft.PeftModel.from_pretrained(Blocks(), tmp_path / weights))
        for name, update in before.items():
            ((a, b),) = factors[name].values()
            rest = b @ np.linalg.pinv(b) @ (update - after[name]) @ np.linalg.pinv(a) @ a  # of the update's own spaces
            weighted = [np.linalg.norm(tokens[name].weighted(one)) for one in (rest, update)]
            assert layers.loc[name, column] == pytest.approx(weighted[0] / weighted[1], rel=1e-3)
    for name, update in before.items():
        error = np.linalg.norm(update - after[name]) / np.linalg.norm(update)
        assert layers.loc[name, "error_weighted"] == pytest.approx(error, rel=1e-4)
    assert ma.share(tmp_path / "lora", tmp_path / "off", ranks=(2, 1, 1), moments="none").columns.tolist() == list(
        COLUMNS
    )
