"""MSPLoRA as a PEFT method. The oracle is a dense sum of B A written here, or PEFT's own behaviour."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, RobertaConfig

from msplora_core import MSPLoraConfig

from .conftest import (
    make_bert,
    make_gpt2,
    make_llama,
    make_roberta,
    make_t5,
    make_vit,
    randomise,
    run_model,
)

QUERY_VALUE = ["query", "value"]


def adapt(model: torch.nn.Module, **options: object) -> peft.PeftModel:
    options = {"r": 8, "target_modules": QUERY_VALUE, **options}
    return peft.get_peft_model(model, MSPLoraConfig(**options)).eval()


def adapter_parameters(model: peft.PeftModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- Number of parameters (arXiv 2503.21838, Tables 1 and 2) ---


@pytest.mark.parametrize(
    ("auto", "config", "targets", "rank", "msplora", "lora"),
    [
        (AutoModelForSequenceClassification, RobertaConfig(num_labels=2), QUERY_VALUE, 8, 135_168, 294_912),
        (AutoModelForCausalLM, LlamaConfig(), ["q_proj", "v_proj"], 64, 11_010_048, 33_554_432),
    ],
    ids=["roberta-base", "llama-2-7b"],
)
def test_parameter_counts_are_the_papers(auto, config, targets, rank, msplora, lora) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        base = auto.from_config(config)
        other = copy.deepcopy(base)
        model = peft.get_peft_model(base, MSPLoraConfig(r=rank, target_modules=targets))
        reference = peft.get_peft_model(other, peft.LoraConfig(r=rank, target_modules=targets))
    assert adapter_parameters(model) == msplora
    assert adapter_parameters(reference) == lora
    assert model.get_nb_trainable_parameters()[0] == msplora


# --- Sharing ---


def layers_that_change(model: peft.PeftModel, name: str, scale: str) -> set[str]:
    """Adapted modules whose own output changes when the factor B of this scale of the module called ``name`` does."""
    modules = {key: module for key, module in model.named_modules() if hasattr(module, "msplora_layer")}

    def outputs() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {key: module(torch.ones(1, module.in_features)) for key, module in modules.items()}

    before = outputs()
    parameter = modules[name].pairs(scale)["default"].B
    with torch.no_grad():
        parameter.add_(1.0)
    after = outputs()
    with torch.no_grad():
        parameter.sub_(1.0)
    return {key for key in modules if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        (6, [range(0, 2), range(2, 4), range(4, 6)]),
        (7, [range(0, 3), range(3, 5), range(5, 7)]),
        (12, [range(0, 4), range(4, 8), range(8, 12)]),
        (30, [range(0, 10), range(10, 20), range(20, 30)]),
        (32, [range(0, 11), range(11, 22), range(22, 32)]),
    ],
)
def test_each_scale_changes_exactly_its_layers(layers: int, groups: list[range]) -> None:
    model = adapt(make_bert(layers))
    stack = "base_model.model.bert.encoder.layer"

    def queries(numbers: range) -> set[str]:
        return {f"{stack}.{i}.attention.self.query" for i in numbers}

    last = layers - 1
    name = f"{stack}.{last}.attention.self.query"
    assert layers_that_change(model, name, "global") == queries(range(layers))
    assert layers_that_change(model, name, "layer") == queries(range(last, layers))
    for group in groups:
        for layer in (group[0], group[-1]):
            assert layers_that_change(model, f"{stack}.{layer}.attention.self.query", "mid") == queries(group)


def test_the_update_is_the_papers_sum_with_its_scaling(bert: torch.nn.Module) -> None:
    model = adapt(bert, lora_alpha=16)
    randomise(model)
    layer = model.base_model.model.bert.encoder.layer[3].attention.self.query
    expected = sum(
        16 / rank * pair.B.detach().double() @ pair.A.detach().double()
        for rank, pair in (
            (8, layer.pairs("global")["default"]),
            (4, layer.pairs("mid")["default"]),
            (2, layer.pairs("layer")["default"]),
        )
    )
    torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, rtol=1e-5, atol=1e-6)
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ expected.float().T, rtol=1e-5, atol=1e-5)


def test_explicit_ranks_missing_scale_and_rslora(bert: torch.nn.Module) -> None:
    model = adapt(bert, ranks={"global": 4, "layer": 9}, use_rslora=True, lora_alpha=6)
    randomise(model)
    layer = model.base_model.model.bert.encoder.layer[1].attention.self.value
    assert len(layer.pairs("mid")) == 0
    pairs = {4: layer.pairs("global")["default"], 9: layer.pairs("layer")["default"]}
    expected = sum(6 / rank**0.5 * pair.B @ pair.A for rank, pair in pairs.items())
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_mid_groups_is_an_option(bert: torch.nn.Module) -> None:
    model = adapt(bert, mid_groups=2)
    changed = layers_that_change(model, "base_model.model.bert.encoder.layer.4.attention.self.query", "mid")
    assert changed == {f"base_model.model.bert.encoder.layer.{i}.attention.self.query" for i in (3, 4, 5)}


def test_the_forward_is_two_matrix_products(bert: torch.nn.Module) -> None:
    class CountProducts(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "linear")
            return func(*args, **(kwargs or {}))

    def products(layer: torch.nn.Module) -> int:
        with torch.no_grad(), CountProducts() as counter:
            layer(torch.randn(3, 32))
        return counter.products

    layer = adapt(bert).base_model.model.bert.encoder.layer[0].attention.self.query
    assert products(layer.base_layer) == 1
    assert products(layer) == 1 + 2


def test_gradients_reach_every_scale_and_only_the_adapter(bert: torch.nn.Module) -> None:
    model = adapt(bert, lora_dropout=0.05).train()
    randomise(model)
    model(input_ids=torch.randint(3, 60, (2, 7)), labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        if ".msplora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


# --- Architectures and bad targets ---

ARCHITECTURES: list[tuple[Callable[[], torch.nn.Module], list[str], int]] = [
    (make_bert, ["query", "value"], 2),
    (make_roberta, ["query", "key", "value"], 3),
    (make_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 7),
    (make_gpt2, ["c_attn", "c_fc"], 2),
    (make_t5, ["q", "v", "wo"], 6),  # three types in each of two stacks
    (make_vit, ["q_proj", "v_proj"], 2),
]


@pytest.mark.parametrize(
    ("make", "targets", "pyramids"), ARCHITECTURES, ids=lambda value: getattr(value, "__name__", "")
)
def test_architectures(make, targets: list[str], pyramids: int, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base = make()
    untouched = copy.deepcopy(base)
    before = run_model(base)
    model = adapt(base, target_modules=targets)
    torch.testing.assert_close(run_model(model), before)  # B = 0: no change at the start
    randomise(model)
    adapted = run_model(model)
    assert (adapted - before).abs().max() > 1e-3

    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith("msplora_global.B") for key in tensors) == pyramids
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    assert torch.equal(run_model(reloaded), adapted)
    torch.testing.assert_close(run_model(model.merge_and_unload()), adapted, rtol=1e-4, atol=1e-5)


def test_default_targets_are_loras(bert: torch.nn.Module) -> None:
    model = peft.get_peft_model(bert, MSPLoraConfig(r=8))
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"query", "value"}


def test_all_linear_leaves_the_head_out() -> None:
    model = adapt(make_llama(), target_modules="all-linear")
    assert len(model.targeted_module_names) == 6 * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["nothing"]}, "nothing.* not found in the base model"),
        ({"r": 0}, "r=0 must be a positive multiple of 4"),
        ({"r": 6}, "r=6 must be a positive multiple of 4"),
        ({"r": -8}, "r=-8 must be"),
        ({"r": 64}, r"rank 64 of the scale 'global' is above the smaller side of 'bert.*query' \(32 x 32\)"),
        ({"ranks": {"global": 8, "mid": 0}}, "rank 0 of the scale 'mid'"),
        ({"ranks": {"globl": 8}}, "must name scales among global, mid, layer"),
        ({"ranks": {}}, "must name scales"),
        ({"mid_groups": 0}, "mid_groups=0"),
        ({"bias": "some"}, "bias='some' is unknown"),
        ({"r": [8, 4, 2]}, "released with the MSPLoRA paper"),
        ({"target_modules": ["query", "dense"]}, "'bert.pooler.dense' has no layer number.*exclude_modules"),
        ({"target_modules": ["LayerNorm"]}, "'bert.embeddings.LayerNorm' is a LayerNorm; MSPLoRA adapts nn.Linear"),
    ],
)
def test_bad_configuration_is_a_clear_error(bert: torch.nn.Module, options: dict, message: str) -> None:
    modules = dict(bert.named_modules())
    with pytest.raises(ValueError, match=message):
        adapt(bert, **options)
    assert dict(bert.named_modules()) == modules  # and the model is left as it was


def test_excluded_modules_let_the_rest_in(bert: torch.nn.Module) -> None:
    model = adapt(bert, target_modules=["dense"], exclude_modules=["pooler.dense"])
    assert len(model.targeted_module_names) == 6 * 3


# --- Files ---


def test_each_tensor_is_saved_once_and_reload_is_identical(bert: torch.nn.Module, tmp_path: Path) -> None:
    untouched = copy.deepcopy(bert)
    model = adapt(bert, task_type="SEQ_CLS")
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    pairs = [key for key in tensors if ".msplora_" in key]
    assert len(pairs) == 2 * 2 * (1 + 3 + 6)  # A and B, query and value, global + mid + layer
    assert sum(tensor.numel() for tensor in tensors.values()) == adapter_parameters(model)
    assert "base_model.model.bert.encoder.layer.2.attention.self.query.msplora_mid.A" in pairs
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MSPLORA"

    for low_cpu_mem_usage in (False, True):
        reloaded = peft.PeftModel.from_pretrained(
            copy.deepcopy(untouched), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(run_model(reloaded), run_model(model))
        layers = reloaded.base_model.model.bert.encoder.layer
        shared = [layer.attention.self.query.pairs("global")["default"].B for layer in layers]
        assert len({parameter.data_ptr() for parameter in shared}) == 1  # still shared after loading


def test_adapter_names_that_occur_in_module_names(bert: torch.nn.Module, tmp_path: Path) -> None:
    untouched = copy.deepcopy(bert)
    model = peft.get_peft_model(bert, MSPLoraConfig(r=8, target_modules=QUERY_VALUE), adapter_name="layer").eval()
    randomise(model, "layer")
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(untouched, tmp_path / "layer", adapter_name="query")
    assert torch.equal(run_model(reloaded), run_model(model))


@pytest.mark.parametrize("change", ["missing", "extra", "misnamed", "head missing"])
def test_a_file_that_does_not_fit_fails_loudly(bert: torch.nn.Module, tmp_path: Path, change: str) -> None:
    untouched = copy.deepcopy(bert)
    model = adapt(bert, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("layer.2.attention.self.query.msplora_mid.B"))
    if change in ("missing", "misnamed"):
        tensor = tensors.pop(key)
        if change == "misnamed":
            tensors[key.replace("msplora_mid", "msplora_middle")] = tensor
    elif change == "extra":
        tensors[key.replace("layer.2", "layer.3")] = tensors[key].clone()
    else:
        tensors.pop("base_model.model.classifier.weight")
    save_file(tensors, file)
    expected = {
        "missing": (ValueError, "1 .*layer.2.attention.self.query.msplora_mid.default.B.* missing, none extra"),
        "extra": (ValueError, "none missing, 1 .*layer.3.*msplora_mid.B.* extra"),
        "misnamed": (ValueError, "1 .* missing, 1 .*msplora_middle.B.* extra"),
        "head missing": (KeyError, "classifier.weight"),  # PEFT's own error
    }
    exception, message = expected[change]
    with pytest.raises(exception, match=message):
        peft.PeftModel.from_pretrained(untouched, tmp_path)


def test_other_ranks_fail_loudly(bert: torch.nn.Module, tmp_path: Path) -> None:
    untouched = copy.deepcopy(bert)
    adapt(bert).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(untouched, tmp_path)


# --- What PEFT users expect ---


def test_disable_merge_unmerge_unload(bert: torch.nn.Module) -> None:
    before = run_model(bert)
    model = adapt(bert)
    randomise(model)
    adapted = run_model(model)
    with model.disable_adapter():
        torch.testing.assert_close(run_model(model), before)
    assert torch.equal(run_model(model), adapted)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run_model(model), adapted, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(run_model(model), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run_model(model.unload()), before, rtol=1e-5, atol=1e-6)


def test_merging_something_not_finite_is_refused(bert: torch.nn.Module) -> None:
    model = adapt(bert)
    with torch.no_grad():
        model.base_model.model.bert.encoder.layer[0].attention.self.query.msplora_mid["default"].B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_two_adapters_on_one_model(bert: torch.nn.Module, tmp_path: Path) -> None:
    untouched = copy.deepcopy(bert)
    model = adapt(bert)
    model.add_adapter("second", MSPLoraConfig(r=4, target_modules=["value"], mid_groups=2))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    randomise(model, "default", seed=1)
    randomise(model, "second", seed=2)
    first = run_model(model)
    model.set_adapter("second")
    second = run_model(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".second." in name for name in trainable)
    assert (first - second).abs().max() > 1e-3

    model.base_model.set_adapter(["default", "second"])
    value = model.base_model.model.bert.encoder.layer[5].attention.self.value
    x = torch.randn(3, 32)
    update = value.get_delta_weight("default") + value.get_delta_weight("second")
    torch.testing.assert_close(value(x), value.base_layer(x) + x @ update.T, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(untouched, tmp_path)
    reloaded.load_adapter(tmp_path / "second", "second")
    assert torch.equal(run_model(reloaded), first)
    reloaded.set_adapter("second")
    assert torch.equal(run_model(reloaded), second)
    reloaded.delete_adapter("default")
    assert torch.equal(run_model(reloaded), second)


def test_modules_to_save(bert: torch.nn.Module, tmp_path: Path) -> None:
    untouched = copy.deepcopy(bert)
    model = adapt(bert, modules_to_save=["classifier"])
    randomise(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(untouched, tmp_path)
    assert torch.equal(run_model(reloaded), run_model(model))


def test_inject_adapter_in_model(bert: torch.nn.Module) -> None:
    config = MSPLoraConfig(r=8, target_modules=QUERY_VALUE)
    reference = adapt(copy.deepcopy(bert))
    randomise(reference)
    model = peft.inject_adapter_in_model(config, bert)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(reference))
    assert torch.equal(run_model(model.eval()), run_model(reference))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bfloat16(bert: torch.nn.Module, autocast_adapter_dtype: bool, tmp_path: Path) -> None:
    untouched = copy.deepcopy(bert).to(torch.bfloat16)
    config = MSPLoraConfig(r=8, target_modules=QUERY_VALUE)
    model = peft.get_peft_model(bert.to(torch.bfloat16), config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    randomise(model)
    pair = model.base_model.model.bert.encoder.layer[0].attention.self.query.msplora_layer["default"]
    assert pair.B.dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)
    adapted = run_model(model)
    assert adapted.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(untouched, tmp_path, autocast_adapter_dtype=autocast_adapter_dtype)
    assert torch.equal(run_model(reloaded), adapted)
    torch.testing.assert_close(run_model(model.merge_and_unload()), adapted, rtol=0.05, atol=0.05)


def test_autocast(bert: torch.nn.Module) -> None:
    model = adapt(bert)
    randomise(model)
    exact = run_model(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run_model(model).float(), exact, rtol=0.1, atol=0.1)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapt(make_llama(), target_modules=["q_proj", "v_proj"]).train()
        randomise(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        tokens = torch.arange(3, 13).reshape(1, 10)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)
