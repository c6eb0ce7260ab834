"""PEFT's own methods: PEFT trains or fills them and saves, we read, PEFT's delta weight in float64 is the truth."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters import assert_promised, lora_config, lora_tensors, write_adapter
from torch import nn

from msplora_analysis import AnalysisError, load_spectra, load_tables
from msplora_analysis.formats import built_in
from msplora_analysis.formats.helpers.no_update import REASONS
from msplora_analysis.formats.lora import magnitude_vectors

peft = pytest.importorskip("peft")
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width=24, inner=32):
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width // 2)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.query(x)))) + self.value(x).repeat(1, 2)


class Blocks(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.layers = nn.ModuleList(Block(**sizes) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Convolutions(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.one = nn.Conv1d(8, 12, 3, groups=groups)
        self.two = nn.Conv2d(8, 12, 3, groups=groups)
        self.three = nn.Conv3d(8, 12, (1, 2, 3), groups=groups)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.attention = nn.MultiheadAttention(16, 2)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 20))
        self.down_proj = nn.Parameter(torch.randn(4, 20, 6))
        self.router = nn.Parameter(torch.randn(4, 12))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": Experts(), "query": nn.Linear(12, 12)}) for _ in range(2))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=24, n_layer=2, n_head=2))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return LlamaForCausalLM(config)


def filled(model, config, seed=0):
    """A PEFT model whose adapter has values like a trained one's."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".default" in name and "magnitude" not in name:
            nn.init.normal_(parameter)
    return model.eval()


def save(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def updates(model, adapter="default"):
    """PEFT's delta weight of every adapted module, float64 matrices by the module's name."""
    from peft.tuners.lora.variants import BdLoraLinearVariant, KasaLinearVariant

    variants = {
        KasaLinearVariant: KasaLinearVariant._get_delta_weight,
        BdLoraLinearVariant: BdLoraLinearVariant._get_bdlora_delta_weight,
    }
    model = model.double()
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            variant = variants.get(type(getattr(module, "lora_variant", {}).get(adapter)))
            delta = variant(module, adapter) if variant else module.get_delta_weight(adapter)
            found[name.removeprefix("base_model.model.")] = delta.detach().numpy()
    assert found
    return found


def check(folder, expected, notes=0):
    """The tables of ``folder`` have one matrix for each of ``expected``, of its spectrum. Returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectra, metrics = load_tables(folder)
    assert len(caught) == notes, [str(one.message) for one in caught]
    assert set(metrics["scale"]) == {"layer"}
    assert sorted(metrics["name"]) == sorted(expected)
    for name, delta in expected.items():
        sigma = spectra[spectra["name"] == name]["sigma"].to_numpy()
        exact = np.linalg.svd(delta.reshape(len(delta), -1), compute_uv=False)
        exact = np.pad(exact, (0, max(0, len(sigma) - len(exact))))
        assert exact[0] > 0
        assert_promised(sigma, exact[: len(sigma)])
        assert (exact[len(sigma) :] <= 1e-12 * exact[0]).all()
        assert metrics[metrics["name"] == name]["rank"].item() == len(sigma)
    return [str(one.message).removeprefix(f"{folder}/adapter_model.safetensors: ") for one in caught]


def error(folder):
    with pytest.raises(AnalysisError) as caught:
        load_spectra(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder}/adapter_model.safetensors: ")


# LoRA and its variants

LINEAR = ["query", "value", "up", "down"]


def lora(**options):
    return peft.LoraConfig(**{"target_modules": LINEAR, "r": 4, "lora_alpha": 6, **options})


def lora_cases():
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

    bdlora = BdLoraConfig(target_modules_bd_a=["down", "value"], target_modules_bd_b=["query", "up"], nblocks=2)
    return {
        "plain": (Blocks, {}, 0),
        "dora": (Blocks, {"use_dora": True, "use_rslora": True}, 1),
        "dora of convolutions": (Convolutions, {"target_modules": ["one", "two", "three"], "use_dora": True}, 1),
        "dora of embeddings": (Words, {"target_modules": ["words"], "use_dora": True}, 1),
        "kasa": (Blocks, {"kasa_config": KasaConfig()}, 1),
        "bdlora": (Blocks, {"use_bdlora": bdlora}, 0),
        "velora": (Blocks, {"velora_config": VeloraConfig(num_groups=2)}, 0),
        "monteclora": (Blocks, {"monteclora_config": MontecloraConfig()}, 0),
        "alora": (Blocks, {"alora_invocation_tokens": [1, 2], "task_type": None}, 1),
        "gaussian": (Blocks, {"init_lora_weights": "gaussian"}, 0),
        "orthogonal": (Blocks, {"init_lora_weights": "orthogonal"}, 0),
        "mica": (Blocks, {"init_lora_weights": "mica"}, 0),
        "eva": (Blocks, {"init_lora_weights": "eva"}, 0),
        "pissa": (Blocks, {"init_lora_weights": "pissa"}, 1),
        "pissa by iteration": (Blocks, {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"up": 2}}, 1),
        "olora": (Blocks, {"init_lora_weights": "olora"}, 1),
        "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 0),
        "convolutions": (Convolutions, {"target_modules": ["one", "two", "three"]}, 0),
        "layer replication": (
            llama,
            {"target_modules": ["q_proj", "down_proj"], "layer_replication": [[0, 2], [1, 2]], "r": 2},
            0,
        ),
        "patterns": (
            Blocks,
            {
                "rank_pattern": {"^layers.1.query": 5, "layers.[01].value": 2, "layers.0": 7, "own": 3},
                "alpha_pattern": {"ayers.0.up": 100, ".*up": 3, "1.down": 1.5},
                "use_rslora": True,
            },
            0,
        ),
    }


@pytest.mark.parametrize("case", lora_cases())
@pytest.mark.filterwarnings("ignore")
def test_variants_of_lora(tmp_path, case):
    build, options, notes = lora_cases()[case]
    model = filled(build(), lora(**options))
    save(model, tmp_path / "a")
    check(tmp_path / "a", updates(model), notes)


def test_notes_of_variants_say_what_the_spectra_are(tmp_path):
    (note,) = check(*saved_updates(tmp_path / "dora", use_dora=True), 1)
    assert note.startswith("DoRA (arXiv 2402.09353): the spectra are of its low-rank part, scaling * B A; the magn")
    (note,) = check(*saved_updates(tmp_path / "pissa", init_lora_weights="pissa"), 1)
    assert note == (
        "init_lora_weights is 'pissa': training started from a B A that is not zero and a base weight that lacks it; "
        "the spectra are of the whole B A, not of what training changed (PEFT's "
        "path_initial_model_for_weight_conversion saves that)"
    )


def saved_updates(folder, **options):
    model = filled(Blocks(), lora(**options))
    save(model, folder)
    return folder, updates(model)


@pytest.mark.parametrize(
    ("init", "noted"),
    [
        *[(init, True) for init in ("pissa", "pissa_niter_16", "OLoRA", "corda", "lora_ga", "loftq")],
        *[(init, False) for init in (True, False, None, "gaussian", "eva", "orthogonal", "mica")],
    ],
)
def test_only_inits_that_change_the_base_are_noted(tmp_path, init, noted):
    folder = write_adapter(tmp_path / "a", config=lora_config(init_lora_weights=init))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_spectra(folder)
    assert len(caught) == noted
    if noted:
        assert f"init_lora_weights is {init!r}" in str(caught[0].message)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_converted_to_lora_is_the_change_of_the_original_weight(tmp_path, rslora):
    base = Blocks()
    before = {name: value.double().clone() for name, value in base.state_dict().items()}
    torch.manual_seed(0)
    model = peft.get_peft_model(base, lora(init_lora_weights="pissa", use_rslora=rslora))
    model.peft_config["default"].init_lora_weights = True
    save(model, tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save(model, tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)

    after = model.double().merge_and_unload().state_dict()
    spectra = load_spectra(tmp_path / "a")
    for name in set(spectra["name"]):
        exact = np.linalg.svd((after[f"{name}.weight"] - before[f"{name}.weight"]).numpy(), compute_uv=False)[:8]
        sigma = spectra[spectra["name"] == name]["sigma"].to_numpy()
        np.testing.assert_allclose(sigma, exact, rtol=1e-4, atol=1e-5 * exact[0])  # PiSSA split W in float32


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions(tmp_path, groups):
    """The update is an ungrouped convolution: its responses to unit impulses are the columns of its matrix."""
    model = filled(Convolutions(groups), lora(target_modules=["one", "two", "three"], lora_bias=False))
    save(model, tmp_path / "a")
    expected = {}
    for name, shape in {"one": (8, 3), "two": (8, 3, 3), "three": (8, 1, 2, 3)}.items():
        module = getattr(model.double().base_model.model, name)
        impulses = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
        answers = module.lora_B["default"](module.lora_A["default"](impulses)) * module.scaling["default"]
        expected[name] = answers.flatten(1).T.detach().numpy()
    check(tmp_path / "a", expected)


def test_multihead_attention(tmp_path):
    model = filled(Words(), lora(target_modules=["attention", "words"], rank_pattern={"attention": 3}))
    save(model, tmp_path / "a")
    expected = {name.replace(".base_layer", ""): delta for name, delta in updates(model).items()}
    assert set(expected) == {"words", "attention", "attention.out_proj"}
    assert expected["attention"].shape == (48, 16)
    check(tmp_path / "a", expected)


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["experts.down_proj"], []),
        (["layers.0.experts.gate_up_proj"], ["query"]),
        (["gate_up_proj"], ["query"]),
        (["experts.router"], []),
        (["experts.down_proj", "experts.gate_up_proj"], ["query"]),
        (["experts.down_proj", "experts.gate_up_proj", "experts.router"], []),
    ],
)
def test_target_parameters(tmp_path, targets, modules):
    config = lora(
        target_modules=modules,
        target_parameters=targets,
        r=2,
        rank_pattern={"query": 5},
        alpha_pattern={"layers.1.*": 9},
    )
    model = filled(Mixture(), config)
    save(model, tmp_path / "a")
    expected = {}
    for name, delta in updates(model).items():
        module = model.get_submodule(f"base_model.model.{name}")
        parameter = getattr(module, "parameter_name", None)
        if parameter is not None and len(targets) == 1:
            name = f"{name}.{parameter}"
        expected |= {f"{name}.{i}": one for i, one in enumerate(delta)} if delta.ndim == 3 else {name: delta}
    fused = any("gate_up" in target for target in targets)
    notes = check(tmp_path / "a", expected, notes=fused + (len(targets) > 1))
    assert not fused or "gate_up_proj holds the gate and the up projection of an expert in one tensor" in notes[0]
    for note in notes[fused:]:
        assert note.startswith("several parameters of layers.0.experts are adapted, and PEFT does not save which is ")
    metrics = load_tables(tmp_path / "a").metrics if not notes else None
    if targets == ["experts.down_proj"]:
        assert set(metrics["module"]) == {"down_proj"}
        assert metrics["group"].tolist() == [0] * 4 + [1] * 4


def test_parameters_that_a_pattern_tells_apart_and_the_file_does_not(tmp_path):
    targets = ["experts.down_proj", "experts.gate_up_proj"]
    model = filled(Mixture(), lora(target_modules=[], target_parameters=targets, rank_pattern={"down_proj": 3}))
    assert "for which rank_pattern or alpha_pattern differ; the file does not say" in error(save(model, tmp_path / "a"))


@pytest.mark.parametrize("spelling", ["", ".weight", ".default", ".default.weight"])
def test_magnitude_vectors_of_dora(tmp_path, spelling):
    key = f"base_model.model.layer.0.q.lora_magnitude_vector{spelling}"
    tensors = lora_tensors("layer.0.q") | {key: np.ones(5, np.float32)}
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.warns(UserWarning, match="DoRA"):
        assert set(load_spectra(folder)["name"]) == {"layer.0.q"}
    assert magnitude_vectors(tensors) == {"layer.0.q": key}


def test_tensors_of_a_variant_that_the_config_does_not_name_are_unknown(tmp_path):
    for name in ("lora_diag", "lora_velora_embed", "lora_monteclora_sampler.mean"):
        tensors = lora_tensors("layer.0.q") | {f"base_model.model.layer.0.q.{name}": np.ones(2, np.float32)}
        assert error(write_adapter(tmp_path / name, tensors)).startswith("unknown tensors (1): ")
    tensors = lora_tensors("layer.0.q") | {"base_model.model.layer.1.q.lora_magnitude_vector": np.ones(5, np.float32)}
    assert error(write_adapter(tmp_path / "a", tensors)).startswith("unknown tensors (1): ")


# AdaLoRA


@pytest.mark.parametrize("stop", [0, 4, 9])
def test_adalora(tmp_path, stop):
    """Trained for some steps: before, amid and after the pruning of components."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        target_modules=LINEAR, init_r=6, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=10, lora_alpha=5
    )
    model = peft.get_peft_model(Blocks(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(stop):
        torch.square(model(torch.randn(8, 24)) - 1).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    if not stop:
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                nn.init.normal_(parameter)
    save(model, tmp_path / "a")
    pattern = json.loads((tmp_path / "a/adapter_config.json").read_text())["rank_pattern"] or {}
    ranks = {key.removesuffix(".lora_E"): sum(mask) for key, mask in pattern.items()}
    if stop == 9:
        assert sum(ranks.values()) == 2 * 8

    loaded = peft.PeftModel.from_pretrained(Blocks(), tmp_path / "a").eval()
    expected = {name: delta for name, delta in updates(loaded).items() if ranks.get(name, 6)}
    notes = check(tmp_path / "a", expected, notes=int(0 in ranks.values()))
    assert all(f"AdaLoRA pruned {list(ranks.values()).count(0)} modules to rank 0" in note for note in notes)
    before = {name: delta for name, delta in updates(model).items() if name in expected}
    for name, delta in expected.items():
        np.testing.assert_allclose(before[name], delta, atol=1e-7)


def adalora_files(**changes):
    config = {"peft_type": "ADALORA", "r": 8, "init_r": 3, "lora_alpha": 4, "rank_pattern": None} | changes
    shapes = {"A": (3, 6), "E": (3, 1), "B": (5, 3)}
    return {f"base_model.model.l.0.q.lora_{k}": np.ones(shape, np.float32) for k, shape in shapes.items()}, config


def test_adalora_module_without_components(tmp_path):
    tensors, config = adalora_files(rank_pattern={"l.0.q.lora_E": [True] * 3, "l.1.q.lora_E": [False] * 3})
    for key, shape in {"A": (0, 6), "E": (0, 1), "B": (5, 0)}.items():
        tensors[f"base_model.model.l.1.q.lora_{key}"] = np.ones(shape, np.float32)
    with pytest.warns(UserWarning, match="AdaLoRA pruned 1 modules to rank 0, .*: l.1.q$"):
        assert set(load_spectra(write_adapter(tmp_path / "a", tensors, config))["name"]) == {"l.0.q"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_r": None}, "adapter_config.json: init_r is missing; without it the update cannot be computed: "),
        ({"lora_alpha": None}, "adapter_config.json: lora_alpha is missing; without it"),
        ({"lora_alpha": 0}, "adapter_config.json: lora_alpha must be positive for AdaLoRA, got 0"),
        ({"init_r": 4}, "tensor base_model.model.l.0.q.lora_A has shape [3, 6], adapter_config.json says rank 4; is"),
        ({"rank_pattern": {"l.0.q.lora_E": [True, False, True]}}, "tensor base_model.model.l.0.q.lora_A has shape "),
        ({"rank_pattern": {"l.0.q.lora_E": [1, 2]}}, "adapter_config.json: rank_pattern l.0.q.lora_E must be a list o"),
        ({"rank_pattern": [1]}, "adapter_config.json: rank_pattern must be an object, got [1]"),
    ],
)
def test_adalora_configs_that_cannot_be_used(tmp_path, changes, message):
    assert error(write_adapter(tmp_path / "a", *adalora_files(**changes))).startswith(message)


def test_adalora_without_its_singular_values(tmp_path):
    tensors, config = adalora_files()
    del tensors["base_model.model.l.0.q.lora_E"]
    assert error(write_adapter(tmp_path / "a", tensors, config)) == (
        "tensor base_model.model.l.0.q.lora_A has no lora_E beside it; save the adapter again"
    )


# Methods with other factors


@pytest.mark.parametrize("kind", ["vera", "pvera"])
@pytest.mark.parametrize("modules", [["query", "value"], ["down"]])
@pytest.mark.filterwarnings("ignore")
def test_vera(tmp_path, kind, modules):
    build = {"vera": peft.VeraConfig, "pvera": peft.PveraConfig}[kind]
    # A module's part of the shared projections is smaller than they are: value has half as many rows.
    model = filled(Blocks(), build(target_modules=modules, r=7))
    save(model, tmp_path / "a")
    notes = check(tmp_path / "a", updates(model), 1 + (kind == "pvera"))
    assert notes[0] == (
        f"the input sizes of modules are not in a VeRA file: {32 if modules == ['down'] else 24}, the width of "
        f"{kind}_A, is taken for all ({', '.join(modules)})"
    )


@pytest.mark.filterwarnings("ignore")
def test_vera_that_lacks_what_is_needed(tmp_path):
    folder = save(filled(Blocks(), peft.VeraConfig(target_modules=["up", "down"], r=3)), tmp_path / "sizes")
    assert error(folder).startswith(
        "the modules are down, up; which of them have 32 inputs, and which fewer, is not in "
    )
    config = peft.VeraConfig(target_modules=["query"], r=3, save_projection=False)
    folder = save(filled(Blocks(), config), tmp_path / "projection")
    assert error(folder).startswith("no vera_A and vera_B in the file: they are drawn anew, for the sizes of the base ")


@pytest.mark.parametrize("topk", [1, 3])
def test_vblora(tmp_path, topk):
    config = peft.VBLoRAConfig(target_modules=LINEAR, r=3, num_vectors=10, vector_length=4, topk=topk)
    model = filled(Blocks(), config)
    save(model, tmp_path / "a")
    check(tmp_path / "a", updates(model))


def test_vblora_of_chosen_weights_only(tmp_path):
    config = peft.VBLoRAConfig(target_modules=LINEAR, r=3, num_vectors=10, vector_length=4, save_only_topk_weights=True)
    folder = save(filled(Blocks(), config), tmp_path / "a")
    assert "set save_only_topk_weights to false and save it again" in error(folder)
    loaded = peft.PeftModel.from_pretrained(Blocks(), folder).eval()
    loaded.peft_config["default"].save_only_topk_weights = False
    save(loaded, tmp_path / "b")
    check(tmp_path / "b", updates(loaded))


def test_delora(tmp_path):
    model = filled(Blocks(), peft.DeloraConfig(target_modules=LINEAR, r=4, rank_pattern={"up": 2}))
    save(model, tmp_path / "a")
    check(tmp_path / "a", updates(model))


def test_delora_before_training_is_zero(tmp_path):
    model = peft.get_peft_model(Blocks(), peft.DeloraConfig(target_modules=LINEAR))
    assert (load_spectra(save(model, tmp_path / "a"))["sigma"] == 0).all()


@pytest.mark.parametrize(("k", "hybrid"), [(1, 0), (2, 0), (4, 3)])
def test_gralora(tmp_path, k, hybrid):
    model = filled(Blocks(), peft.GraloraConfig(target_modules=LINEAR, r=8, alpha=5, gralora_k=k, hybrid_r=hybrid))
    save(model, tmp_path / "a")
    check(tmp_path / "a", updates(model))


def files(kind, shapes, **config):
    """Tensors of ones, and a config."""
    return {key: np.ones(shape, np.float32) for key, shape in shapes.items()}, {"peft_type": kind, **config}


Q = "base_model.model.l.0.q"
VERA = {
    "base_model.vera_A": (3, 6),
    "base_model.vera_B": (5, 3),
    f"{Q}.vera_lambda_b": (5,),
    f"{Q}.vera_lambda_d": (3,),
}
VBLORA = {"base_model.vblora_vector_bank": (7, 2), f"{Q}.vblora_logits_A": (3, 4, 7), f"{Q}.vblora_logits_B": (5, 3, 7)}
DELORA = {f"{Q}.delora_A": (3, 6), f"{Q}.delora_B": (5, 3), f"{Q}.delora_lambda": (1,), f"{Q}.delora_w_norm": (6,)}
GRALORA = {f"{Q}.gralora_A": (2, 3, 4), f"{Q}.gralora_B": (2, 4, 5)}
ADALORA = {f"{Q}.lora_A": (3, 6), f"{Q}.lora_B": (5, 3), f"{Q}.lora_E": (3, 1)}
LORA = {f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (5, 2)}
CONFIGS = {
    "VERA": {},
    "VBLORA": {"topk": 2},
    "DELORA": {},
    "GRALORA": {"alpha": 4, "hybrid_r": 0},
    "ADALORA": {"init_r": 3, "lora_alpha": 4},
    "LORA": {"r": 2, "lora_alpha": 4},
}


@pytest.mark.parametrize(
    ("kind", "shapes", "changes", "config", "message"),
    [
        (
            "VERA",
            VERA,
            {f"{Q}.vera_lambda_d": (2,)},
            {},
            "tensor base_model.model.l.0.q.vera_lambda_d has shape [2]; exp",
        ),
        (
            "VERA",
            VERA,
            {f"{Q}.vera_lambda_b": (6,)},
            {},
            "tensor base_model.model.l.0.q.vera_lambda_b has 6 values, but",
        ),
        (
            "VERA",
            VERA,
            {"base_model.vera_B": (5, 2)},
            {},
            "tensor base_model.vera_B has shape [5, 2]; expected [any, 3];",
        ),
        (
            "VERA",
            VERA,
            {"base_model.vera_A.x": (3, 6)},
            {},
            "tensors base_model.vera_A and base_model.vera_A.x are both ",
        ),
        (
            "VERA",
            VERA,
            {f"{Q}.vera_lambda_b": None},
            {},
            "tensor base_model.model.l.0.q.vera_lambda_d has no vera_lambda",
        ),
        (
            "VERA",
            VERA,
            {f"{Q}.vera_lambda_d.x": (3,)},
            {},
            "tensors base_model.model.l.0.q.vera_lambda_d and base_model.",
        ),
        ("VERA", VERA, {f"{Q}.lora_A": (3, 6)}, {}, "unknown tensors (1): base_model.model.l.0.q.lora_A"),
        ("VBLORA", VBLORA, {"base_model.vblora_vector_bank": None}, {}, "no vblora_vector_bank in the file; save the "),
        (
            "VBLORA",
            VBLORA,
            {f"{Q}.vblora_logits_B": (5, 2, 7)},
            {},
            "tensor base_model.model.l.0.q.vblora_logits_B has s",
        ),
        (
            "VBLORA",
            VBLORA,
            {},
            {"topk": 8},
            "adapter_config.json: topk is 8, but base_model.vblora_vector_bank has only ",
        ),
        (
            "VBLORA",
            VBLORA,
            {},
            {"topk": None},
            "adapter_config.json: topk is missing; without it the update cannot be ",
        ),
        (
            "DELORA",
            DELORA,
            {f"{Q}.delora_w_norm": (5,)},
            {},
            "tensor base_model.model.l.0.q.delora_w_norm has shape [5]; ",
        ),
        (
            "DELORA",
            DELORA,
            {f"{Q}.delora_w_norm": None},
            {},
            "tensor base_model.model.l.0.q.delora_A has no delora_w_norm",
        ),
        (
            "DELORA",
            DELORA,
            {f"{Q}.delora_A": (0, 6)},
            {},
            "tensor base_model.model.l.0.q.delora_A has shape [0, 6]; expec",
        ),
        (
            "GRALORA",
            GRALORA,
            {f"{Q}.gralora_B": (3, 4, 5)},
            {},
            "tensor base_model.model.l.0.q.gralora_B has shape [3, ",
        ),
        (
            "GRALORA",
            {f"{Q}.gralora_A": (2, 3, 3), f"{Q}.gralora_B": (2, 3, 5)},
            {},
            {},
            "tensor base_model.model.l.0.q.gralora_A has shape [2, 3, 3]; the last size must be a multiple of the",
        ),
        (
            "GRALORA",
            GRALORA,
            {},
            {"hybrid_r": 2},
            "tensor base_model.model.l.0.q.gralora_A has no gralora_A_general beside",
        ),
        (
            "ADALORA",
            ADALORA,
            {f"{Q}.lora_E": (2, 1)},
            {},
            "tensor base_model.model.l.0.q.lora_E has shape [2, 1]; expecte",
        ),
        (
            "LORA",
            LORA,
            {},
            {"kasa_config": {"beta": 1}},
            "tensor base_model.model.l.0.q.lora_A.weight has no lora_diag of ",
        ),
        (
            "LORA",
            LORA,
            {f"{Q}.lora_diag": (3,)},
            {"kasa_config": {"beta": 1}},
            "tensor base_model.model.l.0.q.lora_diag has shape [3]; expected [2]",
        ),
        (
            "LORA",
            LORA,
            {},
            {"use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 4}},
            "tensors base_model.model.l.0.q.lora_A.weight and base_model.model.l.0.q.lora_B.weight of shapes ",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, kind, shapes, changes, config, message):
    shapes = {key: shape for key, shape in (shapes | changes).items() if shape is not None}
    assert error(write_adapter(tmp_path / "a", *files(kind, shapes, **CONFIGS[kind] | config))).startswith(message)


@pytest.mark.parametrize(
    ("kind", "shapes"), [("VERA", VERA), ("VBLORA", VBLORA), ("DELORA", DELORA), ("GRALORA", GRALORA)]
)
@pytest.mark.filterwarnings("ignore")
def test_adapter_names_and_values_that_are_not_finite(tmp_path, kind, shapes):
    tensors, config = files(kind, {f"{key}.other": shape for key, shape in shapes.items()}, **CONFIGS[kind])
    assert set(load_spectra(write_adapter(tmp_path / "a", tensors, config))["name"]) == {"l.0.q"}
    for key in tensors:
        broken = tensors | {key: np.full_like(tensors[key], np.nan)}
        assert f"tensor {key} holds NaN or Inf" in error(write_adapter(tmp_path / "b", broken, config))


# All methods

READ = {"LORA", "ADALORA", "VERA", "PVERA", "VBLORA", "DELORA", "GRALORA", "LOHA", "LOKR", "LILY", "MSPLORA"}
READ |= {"SORA", "MISS", "C3A", "HIRA", "IA3", "RANDLORA", "FOURIERFT"}  # all but C3A with --base


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType])
def test_every_method_of_peft_is_read_or_refused_with_its_reason(tmp_path, kind):
    config = {"peft_type": kind}
    read = any(one.matches(config, SimpleNamespace(shapes={}, metadata={})) for one in built_in())
    assert read or kind in REASONS, f"{kind} is neither read nor refused"
    assert read == (kind in READ)
    if not read:
        folder = write_adapter(tmp_path / "a", config=config)
        reason = REASONS[kind]
        assert error(folder) == f"adapter_config.json: peft_type {kind!r} has no spectra of low-rank factors: {reason}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"r": None},
            "r is missing; without it the update cannot be computed: use the file that was saved with the we",
        ),
        (
            {"lora_alpha": None},
            "lora_alpha is missing; without it the update cannot be computed: use the file that was",
        ),
        *[({"r": r}, f"r must be a positive whole number, got {r!r}") for r in (0, -2, 2.0, True, "2", [2])],
        *[({"use_rslora": value}, f"use_rslora must be true or false, got {value!r}") for value in (None, 1, "true")],
        ({"rank_pattern": {"q": 0}}, "rank_pattern q must be a positive whole number, got 0"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern q must be a positive whole number, got 1.5"),
        ({"target_parameters": "x"}, "target_parameters must be a list of names, got 'x'"),
        ({"use_bdlora": True}, "use_bdlora must be an object, got True"),
        ({"use_qalora": True}, "use_qalora: QA-LoRA: which modules pool their input before A, those of GPTQ, is not"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config: Arrow mixes other adapters token by token"),
    ],
)
def test_lora_configs_that_cannot_be_used(tmp_path, config, message):
    folder = write_adapter(tmp_path / "a", config=lora_config(**config))
    assert error(folder).startswith(f"adapter_config.json: {message}")


@pytest.mark.parametrize("missing", ["r", "lora_alpha"])
def test_no_scale_is_guessed(tmp_path, missing):
    config = lora_config()
    del config[missing]
    assert error(write_adapter(tmp_path / "a", config=config)).startswith(f"adapter_config.json: {missing} is missing")
