"""Adapters of research code, in the names and shapes of its sources, against the forward of each in float64.

An update is what a module's forward adds for each unit vector: its columns are those of the dense update.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import write_adapter
from safetensors.numpy import save_file
from test_formats_programs import assert_read, error

from msplora_analysis import AnalysisError, diagnose, export, load_parts, load_redundancy, load_spectra

torch.set_num_threads(1)
RNG = np.random.default_rng(0)
QUERY = "encoder.layer.1.attention.self.query"
KEY = f"base_model.model.{QUERY}"
ROWS, COLS, RANK = 12, 9, 4


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def lone(folder: Path, tensors: dict[str, np.ndarray], config: dict | None = None, name: str = "a.safetensors") -> Path:
    """A file of tensors, and what a user says of its scale beside it."""
    folder.mkdir(exist_ok=True)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


def update(forward, cols: int = COLS) -> np.ndarray:
    """(out, in) of what ``forward`` makes of each row of inputs."""
    return forward(np.eye(cols)).T


# SoRA: TsinghuaC3I/SoRA, src/lora.py, LowRankLinear.forward


def sora(gate: np.ndarray, prefix: str = f"{QUERY}.lora") -> tuple[dict[str, np.ndarray], np.ndarray]:
    tensors = {"lora_A": values(RANK, COLS), "lora_B": values(ROWS, RANK), "gate": gate}
    a, b, g = (value.astype(float) for value in tensors.values())
    dense = update(lambda x: (x @ a.T * g) @ b.T * (16 / RANK))
    return {f"{prefix}.{key}": value for key, value in tensors.items()}, dense


@pytest.mark.parametrize("prefix", [f"{QUERY}.lora", QUERY])
def test_sora(tmp_path, prefix):
    gate = values(1, RANK)
    gate[0, 2] = 0
    tensors, dense = sora(gate, prefix)
    path = lone(tmp_path / "a", tensors, {"lora_alpha": 16, "r": RANK})
    assert_read(path, {QUERY: dense}, notes=1)
    with pytest.warns(UserWarning, match=rf"3 of 4 ranks are active.*{QUERY} \(3 of 4\)"):
        spectra = load_spectra(path, cache=False)
    assert (spectra["sigma"] > 0).sum() == 3


def test_sora_without_its_alpha_and_as_a_plain_lora(tmp_path):
    tensors, dense = sora(values(1, RANK))
    assert_read(lone(tmp_path / "a", tensors), {QUERY: dense / (16 / RANK)}, notes=2)
    with pytest.raises(AnalysisError, match="does not hold lora_alpha"):
        export(tmp_path / "a" / "a.safetensors", tmp_path / "no")
    with pytest.warns(UserWarning, match="SoRA"):
        export(lone(tmp_path / "b", tensors, {"lora_alpha": 16, "r": RANK}), tmp_path / "plain")
    assert_read(tmp_path / "plain", {QUERY: dense})
    assert f"adapter_config.json says {RANK + 1}" in error(
        lone(tmp_path / "c", tensors, {"lora_alpha": 1, "r": RANK + 1})
    )
    broken = {**tensors, f"{QUERY}.lora.gate": values(1, RANK + 1)}
    assert f"{QUERY}.lora.gate has shape [1, 5]; expected [1, 4]" in error(lone(tmp_path / "d", broken))


# AdaLoRA: QingruZhang/AdaLoRA, loralib/loralib/adalora.py, SVDLinear.forward


@pytest.mark.parametrize("alpha", [16, 0])
@pytest.mark.parametrize("counted", [True, False])
def test_original_adalora(tmp_path, alpha, counted):
    tensors = {"lora_A": values(RANK, COLS), "lora_E": values(RANK, 1), "lora_B": values(ROWS, RANK)}
    tensors["lora_E"][1] = 0
    a, e, b = (value.astype(float) for value in tensors.values())
    dense = update(lambda x: x @ (a * e).T @ b.T * (alpha or RANK) / (RANK + 1e-5))
    if counted:
        tensors["ranknum"] = np.float32([RANK])
    path = lone(tmp_path / "a", {f"{QUERY}.{key}": value for key, value in tensors.items()}, {"lora_alpha": alpha})
    assert_read(path, {QUERY: dense})
    export(path, tmp_path / "plain")
    assert_read(tmp_path / "plain", {QUERY: dense})


# LoRA-XS: MohammadrezaBanaei/LoRA-XS, utils/latent_utils.py, get_delta_weight


@pytest.mark.parametrize("core", [f"{KEY}_lora_latent_mapping.weight", f"{KEY}.default_lora_latent_mapping.weight"])
def test_lora_xs(tmp_path, core):
    a, r, b = values(RANK, COLS), values(RANK, RANK), values(ROWS, RANK)
    tensors = {f"{KEY}.lora_A.weight": a, f"{KEY}.lora_B.weight": b, core: r}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16}
    folder = write_adapter(tmp_path / "a", tensors, config)
    dense = 16 / RANK * b.astype(float) @ r.astype(float) @ a.astype(float)
    assert_read(folder, {QUERY: dense})
    export(folder, tmp_path / "plain")
    assert_read(tmp_path / "plain", {QUERY: dense})


def test_lora_xs_whose_parts_are_missing(tmp_path):
    tensors = {f"{KEY}.lora_A.weight": values(RANK, COLS), f"{KEY}.lora_B.weight": values(ROWS, RANK)}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16}
    core = f"{KEY}_lora_latent_mapping.weight"
    other = core.replace("query", "value")
    assert f"{core} has shape" in error(write_adapter(tmp_path / "a", {**tensors, core: values(3, 3)}, config))
    assert f"{other} has no lora_A" in error(write_adapter(tmp_path / "b", {**tensors, other: values(4, 4)}, config))
    more = {key.replace("query", "value"): value for key, value in tensors.items()}
    message = error(write_adapter(tmp_path / "c", {**tensors, **more, core: values(4, 4)}, config))
    assert "value.lora_A.weight has no lora_latent_mapping" in message


# FLoRA: SJTU-DeepVisionLab/FLoRA, flora/layers.py, FLoRALayer.forward


@pytest.mark.parametrize(("kernel", "ranks"), [((), (3, 4)), ((3, 2), (3, 4, 2, 1)), ((2, 3, 2), (2, 3, 2, 1, 2))])
def test_flora(tmp_path, kernel, ranks):
    lengths = (COLS, ROWS, *kernel)
    core, *factors = values(*ranks), *(values(length, rank) for length, rank in zip(lengths, ranks, strict=True))
    tensors = {f"{QUERY}.flora_layer.param_{i}": factor for i, factor in enumerate(factors)}
    tensors[f"{QUERY}.flora_layer.param_G"] = core
    weight = torch.tensor(core).double()
    for factor in factors:
        weight = torch.tensordot(weight, torch.tensor(factor).double(), dims=[[0], [1]])
    dense = 4.0 * weight.transpose(0, 1).reshape(ROWS, -1).numpy()
    assert_read(lone(tmp_path / "a", tensors, {"scale": 4.0}), {QUERY: dense})
    assert_read(lone(tmp_path / "b", tensors), {QUERY: dense / 4}, notes=1)
    assert "param_1 beside it" in error(lone(tmp_path / "c", {k: v for k, v in tensors.items() if "param_1" not in k}))


# NOLA: UCDvision/NOLA, vit/NOLA.py, NOLA2.forward


def test_nola_with_its_bases(tmp_path):
    alpha, beta, a, b = values(5), values(6), values(5, COLS, RANK), values(6, RANK, ROWS)
    tensors = {"nola_alpha": alpha, "nola_beta": beta, "A": a, "B": b, "seed": np.int64([7])}
    mixed_a = np.einsum("b,bdr->dr", alpha.astype(float), a.astype(float))
    mixed_b = np.einsum("b,bdr->dr", beta.astype(float), b.astype(float))
    dense = update(lambda x: x @ mixed_a @ mixed_b / RANK)
    assert_read(lone(tmp_path / "a", {f"{QUERY}.{key}": value for key, value in tensors.items()}), {QUERY: dense})


@pytest.mark.parametrize("keys", [("lora_A.coefficients", "lora_A.seed"), ("nola_alpha", "nola_beta")])
def test_nola_without_its_bases(tmp_path, keys):
    message = error(lone(tmp_path / "a", {f"{QUERY}.{key}": values(1) for key in keys}))
    assert f"tensor {QUERY}.{keys[0]}: NOLA's coefficients" in message
    assert "save the weights of lora_A and lora_B" in message


# HydraLoRA: Clin0212/HydraLoRA, HydraLoRA/peft/tuners/lora.py, Linear.forward


def hydra(parts: int = 3) -> dict[str, np.ndarray]:
    tensors = {f"{KEY}.lora_B{i}.weight": values(ROWS, RANK) for i in range(parts)}
    return {**tensors, f"{KEY}.lora_A.weight": values(RANK, COLS), f"{KEY}.lora_route.weight": values(parts, COLS)}


HYDRA = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "lora_nums": 3}


def test_the_parts_of_hydralora(tmp_path):
    tensors = hydra()
    folder = write_adapter(tmp_path / "a", tensors, HYDRA)
    a = tensors[f"{KEY}.lora_A.weight"].astype(float)
    parts = [16 / RANK * tensors[f"{KEY}.lora_B{i}.weight"].astype(float) @ a for i in range(3)]
    assert_read(folder, {f"{QUERY}.{i}": part for i, part in enumerate(parts)}, notes=1)

    # With the weights of its router, the parts are what the adapter adds.
    x = values(5, COLS).astype(float)
    logits = x @ tensors[f"{KEY}.lora_route.weight"].astype(float).T
    route = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    added = sum(
        route[:, i : i + 1] * (x @ a.T @ tensors[f"{KEY}.lora_B{i}.weight"].astype(float).T) * 16 / RANK
        for i in range(3)
    )
    np.testing.assert_allclose(sum(route[:, i : i + 1] * (x @ parts[i].T) for i in range(3)), added)
    with pytest.raises(AnalysisError, match="a router mixes its parts"):
        export(folder, tmp_path / "plain")


def test_hydralora_whose_parts_are_missing(tmp_path):
    without = {key: value for key, value in hydra().items() if "B1" not in key}
    assert "lora_nums 3" in error(write_adapter(tmp_path / "a", without, HYDRA))
    assert "has no B1 beside it" in error(write_adapter(tmp_path / "b", without, {**HYDRA, "lora_nums": 2}))
    alone = {key: value for key, value in hydra().items() if "lora_A" not in key}
    assert "has no A beside it" in error(write_adapter(tmp_path / "c", alone, HYDRA))


# LoRAMoE: Ablustrund/LoRAMoE, peft/tuners/lora.py, Linear.forward; MixLoRA: moe_peft/model.py, get_lora_layer_weight


def test_the_experts_of_loramoe(tmp_path):
    pairs = [(values(RANK, COLS), values(ROWS, RANK)) for _ in range(3)]
    tensors = {f"{KEY}.lora_{part}{i}.weight": pair["AB".index(part)] for i, pair in enumerate(pairs) for part in "AB"}
    tensors[f"{KEY}.lora_route.weight"] = values(3, COLS)
    expected = {f"{QUERY}.{i}": 16 / RANK * b.astype(float) @ a for i, (a, b) in enumerate(pairs)}
    assert_read(write_adapter(tmp_path / "a", tensors, HYDRA), expected, notes=1)
    del tensors[f"{KEY}.lora_A1.weight"]
    assert "has no A1 beside it" in error(write_adapter(tmp_path / "b", tensors, HYDRA))


@pytest.mark.parametrize("earlier", [False, True])
def test_the_experts_of_mixlora(tmp_path, earlier):
    pairs = [(values(RANK, COLS), values(ROWS, RANK)) for _ in range(2)]
    a, b = values(2, COLS), values(ROWS, 2)
    place = "experts.{}.up_proj" if earlier else "mlp.up_proj.experts.{}"
    tensors = {
        f"mixlora.layers.1.{place.format(i)}.lora_{part}.weight": pair["AB".index(part)]
        for i, pair in enumerate(pairs)
        for part in "AB"
    }
    tensors["mixlora.layers.1.gate.weight" if earlier else "mixlora.layers.1.mlp.moe_gate.weight"] = values(2, COLS)
    attention = "layers.1.self_attn.q_proj"
    tensors |= {f"mixlora.{attention}.lora_A.weight": a, f"mixlora.{attention}.lora_B.weight": b}
    experts = {"r": RANK, "lora_alpha": 16, "use_rslora": True}
    config = {"peft_type": "MIXLORA", "r": 2, "lora_alpha": 6, "num_experts": 2, "expert_lora": experts}
    name = "model.layers.1.up_proj" if earlier else "model.layers.1.mlp.up_proj"
    expected = {f"{name}.{i}": 16 / RANK**0.5 * b.astype(float) @ a for i, (a, b) in enumerate(pairs)}
    expected[f"model.{attention}"] = 3 * b.astype(float) @ a
    assert_read(write_adapter(tmp_path / "a", tensors, config), expected, notes=1)
    assert "num_experts 3" in error(write_adapter(tmp_path / "b", tensors, {**config, "num_experts": 3}))


def test_how_alike_the_parts_of_a_mixture_are(tmp_path):
    tensors = hydra(4)
    b = [f"{KEY}.lora_B{i}.weight" for i in range(4)]
    tensors[b[1]], tensors[b[3]] = -2 * tensors[b[0]], 0 * tensors[b[3]]
    folder = write_adapter(tmp_path / "a", tensors, {**HYDRA, "lora_nums": 4})
    table = load_parts(folder)
    a = tensors[f"{KEY}.lora_A.weight"].astype(float)
    dense = np.stack([(16 / RANK * tensors[one].astype(float) @ a).ravel() for one in b])
    np.testing.assert_allclose(table["inner"], (dense @ dense.T)[np.triu_indices(4)], rtol=1e-12, atol=1e-9)
    of_two = table.set_index(["part_i", "part_j"])["cosine"]
    assert (of_two[0, 1], of_two[0, 0]) == (pytest.approx(-1), pytest.approx(1))
    assert np.isnan(of_two[0, 3])
    # The first two are one direction: of three parts that are not zero, one matrix of cosines has two eigenvalues.
    values = np.linalg.eigvalsh(dense[:3] @ dense[:3].T / np.outer(*[np.linalg.norm(dense[:3], axis=1)] * 2))
    p = values[values > 1e-9] / 3
    assert table["span"].unique() == pytest.approx([np.exp(-(p * np.log(p)).sum())])
    assert set(table["parts"]) == {4}
    with pytest.raises(AnalysisError, match="it is no mixture of parts"):
        load_parts(write_adapter(tmp_path / "b"))


# Lily: PEFT trains and saves it, and its own forward mixes the experts


def test_the_experts_of_lily(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {f"layer{i}": torch.nn.ModuleDict({"q": torch.nn.Linear(COLS, ROWS)}) for i in range(4)}
    )
    config = peft.LilyConfig(r=RANK, num_B=2, stride_A=2, scaling=3.0, target_modules=["q"], init_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "a")
    expected = {}
    for i in range(4):
        module = model.base_model.model[f"layer{i}"]["q"]
        a, b = (getattr(module, f"lily_{x}")["default"].weight.detach().double().numpy() for x in "AB")
        expected |= {f"layer{i}.q.{e}": 3.0 * b[e * RANK : (e + 1) * RANK].T @ a for e in range(2)}
        # A router that always takes one expert makes its update: the forward of PEFT adds just that.
        module.double()
        x = torch.randn(5, COLS, dtype=torch.float64)
        for e in range(2):
            forced = torch.nn.functional.one_hot(torch.tensor([e]), 2).double() * 1e9
            module.lily_router["default"].forward = lambda hidden, forced=forced: forced.expand(len(hidden), 2)
            added = (module(x) - module.base_layer(x)).detach().numpy()
            np.testing.assert_allclose(added, x.numpy() @ expected[f"layer{i}.q.{e}"].T, rtol=1e-9, atol=1e-12)
    assert_read(tmp_path / "a", expected, notes=1)
    with pytest.raises(AnalysisError, match="a router mixes its experts"):
        export(tmp_path / "a", tmp_path / "plain")


def test_layers_of_lily_are_equal_by_design(tmp_path):
    peft = pytest.importorskip("peft")
    layers = torch.nn.ModuleList(torch.nn.ModuleDict({"q": torch.nn.Linear(COLS, ROWS)}) for _ in range(4))
    config = peft.LilyConfig(r=RANK, num_B=2, stride_A=2, scaling=3.0, target_modules=["q"], init_weights=False)
    peft.get_peft_model(torch.nn.ModuleDict({"layers": layers}), config).save_pretrained(tmp_path / "a")
    pairs, _ = load_redundancy(tmp_path / "a")
    assert pairs["cosine"].max() == pytest.approx(1)
    assert not {"identical-update", "adjacent-redundant"} & set(diagnose(tmp_path / "a")["id"])
