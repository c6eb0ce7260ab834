"""LoHa, LoKr, and the single files of LyCORIS, kohya's scripts and diffusers, against the writers' own updates."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import assert_promised
from safetensors.torch import save_file

from msplora_analysis.compute.linalg.spectra import adapter_spectra
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.opening import open_tensors
from msplora_analysis.formats import looks_like_adapter, read_contents
from msplora_analysis.formats.helpers.flattened import dotted
from msplora_analysis.formats.names import module_of, stack_and_layer
from msplora_analysis.formats.updates import Contents, Kronecker, Sum, Whole
from msplora_analysis.options import Options

torch.set_num_threads(1)


def read(path: Path, config: dict | None = None) -> tuple[Contents, dict[str, np.ndarray]]:
    """What the formats make of a file, and the singular values of each module."""
    with open_tensors(path) as file:
        found = read_contents(config or {}, file, Options())
        sigma = [spectrum.sigma for spectrum in adapter_spectra(file, found.matrices)]
    assert [len(values) for values in sigma] == [matrix.update.rank for matrix in found.matrices]
    return found, {matrix.name: values for matrix, values in zip(found.matrices, sigma, strict=True)}


def written(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "adapter.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def error(path: Path, config: dict | None = None) -> str:
    with pytest.raises(AnalysisError) as caught:
        read(path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_spectrum(sigma: np.ndarray, update: torch.Tensor) -> None:
    """Singular values of a weight update, of which ``sigma`` may have fewer or more, the rest zeros."""
    dense = update.detach().double().flatten(1)
    exact = torch.linalg.svdvals(dense).numpy()
    n = max(len(sigma), len(exact))
    assert exact[0] > 0
    assert_promised(np.pad(sigma, (0, n - len(sigma))), np.pad(exact, (0, n - len(exact))))


def random(*shape: int, seed: int = 0, kind: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(kind)


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            if parameter.requires_grad:
                parameter.copy_(random(*parameter.shape, seed=i) if parameter.ndim else torch.tensor(0.7))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(24, 36)
        self.conv = torch.nn.Conv2d(16, 12, 3)
        self.point = torch.nn.Conv2d(12, 20, 1)
        self.line = torch.nn.Conv1d(12, 18, 5)
        self.wide = torch.nn.Linear(6, 60)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))


# PEFT

EVERY = ["to_q", "conv", "point", "line", "wide"]
PEFT_CASES = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "loha-patterns": (
        "LoHaConfig",
        {"r": 2, "alpha": 8, "rank_pattern": {"to_q": 4, "1.conv": 3}, "alpha_pattern": {"^blocks.0.line": 1}},
    ),
    "loha-tucker": ("LoHaConfig", {"r": 3, "alpha": 2, "use_effective_conv2d": True}),
    "loha-high-rank": ("LoHaConfig", {"r": 7, "alpha": 2, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr-patterns": ("LoKrConfig", {"r": 1, "alpha": 8, "rank_pattern": {"wide": 2}, "alpha_pattern": {"conv": 3}}),
    # Not "line": PEFT 0.21.2 cannot compute this update of a Conv1d itself.
    "lokr-tucker": (
        "LoKrConfig",
        {"r": 3, "alpha": 2, "use_effective_conv2d": True, "decompose_factor": 2, "target_modules": ["conv", "wide"]},
    ),
    "lokr-both": ("LoKrConfig", {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 4}),
    "lokr-whole": ("LoKrConfig", {"r": 64, "alpha": 16}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft(case, tmp_path):
    peft = pytest.importorskip("peft")
    kind, options = PEFT_CASES[case]
    config = getattr(peft, kind)(**{"target_modules": EVERY, **options})
    model = peft.get_peft_model(Model(), config)
    randomise(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    found, sigma = read(tmp_path / "adapter_model.safetensors", saved)
    assert (found.unknown, found.notes, len(sigma)) == ([], [], 2 * len(config.target_modules))
    for name, values in sigma.items():
        layer = model.base_model.model.get_submodule(name)
        assert_spectrum(values, layer.double().get_delta_weight("default"))


def test_lokr_of_an_old_peft_was_trained_with_another_scale(tmp_path):
    """PEFT 0.13: make_kron(w1, w2), of the scale 1; since 0.14 times alpha / r, for old files too."""
    left, right = random(3, 2), random(4, 5)
    path = written(tmp_path, {"base_model.model.q.lokr_w1": left, "base_model.model.q.lokr_w2": right})
    for settings, noted in (({}, True), ({"rank_dropout_scale": False}, False), ({"alpha": 2}, False)):
        found, sigma = read(path, {"peft_type": "LOKR", "r": 2, "alpha": 8, **settings})
        assert_spectrum(sigma["q"], settings.get("alpha", 8) / 2 * torch.kron(left.double(), right.double()))
        assert ["the scale 1" in note for note in found.notes] == [True] * noted


def test_peft_loha_is_never_formed_where_its_factors_are_smaller(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoHaConfig(target_modules=["to_q", "wide"], r=3))
    model.save_pretrained(tmp_path)
    found, sigma = read(tmp_path / "adapter_model.safetensors", {"peft_type": "LOHA", "r": 3, "alpha": 8})
    assert not any(values.any() for values in sigma.values())  # before training
    kinds = {matrix.name: (type(matrix.update), matrix.update.rank) for matrix in found.matrices}
    assert kinds["blocks.0.to_q"] == (Sum, 9)
    assert kinds["blocks.0.wide"] == (Whole, 6)  # 60 x 6


def test_peft_errors(tmp_path):
    loha = {f"a.hada_w{i}_{half}": random(*shape) for i in "12" for half, shape in (("a", (5, 2)), ("b", (2, 6)))}
    config = {"peft_type": "LOHA", "r": 2, "alpha": 8}
    path = written(tmp_path, loha)
    assert "a.hada_w1_b has rank 2, adapter_config.json says 3" in error(path, {**config, "r": 3})
    assert "alpha is missing" in error(path, {"peft_type": "LOHA", "r": 2})
    assert "the pattern 'a(' is not a regular" in error(path, {**config, "rank_pattern": {"a(": 3}})
    assert "no hada_w2_a beside it" in error(
        written(tmp_path, {k: v for k, v in loha.items() if "2_a" not in k}), config
    )
    assert "whose product needs one shape" in error(written(tmp_path, {**loha, "a.hada_w2_b": random(2, 7)}), config)
    cores = {"a.hada_t1": random(2, 2, 3, 3), "a.hada_t2": random(2, 2, 3, 3)}
    assert "do not make a Tucker product" in error(written(tmp_path, loha | cores), config)

    lokr = {"a.lokr_w1": random(2, 3), "a.lokr_w2": random(4, 5)}
    config = {"peft_type": "LOKR", "r": 2, "alpha": 8}
    assert "no lokr_w2 beside it" in error(written(tmp_path, {"a.lokr_w1": random(2, 3)}), config)
    assert "expected a matrix" in error(written(tmp_path, {**lokr, "a.lokr_w1": random(4)}), config)
    twice = {**lokr, "a.lokr_w1_a": random(2, 1), "a.lokr_w1_b": random(1, 3)}
    assert "the same matrix" in error(written(tmp_path, twice), {**config, "r": 1})
    assert read(written(tmp_path, {**lokr, "b.extra": random(2, 2)}), config)[0].unknown == ["b.extra"]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_loha_of_dependent_factors(kind, tmp_path):
    """Products of columns are dependent where the columns are."""
    factors = {"a.hada_w1_a": random(40, 4), "a.hada_w1_b": random(4, 50)}
    factors |= {"a.hada_w2_a": random(40, 4, seed=1), "a.hada_w2_b": random(4, 50, seed=1)}
    factors["a.hada_w1_a"][:, 1] = factors["a.hada_w1_a"][:, 0]
    factors["a.hada_w2_b"][2] = factors["a.hada_w2_b"][0] + 1e-4 * factors["a.hada_w2_b"][1]
    factors = {key: value.to(kind) for key, value in factors.items()}
    _, sigma = read(written(tmp_path, factors), {"peft_type": "LOHA", "r": 4, "alpha": 3})
    w1a, w1b, w2a, w2b = (value.double() for value in factors.values())
    assert_spectrum(sigma["a"], 3 / 4 * (w1a @ w1b) * (w2a @ w2b))


# LyCORIS

LYCORIS_CASES = {
    "lora": {},
    "lora-tucker": {"use_tucker": True},
    "lora-rs": {"rs_lora": True},
    "lora-scalar": {"use_scalar": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True, "rs_lora": True},
    "loha-scalar": {"algo": "loha", "use_scalar": True},
    "lokr": {"algo": "lokr", "linear_dim": 2, "conv_dim": 1},
    "lokr-both": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "decompose_both": True, "factor": 4},
    "lokr-tucker": {"algo": "lokr", "factor": 2, "use_tucker": True, "rs_lora": True},
    "lokr-scalar": {"algo": "lokr", "linear_dim": 2, "conv_dim": 1, "use_scalar": True},
    "lokr-whole": {"algo": "lokr", "full_matrix": True},
    "dylora": {"algo": "dylora", "linear_dim": 4, "conv_dim": 4, "block_size": 1},
    "full": {"algo": "full"},
}


def lycoris(folder: Path, **options) -> tuple[Path, Model, torch.nn.Module]:
    """A file that LyCORIS wrote, the model and the network that act on it."""
    library = pytest.importorskip("lycoris")
    from lycoris.config import PRESET

    library.LycorisNetwork.apply_preset({**PRESET["full"], "target_module": ["Linear", "Conv1d", "Conv2d"]})
    model = Model()
    arguments = {"linear_dim": 3, "linear_alpha": 2, "conv_dim": 3, "conv_alpha": 4, "algo": "lora", **options}
    network = library.create_lycoris(model, 1.0, **arguments)
    network.apply_to()
    randomise(network)
    path = folder / "adapter.safetensors"
    network.save_weights(path, None, {"ss_network_alpha": "2"})
    return path, model, network


def lycoris_update(layer: torch.nn.Module) -> torch.Tensor:
    """What a LyCORIS module adds to the weight in its forward pass."""
    layer.double()
    if type(layer).__name__ in (
        "LohaModule",
        "LokrModule",
    ):  # their get_diff_weight applies the scale twice (4.1.3), their forward once
        return layer.get_weight(layer.shape) * layer.scalar
    if type(layer).__name__ == "DyLoraModule":
        return layer.get_diff_weight(rank=layer.lora_dim - 1)[0]  # with the block after it: all
    return layer.get_diff_weight()[0]


@pytest.mark.parametrize("case", LYCORIS_CASES)
def test_lycoris(case, tmp_path):
    path, _, network = lycoris(tmp_path, **LYCORIS_CASES[case])
    found, sigma = read(path)
    layers = {layer.lora_name: layer for layer in network.loras}
    assert (found.unknown, len(sigma)) == ([], len(layers) == 10 and 10)
    assert all("biases" in note for note in found.notes)
    assert bool(found.notes) == (case == "full")
    for name, values in sigma.items():
        assert_spectrum(values, lycoris_update(layers[f"lycoris_{name.replace('.', '_')}"]))


def test_lycoris_dora_has_a_note(tmp_path):
    path, _, network = lycoris(tmp_path, dora_wd=True, weight_decompose=True)
    found, sigma = read(path)
    assert ["10 modules are DoRA's" in note for note in found.notes] == [True]
    assert_spectrum(sigma["blocks.1.to_q"], lycoris_update(network.lycoris_blocks_1_to_q))


@pytest.mark.parametrize(
    ("algo", "reason"),
    [
        ("ia3", "multiplies the weights"),
        ("diag-oft", "rotate the weights"),
        ("glora", "multiplies the weights"),
    ],
)
def test_lycoris_updates_that_need_the_model(algo, reason, tmp_path):
    path, *_ = lycoris(tmp_path, algo=algo, linear_dim=4, conv_dim=4)
    assert reason in error(path)
    with open_tensors(path) as file:
        assert looks_like_adapter(file.shapes)


def test_t_lora_needs_factors_that_are_not_saved(tmp_path):
    tensors = {"m.q_layer.weight": random(2, 6), "m.p_layer.weight": random(5, 2), "m.lambda_layer": random(1, 2)}
    assert "relative to factors that it does not save" in error(written(tmp_path, tensors))


# Spellings


def pair(rank: int = 2, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return random(rank, 6, **options), random(5, rank, **options)


SPELLINGS = {
    "kohya": ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_{}.weight", "down", "up"),
    "onetrainer": ("unet.down_blocks.1.attentions.0.proj_in.lora_{}.weight", "down", "up"),
    "diffusers": ("unet.down_blocks.1.attentions.0.proj_in.lora.{}.weight", "down", "up"),
    "diffusers-old": ("unet.down_blocks.1.attentions.0.processor.proj_in_lora.{}.weight", "down", "up"),
    "text-encoder": ("unet.down_blocks.1.attentions.0.proj_in.lora_linear_layer.{}.weight", "down", "up"),
    "peft": ("unet.down_blocks.1.attentions.0.proj_in.lora_{}.weight", "A", "B"),
    "peft-prefixed": ("base_model.model.unet.down_blocks.1.attentions.0.proj_in.lora_{}.weight", "A", "B"),
    "peft-named": ("unet.down_blocks.1.attentions.0.proj_in.lora_{}.default.weight", "A", "B"),
}


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings(case, alpha, tmp_path):
    spelling, *halves = SPELLINGS[case]
    down, up = pair(kind=torch.bfloat16)
    tensors = dict(zip(map(spelling.format, halves), (down, up), strict=True))
    if alpha:
        module = spelling.split(".lora")[0].replace("_lora.{}.weight", "")
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    found, sigma = read(written(tmp_path, tensors, {"ss_network_alpha": "7"}))
    name = "unet.down_blocks.1.attentions.0.proj_in"
    (matrix,) = found.matrices
    assert (matrix.scale, matrix.group, matrix.module, matrix.name) == ("layer", 1, "proj_in", name)
    assert found.unknown == []
    assert_spectrum(sigma[name], (alpha / 2 if alpha else 1) * up.double() @ down.double())
    if alpha:
        assert found.notes == []
    else:
        (note,) = found.notes
        assert note.startswith("the file holds no alpha, so their scaling is taken as 1")
        assert "ss_network_alpha '7'" in note


def test_modules_of_every_kind_in_one_file(tmp_path):
    down, up = pair()
    tensors = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": down,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": up,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.scalar": torch.tensor(0.5),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.diff": random(5, 6),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.diff_b": random(5),
        "lora_unet_conv_in.diff": random(8, 4, 3, 3),
        "lora_unet_norm_out.diff": random(8),
        "lora_unet_mid_block_attentions_0_proj_in.lokr_w1": random(2, 3),
        "lora_unet_mid_block_attentions_0_proj_in.lokr_w2": random(4, 5),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(9.0),  # of two whole matrices: not applied
        "emb_params": random(2, 8),
        "lora_unet_gone.alpha": torch.tensor(1.0),
    }
    found, sigma = read(written(tmp_path, tensors))
    assert found.unknown == ["emb_params", "lora_unet_gone.alpha"]
    assert [type(m.update) for m in found.matrices] == [Sum, Whole, Whole, Kronecker]
    assert_spectrum(sigma["text_encoder.text_model.encoder.layers.0.mlp.fc1"], 0.5 * up @ down)
    assert_spectrum(sigma["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"], random(5, 6))
    assert_spectrum(sigma["unet.conv_in"], random(8, 4, 3, 3))
    assert_spectrum(sigma["unet.mid_block.attentions.0.proj_in"], torch.kron(random(2, 3), random(4, 5)))
    unscaled, left_out = found.notes
    assert unscaled.startswith("1 modules have no alpha")
    assert left_out.startswith("2 tensors of biases and norms")


def test_a_core_with_two_ranks(tmp_path):
    mid, down, up = random(2, 3, 3, 3), random(3, 6, 1, 1), random(5, 2, 1, 1)
    tensors = {"lora_unet_conv_in.lora_mid.weight": mid, "lora_unet_conv_in.lora_down.weight": down}
    tensors |= {"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.alpha": torch.tensor(6.0)}
    _, sigma = read(written(tmp_path, tensors))
    dense = torch.einsum("mnxy,im,nj->ijxy", mid.double(), up.double()[..., 0, 0], down.double()[..., 0, 0])
    assert_spectrum(sigma["unet.conv_in"], 6 / 3 * dense)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"m.alpha": torch.tensor(float("nan"))}, "tensor m.alpha is nan"),
        ({"m.alpha": torch.tensor(float("inf"))}, "tensor m.alpha is inf"),
        ({"m.alpha": torch.ones(2)}, "tensor m.alpha has shape [2]; expected one number"),
        ({"m.lora_up.weight": random(5, 3)}, "cannot be multiplied"),
        ({"m.lora_up.weight": None}, "no up beside it"),
        ({"m.lora_down.weight": None}, "no down beside it"),
        ({"m.lora_down.weight": torch.zeros(0, 6)}, "not empty"),
        ({"m.lora_down.weight": torch.tensor(1.0)}, "not empty"),
        ({"m.lora_A.weight": random(2, 6)}, "are the same down; save one adapter per file"),
        ({"m.diff": random(5, 6)}, "are of one module"),
    ],
)
def test_errors(changed, message, tmp_path):
    down, up = pair()
    tensors = {"m.lora_down.weight": down, "m.lora_up.weight": up, **changed}
    assert message in error(written(tmp_path, {k: v for k, v in tensors.items() if v is not None}))


def test_nan_in_a_factor_is_named(tmp_path):
    tensors = {f"m.hada_w{i}_{half}": random(*shape) for i in "12" for half, shape in (("a", (9, 2)), ("b", (2, 9)))}
    tensors["m.hada_w2_a"][1, 1] = float("nan")
    assert "tensor m.hada_w2_a holds NaN" in error(written(tmp_path, tensors))


# Names


@pytest.mark.parametrize(
    ("flattened", "name", "module", "layer"),
    [
        (
            "lora_unet_up_blocks_2_attentions_1_transformer_blocks_0_attn1_to_out_0",
            "unet.up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0",
            "to_out",
            2,
        ),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
            "proj",
            0,
        ),
        ("lora_unet_mid_block_resnets_1_time_emb_proj", "unet.mid_block.resnets.1.time_emb_proj", "time_emb_proj", 1),
        ("lora_unet_time_embedding_linear_1", "unet.time_embedding.linear_1", "linear_1", None),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
            "unet.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
            "to_k",
            4,
        ),
        (
            "lora_te_text_model_encoder_layers_11_self_attn_q_proj",
            "text_encoder.text_model.encoder.layers.11.self_attn.q_proj",
            "q_proj",
            11,
        ),
        (
            "lora_te3_encoder_block_7_layer_0_SelfAttention_q",
            "text_encoder_3.encoder.block.7.layer.0.SelfAttention.q",
            "q",
            7,
        ),
        (
            "lora_te3_encoder_block_7_layer_1_DenseReluDense_wi_0",
            "text_encoder_3.encoder.block.7.layer.1.DenseReluDense.wi_0",
            "wi_0",
            7,
        ),
        ("lora_unet_double_blocks_18_img_attn_qkv", "unet.double_blocks.18.img_attn.qkv", "qkv", 18),
        ("lora_unet_single_blocks_3_modulation_lin", "unet.single_blocks.3.modulation.lin", "lin", 3),
        (
            "lora_transformer_single_transformer_blocks_3_proj_mlp",
            "transformer.single_transformer_blocks.3.proj_mlp",
            "proj_mlp",
            3,
        ),
        ("lora_unet_joint_blocks_5_x_block_attn_qkv", "unet.joint_blocks.5.x_block.attn.qkv", "qkv", 5),
        ("lora_unet_blocks_5_cross_attn_k_img", "unet.blocks.5.cross_attn.k_img", "k_img", 5),
        ("lycoris_layers_2_fc1", "layers.2.fc1", "fc1", 2),
        ("lora_unet_blocks_5_my_odd_thing_to_q", "unet.blocks.5.my_odd_thing.to_q", "to_q", 5),
        ("model.my_module", "model.my_module", "my_module", None),
        ("lora_unet", "unet", "unet", None),
    ],
)
def test_flattened_names(flattened, name, module, layer):
    assert dotted(flattened) == name
    assert (module_of(name), stack_and_layer(name)[1]) == (module, layer)


def test_every_flattened_name_of_an_sdxl_unet_is_unique_and_its_own():
    blocks = [f"{side}_blocks.{i}.attentions.{j}" for side in ("down", "up") for i in range(3) for j in range(3)]
    modules = ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    names = [f"unet.{b}.transformer_blocks.{n}.{m}" for b in blocks for n in range(10) for m in modules]
    assert [dotted(f"lora_{name.replace('.', '_')}") for name in names] == names


# diffusers


@pytest.fixture(scope="module")
def unet():
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    from peft import LoraConfig

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    model.add_adapter(
        LoraConfig(
            r=3, lora_alpha=5, target_modules=["to_q", "to_out.0", "ff.net.0.proj", "conv1", "proj_in"],
            rank_pattern={"to_q": 4}, alpha_pattern={"attn2.to_q": 1}, init_lora_weights=False,
        )
    )  # fmt: skip
    return model


def lora_updates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


@pytest.mark.parametrize("with_metadata", [True, False])
def test_diffusers_pipeline(unet, with_metadata, tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    config = unet.peft_config["default"].to_dict() if with_metadata else None
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config
    )
    found, sigma = read(tmp_path / "pytorch_lora_weights.safetensors")
    assert (found.unknown, len(found.notes)) == ([], 0 if with_metadata else 1)
    updates = lora_updates(unet)
    assert sorted(sigma) == sorted(f"unet.{name}" for name in updates)
    for name, update in updates.items():
        layer = unet.get_submodule(name)
        unscaled = update / layer.scaling["default"]
        assert_spectrum(sigma[f"unet.{name}"], update if with_metadata else unscaled)


def test_diffusers_model(unet, tmp_path):
    unet.save_lora_adapter(tmp_path)
    _, sigma = read(tmp_path / "pytorch_lora_weights.safetensors")
    for name, update in lora_updates(unet).items():
        assert_spectrum(sigma[name], update)


def test_diffusers_to_kohya(unet, tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    tensors = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in get_peft_model_state_dict(unet).items()})
    found, sigma = read(written(tmp_path, tensors))
    assert (found.unknown, found.notes) == ([], [])
    for name, update in lora_updates(unet).items():
        assert_spectrum(sigma[f"unet.{name}"], update / unet.get_submodule(name).scaling["default"])


def test_diffusers_metadata(tmp_path):
    down, up = pair()
    tensors = {"transformer.blocks.0.to_q.lora_A.weight": down, "transformer.blocks.0.to_q.lora_B.weight": up}
    entries = {"r": 2, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {}, "alpha_pattern": {"blocks.0.to_q": 6}}

    def metadata(prefix: str, **changes) -> dict[str, str]:
        packed = {f"{prefix}{key}": value for key, value in {**entries, **changes}.items()}
        return {"lora_adapter_metadata": json.dumps(packed)}

    for prefix in ("", "transformer."):
        _, sigma = read(written(tmp_path, tensors, metadata(prefix)))
        assert_spectrum(sigma["transformer.blocks.0.to_q"], 6 / 2**0.5 * up.double() @ down.double())
    assert "metadata says 8" in error(written(tmp_path, tensors, metadata("", r=8)))
    assert "no config for transformer" in error(written(tmp_path, tensors, metadata("unet.")))
    assert "not valid JSON" in error(written(tmp_path, tensors, {"lora_adapter_metadata": "{"}))


def test_control_lora(tmp_path):
    """As ComfyUI applies them: up times down, both flattened; the other tensors are weights of their own."""
    down, up = random(2, 5, 3, 3), random(6, 2, 1, 1)
    tensors = {"lora_controlnet": torch.zeros(0), "a.0.up": up, "a.0.down": down, "zero.weight": random(3, 3)}
    found, sigma = read(written(tmp_path, tensors))
    assert_spectrum(sigma["a.0"], up.double().flatten(1) @ down.double().flatten(1))
    assert (found.unknown, len(found.notes)) == ([], 1)
    assert "1 tensors trained whole (zero.weight" in found.notes[0]


def test_factors_without_a_suffix_have_an_alpha_beside_them(tmp_path):
    down, up = pair()
    found, sigma = read(written(tmp_path, {"b.0.q.lora_A": down, "b.0.q.lora_B": up, "b.0.q.alpha": torch.tensor(6.0)}))
    assert_spectrum(sigma["b.0.q"], 3 * up.double() @ down.double())
    assert not found.notes


def test_flux_control_files_have_trained_norms(tmp_path):
    down, up = pair()
    tensors = {"img_in.lora_A.weight": down, "img_in.lora_B.weight": up, "img_in.reshape_weight": torch.tensor([5, 6])}
    tensors["double_blocks.0.img_attn.norm.key_norm.scale"] = random(4)
    found, sigma = read(written(tmp_path, tensors))
    assert_spectrum(sigma["img_in"], up.double() @ down.double())
    assert ["key_norm.scale" in note for note in found.notes] == [False, True, False]
    assert "img_in is of another shape" in found.notes[2]


def test_a_dora_file_without_a_config(tmp_path):
    down, up = pair()
    key = "diffusion_model.blocks.0.to_q"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.lora_magnitude_vector": random(5)}
    found, sigma = read(written(tmp_path, tensors))
    assert any("DoRA" in note for note in found.notes)
    assert found.unknown == []
    assert_spectrum(sigma[key], up @ down)


@pytest.mark.parametrize(
    "keys",
    [
        ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.bias"],
        ["a.alpha", "logit_scale", "a1.weight", "block.a1.weight"],
    ],
)
def test_other_files_do_not_look_like_adapters(keys):
    assert not looks_like_adapter(dict.fromkeys(keys, (2, 2)))
