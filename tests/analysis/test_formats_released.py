"""Checkpoints of the released MSPLoRA code and of loralib, against dense sums and loralib's own merging."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from adapters import assert_promised

from msplora_analysis import AnalysisError
from msplora_analysis.compute.linalg.spectra import adapter_spectra
from msplora_analysis.files.opening import open_tensors
from msplora_analysis.formats import loralib as loralib_format
from msplora_analysis.formats import read_contents
from msplora_analysis.options import Options

torch.set_num_threads(1)

PAPER, EXECUTED = Options(), Options(semantics="as-executed")


def load(path: Path, config: dict, options: Options = PAPER):
    """``{(scale, group, name): (matrix, singular values)}`` and the notes of a file."""
    with open_tensors(path) as file:
        matrices, unknown, notes = read_contents(config, file, options)
        assert unknown == []
        sigma = [found.sigma for found in adapter_spectra(file, matrices)]
    found = {(m.scale, m.group, m.name): (m, values) for m, values in zip(matrices, sigma, strict=True)}
    assert len(found) == len(matrices)
    return found, notes


def error(path: Path, config: dict, options: Options = PAPER) -> str:
    with pytest.raises(AnalysisError) as caught:
        load(path, config, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_matrix(found, key, dense: np.ndarray) -> None:
    matrix, sigma = found[key]
    assert (matrix.update.rows, matrix.update.cols) == dense.shape
    exact = np.zeros(len(sigma))
    values = np.linalg.svd(dense, compute_uv=False)[: len(sigma)]
    exact[: len(values)] = values
    assert_promised(sigma, exact)


# The released MSPLoRA code


class Released:
    """Tensors as that code makes, names and saves them, and what is executed. Layers from 0."""

    def __init__(self, layers: int, r: list[int], alpha: list[int], modules=("query", "value"), stack="encoder.layer"):
        self.config = {"peft_type": "MSPLORA", "r": r, "lora_alpha": alpha, "bias": "none"}
        self.scalings = [a / rank if rank else 0.0 for a, rank in zip(alpha, sorted(r, reverse=True), strict=False)]
        self.pairs: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.owns: set[tuple[str, int]] = set()
        generator = torch.Generator().manual_seed(0)
        last = len(r) - 1
        for module in modules:
            for layer in range(layers):
                for scale, rank in enumerate(sorted(r, reverse=True)):
                    owner = self.owner(layer, layers, scale, last)
                    key = f"{stack}.{layer}.{module}", scale
                    if owner == layer:
                        self.owns.add(key)
                        self.pairs[key] = tuple(
                            torch.randn(shape, generator=generator) for shape in ((rank, 16), (20, rank))
                        )
                    else:
                        self.pairs[key] = self.pairs[f"{stack}.{owner}.{module}", scale]

    @staticmethod
    def owner(layer: int, layers: int, scale: int, last: int) -> int:
        if scale == 0:
            return 0
        if scale == last:
            return layer
        start = next(g * layers / 3 for g in (2, 1, 0) if g * layers / 3 <= layer)
        return layer if layer - start < 1 else int(start)

    def save(self, folder: Path, spelling="lora_{}_{}", tensors=None) -> Path:
        state = {} if tensors is None else tensors
        for (name, scale), pair in self.pairs.items():
            for factor, tensor in zip("AB", pair, strict=True):
                state[f"base_model.model.{name}.{spelling.format(factor, scale)}.weight"] = tensor
        torch.save(state, folder / "adapter_model.bin")
        return folder / "adapter_model.bin"

    def dense(self, name: str, scale: int) -> np.ndarray:
        a, b = (factor.double().numpy() for factor in self.pairs[name, scale])
        return self.scalings[scale] * (b @ a)


def test_reference(reference):
    folder = reference / "original_msplora_6layers"
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = pd.read_csv(folder / "expected.csv").groupby(["scale", "group", "module"])["sigma"]
    found, notes = load(folder / "adapter_model.bin", config)
    single = {(m.scale, m.group, m.module): sigma for m, sigma in found.values() if m.scale != "total"}
    assert single.keys() == expected.groups.keys()
    for key, values in expected:
        assert_promised(single[key], values.to_numpy())
    assert len(notes) == 1


@pytest.mark.parametrize("spelling", ["lora_{}_{}", "lora_{}.default_{}", "lora_{}.my_1_{}"])
def test_scales_and_spellings(tmp_path, spelling):
    written = Released(6, [8, 4, 2], [16, 16, 16])
    classifier = {
        f"base_model.model.classifier.{copy}dense.{part}": torch.ones(3, 3)
        for copy in ("", "original_module.")
        for part in ("weight", "bias")
    }
    found, _ = load(written.save(tmp_path, spelling, classifier), written.config)
    assert len(found) == 2 * (1 + 3 + 6 + 6)
    for module in ("query", "value"):
        assert_matrix(found, ("global", 0, f"encoder.layer.0.{module}"), written.dense(f"encoder.layer.0.{module}", 0))
        for group, first in enumerate((0, 2, 4)):
            name = f"encoder.layer.{first}.{module}"
            assert_matrix(found, ("mid", group, name), written.dense(name, 1))
        for layer in range(6):
            name = f"encoder.layer.{layer}.{module}"
            assert_matrix(found, ("layer", layer, name), written.dense(name, 2))


# First layers of the paper's groups; where 3 does not divide, the other layers of the file refer to group 0's pair.
GROUPS = {1: [0], 2: [0, 1], 4: [0, 2, 3], 6: [0, 2, 4], 7: [0, 3, 5], 8: [0, 3, 6], 32: [0, 11, 22]}


@pytest.mark.parametrize("layers", GROUPS)
def test_totals_of_the_paper(tmp_path, layers):
    written = Released(layers, [4, 3, 2], [16, 8, 4], ["q_proj"], "model.layers")
    found, notes = load(written.save(tmp_path), written.config)
    firsts = [name for scale, _, name in found if scale == "mid"]
    assert firsts == [f"model.layers.{first}.q_proj" for first in GROUPS[layers]]
    for layer in range(layers):
        name = f"model.layers.{layer}.q_proj"
        first = max(first for first in GROUPS[layers] if first <= layer)
        mid = written.dense(f"model.layers.{first}.q_proj", 1)
        assert_matrix(found, ("total", layer, name), written.dense(name, 0) + mid + written.dense(name, 2))
    assert any("another group" in note for note in notes) == (layers in (7, 8, 32))


@pytest.mark.parametrize("layers", GROUPS)
def test_totals_as_executed(tmp_path, layers):
    written = Released(layers, [4, 3, 2], [16, 8, 4], ["q_proj"], "model.layers")
    found, notes = load(written.save(tmp_path), written.config, EXECUTED)
    paper, _ = load(tmp_path / "adapter_model.bin", written.config)
    assert found.keys() == paper.keys()
    for layer in range(layers):
        name = f"model.layers.{layer}.q_proj"
        dense = sum(written.dense(name, scale) for scale in range(3) if (name, scale) in written.owns)
        assert_matrix(found, ("total", layer, name), dense)
    assert len(notes) == 1


def test_ranks_are_sorted_and_alphas_are_not(tmp_path):
    written = Released(3, [2, 4, 8], [4, 8, 16])
    assert written.scalings == [0.5, 2, 8]
    found, _ = load(written.save(tmp_path), written.config)
    name = "encoder.layer.0.query"
    for scale, number in {"global": 0, "mid": 1, "layer": 2}.items():
        assert_matrix(found, (scale, 0, name), written.dense(name, number))


def test_before_training(tmp_path):
    """B = 0 everywhere: what is shared shows in A."""
    written = Released(6, [4, 2, 1], [16, 16, 16])
    for _, b in written.pairs.values():
        b.zero_()
    found, _ = load(written.save(tmp_path), written.config)
    assert len(found) == 32
    assert all((sigma == 0).all() for _, sigma in found.values())


@pytest.mark.parametrize("options", [PAPER, EXECUTED], ids=["paper", "as executed"])
@pytest.mark.parametrize("ranks", [[8], [8, 4], [8, 6, 4, 2], [8, 4, 2, 1, 1], [8, 4, 0]])
def test_other_numbers_of_scales(tmp_path, ranks, options):
    written = Released(6, ranks, [16] * (len(ranks) + 1), ["query"])
    if not ranks[-1]:
        written.pairs = {key: pair for key, pair in written.pairs.items() if len(pair[0])}
    found, notes = load(written.save(tmp_path), written.config, options)
    last, name = len(ranks) - 1, "encoder.layer.2.query"
    scales = {"global", *(["mid"] if last > 1 else []), *(["layer"] if last and ranks[-1] else [])}
    assert {scale for scale, *_ in found} - {"total"} == scales
    assert_matrix(found, ("global", 0, "encoder.layer.0.query"), written.dense("encoder.layer.0.query", 0))
    if last > 1:
        assert_matrix(found, ("mid", 1, name), sum(written.dense(name, scale) for scale in range(1, last)))
    total = sum(
        written.dense(name, scale)
        for scale, rank in enumerate(ranks)
        if rank and (options is PAPER or (name, scale) in written.owns)
    )
    if last:
        assert_matrix(found, ("total", 2, name), total)
    assert any("mid is their sum" in note for note in notes) == (last > 2)


def test_each_stack_has_its_own_pyramid(tmp_path):
    written = Released(3, [4, 2, 1], [16] * 3, ["query"], "encoder.layer")
    other = Released(4, [4, 2, 1], [16] * 3, ["0.self.query", "1.cross.query"], "decoder.block")
    for i, (a, b) in enumerate({id(pair): pair for pair in other.pairs.values()}.values()):
        a += i
        b += i
    written.pairs |= other.pairs
    found, _ = load(written.save(tmp_path), written.config)
    assert [name for scale, _, name in found if scale == "global"] == [
        "decoder.block.0.0.self.query",
        "decoder.block.0.1.cross.query",
        "encoder.layer.0.query",
    ]


def test_shared_tensors_saved_once(tmp_path):
    """Someone's conversion may keep one copy: the total is the paper's all the same."""
    written = Released(6, [4, 2, 1], [16] * 3, ["query"])
    whole, _ = load(written.save(tmp_path), written.config)
    written.pairs = {key: pair for key, pair in written.pairs.items() if key in written.owns}
    found, _ = load(written.save(tmp_path), written.config)
    assert found.keys() == whole.keys()
    for key in whole:
        np.testing.assert_array_equal(found[key][1], whole[key][1])


def drop(name, scale):
    return lambda written: written.pairs.pop((name, scale))


def distinct(written):
    a, b = written.pairs["encoder.layer.3.query", 0]
    written.pairs["encoder.layer.3.query", 0] = a + 1, b


@pytest.mark.parametrize(
    ("spoil", "config", "message"),
    [
        (None, {"r": 8}, "adapter_config.json: r must be a list of numbers, one a scale, got 8"),
        (None, {"lora_alpha": []}, "adapter_config.json: lora_alpha must be a list of numbers, one a scale, got []"),
        (None, {"lora_alpha": [16]}, "adapter_config.json: lora_alpha has 1 entries, r has 3"),
        (
            None,
            {"r": [8, 2, 1]},
            "tensor base_model.model.encoder.layer.0.query.lora_A_0.weight has rank 4, adapter_config.json says 8 "
            "for scale 0; is it the config of another adapter?",
        ),
        (
            None,
            {"r": [4, 2], "lora_alpha": [16, 16]},
            "tensor base_model.model.encoder.layer.0.query.lora_A_2.weight is of scale 2, r of adapter_config.json "
            "has 2 entries; is it the config of another adapter?",
        ),
        (
            drop("encoder.layer.4.query", 1),
            {},
            "no pair of scale 1 for encoder.layer.4.query in the file; save the adapter again",
        ),
        (
            distinct,
            {},
            "the layers of encoder.layer.*.query have 2 different global pairs where they should share one; "
            "are the tensors of several adapters mixed?",
        ),
    ],
)
def test_what_cannot_be_used(tmp_path, spoil, config, message):
    written = Released(6, [4, 2, 1], [16] * 3, ["query"])
    if spoil:
        spoil(written)
    assert error(written.save(tmp_path), written.config | config) == message


# loralib


@pytest.fixture(scope="module")
def lora():
    return pytest.importorskip("loralib")


def trained(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def merged_difference(module: torch.nn.Module, weight: torch.nn.Parameter) -> np.ndarray:
    """What loralib adds to the weight when it merges, in float64."""
    module.double().train()
    before = weight.detach().clone()
    module.eval()
    return (weight.detach() - before).numpy()


CONFIG = {"lora_alpha": 12, "r": 4}


@pytest.mark.parametrize("config", [CONFIG, {"lora_alpha": 12}, {}])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("Linear", {"in_features": 9, "out_features": 11}),
        ("Linear", {"in_features": 9, "out_features": 11, "fan_in_fan_out": True}),
        ("Embedding", {"num_embeddings": 13, "embedding_dim": 7}),
    ],
    ids=["linear", "transposed", "embedding"],
)
def test_loralib_layers(tmp_path, lora, kind, arguments, config):
    layer = trained(getattr(lora, kind)(**arguments, r=4, lora_alpha=12))
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    found, notes = load(tmp_path / "lora.pt", config)
    dense = merged_difference(layer, layer.weight)
    if kind == "Embedding" or arguments.get("fan_in_fan_out"):
        dense = dense.T
    assert_matrix(found, ("layer", 0, "layers.0"), dense if config else dense / 3)
    assert len(notes) == (not config)


@pytest.mark.parametrize("enabled", [[True, False, True], [True] * 3, [False, True, False]])
def test_loralib_merged_linear_has_a_matrix_for_each_part(tmp_path, lora, enabled):
    attention = torch.nn.Module()
    attention.c_attn = trained(lora.MergedLinear(8, 24, r=4, lora_alpha=12, enable_lora=enabled, fan_in_fan_out=True))
    model = torch.nn.ModuleDict({"h": torch.nn.ModuleList([torch.nn.Identity(), attention])})
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    found, _ = load(tmp_path / "lora.pt", CONFIG)
    merged = merged_difference(attention.c_attn, attention.c_attn.weight)
    parts = [part for part, on in zip(np.split(merged.T, 3), enabled, strict=True) if on]
    assert len(found) == len(parts)
    for i, part in enumerate(parts):
        suffix = f".{i}" if len(parts) > 1 else ""
        assert_matrix(found, ("layer", 1, f"h.1.c_attn{suffix}"), part)
        assert found["layer", 1, f"h.1.c_attn{suffix}"][0].module == f"c_attn{suffix}"


@pytest.mark.parametrize("groups", [1, 2])
def test_loralib_convolution_is_b_a_before_it_is_viewed_as_the_weight(tmp_path, lora, groups):
    layer = trained(lora.Conv2d(6, 8, 3, r=2, lora_alpha=12, groups=groups))
    torch.save(lora.lora_state_dict(torch.nn.ModuleDict({"conv": layer})), tmp_path / "lora.pt")
    found, _ = load(tmp_path / "lora.pt", {"lora_alpha": 12, "r": 2})
    weight = merged_difference(layer, layer.conv.weight)
    assert_matrix(found, ("layer", None, "conv"), weight.reshape(8 // groups * 3, 6 * 3))
    assert len(found["layer", None, "conv"][1]) == 6
    frobenius = math.sqrt((found["layer", None, "conv"][1] ** 2).sum())
    assert frobenius == pytest.approx(np.linalg.norm(weight))


def test_loralib_biases_are_left_out(tmp_path, lora):
    model = trained(torch.nn.Sequential(lora.Linear(5, 6, r=2), torch.nn.Linear(6, 7)))
    torch.save(lora.lora_state_dict(model, bias="all"), tmp_path / "lora.pt")
    found, _ = load(tmp_path / "lora.pt", CONFIG | {"r": 2})
    assert list(found) == [("layer", 0, "0")]


def test_loralib_other_weights_are_unknown(tmp_path, lora):
    model = trained(torch.nn.Sequential(lora.Linear(5, 6, r=2), torch.nn.Linear(6, 7)))
    torch.save(model.state_dict(), tmp_path / "all.pt")
    with open_tensors(tmp_path / "all.pt") as file:
        assert loralib_format.read({}, file, PAPER).unknown == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        (
            ((6, 5), (7, 4)),
            {},
            "tensors fc.lora_A and fc.lora_B have shapes [6, 5] and [7, 4]; expected (r g, in) and (out, r) of g "
            "parts, where g divides out; save the adapter again",
        ),
        (
            ((8, 5), (7, 4)),
            {},
            "tensors fc.lora_A and fc.lora_B have shapes [8, 5] and [7, 4]; expected (r g, in) and (out, r) of g "
            "parts, where g divides out; save the adapter again",
        ),
        (
            ((4, 5), (7, 4)),
            {"r": 2, "lora_alpha": 1},
            "tensor fc.lora_A has rank 4, adapter_config.json says 2; is it the config of another adapter?",
        ),
        (
            ((4, 5), (7, 4)),
            {"r": 0, "lora_alpha": 1},
            "tensor fc.lora_A has rank 4, adapter_config.json says 0; is it the config of another adapter?",
        ),
        (
            ((4, 5), (7, 4)),
            {"lora_alpha": "16"},
            "adapter_config.json: lora_alpha must be a number, got '16'",
        ),
        (((4, 5), None), {}, "tensor fc.lora_A has no factor B beside it; save the adapter again"),
    ],
)
def test_loralib_what_cannot_be_used(tmp_path, shapes, config, message):
    tensors = {f"fc.lora_{f}": torch.ones(shape) for f, shape in zip("AB", shapes, strict=True) if shape}
    torch.save(tensors, tmp_path / "lora.pt")
    assert error(tmp_path / "lora.pt", config) == message
