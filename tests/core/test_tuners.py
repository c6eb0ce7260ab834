"""DyLoRA, BitFit and bottleneck adapters against hand-written references, and as PEFT methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification

import msplora_analysis as ma
from msplora_core.methods.adapterdrop import LayerDropper
from msplora_core.methods.base import draw
from msplora_core.methods.dylora import RankSampler
from msplora_core.methods.pissa import InitialFactors
from msplora_core.methods.sora import ProximalStep
from msplora_core.tuners.bitfit import BitFitConfig, BitFitLayer
from msplora_core.tuners.bottleneck import BottleneckConfig, BottleneckLinear
from msplora_core.tuners.sora import SoraConfig

from .conftest import make_bert, make_gpt2, make_llama, run_model


def fill(model: nn.Module, part: str, seed: int = 1) -> None:
    """Values for the parameters whose name contains ``part``, as training would give them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


# --- What is drawn ---


def test_draws_depend_on_seed_and_step_alone_and_cover_the_range() -> None:
    drawn = [draw(0, step, 1, 8) for step in range(4000)]
    assert drawn == [draw(0, step, 1, 8) for step in range(4000)]
    assert drawn != [draw(1, step, 1, 8) for step in range(4000)]
    for value in range(1, 9):  # 500 expected of each; its standard deviation is 21
        assert 400 < drawn.count(value) < 600
    assert len(drawn) == sum(drawn.count(value) for value in range(1, 9))


# --- DyLoRA ---


@pytest.mark.parametrize("b", [1, 3, 4])
def test_dylora_trains_a_lora_of_the_sampled_rank(b: int) -> None:
    """Output and gradients are those of alpha / b * B[:, :b] A[:b], written out, at every rank."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0"])).double()
    fill(model, "lora_B")
    sampler = RankSampler(model, seed=0)
    step = next(step for step in range(100) if draw(0, step, 1, 4) == b)
    sampler.before_step(step)
    layer: Any = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 6, dtype=torch.float64)

    found = model.train()(x)
    found.square().sum().backward()
    a, c = A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()
    expected = layer.base_layer(x) + 6 / b * x @ a[:b].T @ c[:, :b].T
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(A.grad, a.grad)
    torch.testing.assert_close(B.grad, c.grad)
    assert (A.grad[b:] == 0).all()
    assert (B.grad[:, b:] == 0).all()

    # evaluation has the full rank
    torch.testing.assert_close(model.eval()(x), layer.base_layer(x) + 6 / 4 * x @ A.T @ B.T)


# --- SoRA ---


def test_sora_is_written_out() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), SoraConfig(r=4, lora_alpha=6, target_modules=["0"])).double()
    fill(model, "lora_B")
    layer: Any = model.base_model.model[0]
    pair = layer.sora_pair["default"]
    x = torch.randn(3, 6, dtype=torch.float64)
    update = 6 / 4 * pair.lora_B @ torch.diag(pair.gate[0]) @ pair.lora_A
    torch.testing.assert_close(model(x), layer.base_layer(x) + x @ update.T)
    torch.testing.assert_close(layer.get_delta_weight("default"), update)
    before = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), before)


def test_sora_s_gates_close_and_are_told(tmp_path: Path) -> None:
    """A gate is what AdamW makes of it, pulled to zero by the threshold; the analysis reads which are closed."""
    model: Any = get_peft_model(make_bert(layers=2), SoraConfig(r=3, task_type="SEQ_CLS"))
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith(".gate")]
    with torch.no_grad():
        for gate in gates:
            gate.copy_(torch.tensor([[0.5, -0.2, 0.05]]))
    fill(model, "lora_B")
    step = ProximalStep(model, 0.1)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    step.arrange(adam)
    decays = {id(p): group["weight_decay"] for group in adam.param_groups for p in group["params"]}
    assert [decays[id(gate)] for gate in gates] == [0.0] * len(gates)
    assert list(decays.values()).count(0.1) == len(decays) - len(gates)
    step.after_update(0)
    for gate in gates:
        torch.testing.assert_close(gate.data, torch.tensor([[0.4, -0.1, 0.0]]))

    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="SoRA: 8 of 12 ranks are active"):
        spectra = ma.load_spectra(tmp_path, cache=False)
    name = "bert.encoder.layer.1.attention.self.value"
    sigma = spectra[spectra["name"] == name]["sigma"]
    update = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach().double()
    torch.testing.assert_close(torch.tensor(sigma.to_numpy()), torch.linalg.svdvals(update)[:3], rtol=1e-5, atol=1e-7)
    assert sigma.iloc[2] < 1e-12


# --- BitFit ---


def test_bitfit_trains_as_the_biases_themselves_would() -> None:
    """Three steps of gradient descent beside a model whose bias parameters are trained."""
    plain = make_bert(layers=2).double()
    adapted: Any = get_peft_model(make_bert(layers=2).double(), BitFitConfig(), autocast_adapter_dtype=False).double()
    tokens = torch.arange(3, 13).reshape(2, 5)
    biases = {name: p for name, p in plain.named_parameters() if name.endswith(".bias")}
    for name, p in plain.named_parameters():
        p.requires_grad_(name in biases)
    for model in (plain, adapted):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
    changed = {
        name.removesuffix(".base_layer.bias"): p
        for name, p in adapted.get_base_model().named_parameters()
        if name.endswith("base_layer.bias")
    }
    assert {f"{name}.bias" for name in changed} == set(biases)
    for name, bias in changed.items():
        module = adapted.get_base_model().get_submodule(name)
        torch.testing.assert_close(bias + module.bitfit_bias["default"], biases[f"{name}.bias"])
        assert not torch.equal(bias, biases[f"{name}.bias"]) or name == "bert.pooler.dense" or "key" in name
    torch.testing.assert_close(adapted(input_ids=tokens).logits, plain(input_ids=tokens).logits)


def test_bitfit_leaves_the_head_to_peft_and_merges() -> None:
    bert = make_bert(layers=2)
    before = run_model(bert)
    model: Any = get_peft_model(bert, BitFitConfig(task_type="SEQ_CLS"))
    adapted = {name for name, module in model.named_modules() if isinstance(module, BitFitLayer)}
    assert not any("classifier" in name for name in adapted)
    torch.testing.assert_close(run_model(model), before, rtol=0, atol=0)
    fill(model, "bitfit_bias")
    after = run_model(model)
    assert (after - before).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(run_model(model), before, rtol=0, atol=0)
    model.merge_adapter()
    torch.testing.assert_close(run_model(model), after)
    model.unmerge_adapter()
    torch.testing.assert_close(run_model(model), after)
    torch.testing.assert_close(run_model(model.merge_and_unload()), after)


def test_bitfit_without_any_bias() -> None:
    with pytest.raises(ValueError, match="BitFit trains biases, and this model has none"):
        get_peft_model(make_llama(layers=2), BitFitConfig())
    assert get_peft_model(make_gpt2(), BitFitConfig()) is not None  # Conv1D


def test_bitfit_of_a_module_without_bias() -> None:
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' is a Linear without a bias"):
        get_peft_model(make_llama(layers=2), BitFitConfig(target_modules=["q_proj"]))


# --- Bottleneck adapters ---


def adapters_of(model: nn.Module) -> dict[str, BottleneckLinear]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BottleneckLinear)
    }


def test_bottleneck_stands_behind_the_feed_forward_and_before_the_residual() -> None:
    """BERT's last layer written out: the adapter on what the feed-forward gives, then residual and norm."""
    bert = make_bert(layers=2)
    model = get_peft_model(bert, BottleneckConfig(bottleneck=3, task_type="SEQ_CLS"))
    assert set(adapters_of(model)) == {f"bert.encoder.layer.{i}.output.dense" for i in range(2)}
    fill(model, "bottleneck_")
    output = bert.bert.encoder.layer[1].output
    adapter: Any = output.dense
    down, up = adapter.bottleneck_down["default"], adapter.bottleneck_up["default"]
    hidden, residual = torch.randn(2, 5, 48), torch.randn(2, 5, 32)
    h = F.linear(hidden, adapter.base_layer.weight, adapter.base_layer.bias)
    h = h + torch.clamp(h @ down.weight.T + down.bias, min=0) @ up.weight.T + up.bias
    expected = F.layer_norm(h + residual, (32,), output.LayerNorm.weight, output.LayerNorm.bias, eps=1e-12)
    torch.testing.assert_close(output(hidden, residual), expected)


def test_bottleneck_changes_nothing_before_training_and_cannot_merge() -> None:
    bert = make_bert(layers=2)
    before = run_model(bert)
    model: Any = get_peft_model(bert, BottleneckConfig())
    torch.testing.assert_close(run_model(model), before, rtol=0, atol=0)
    fill(model, "bottleneck_")
    assert (run_model(model) - before).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(run_model(model), before, rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="not linear and cannot be merged"):
        model.merge_and_unload()


def test_dropped_layers_have_no_adapter() -> None:
    model = get_peft_model(make_bert(layers=6), BottleneckConfig(dropped_layers=4))
    assert set(adapters_of(model)) == {f"bert.encoder.layer.{i}.output.dense" for i in (4, 5)}
    with pytest.raises(ValueError, match="dropped_layers=6 leaves none of the 6 layers an adapter"):
        get_peft_model(make_bert(layers=6), BottleneckConfig(dropped_layers=6))
    assert len(adapters_of(get_peft_model(make_llama(), BottleneckConfig()))) == 6


def test_robust_adapterdrop_leaves_out_the_lowest_layers_in_training_only() -> None:
    bert = make_bert(layers=4)
    model = get_peft_model(bert, BottleneckConfig(bottleneck=3))
    fill(model, "bottleneck_")
    dropper = LayerDropper(model, seed=0)
    full = run_model(model)
    seen = set()
    for step in range(20):
        dropper.before_step(step)
        number = draw(0, step, 0, 3)
        seen.add(number)
        assert [layer.is_dropped for layer in adapters_of(model).values()] == [i < number for i in range(4)]
        torch.testing.assert_close(run_model(model.eval()), full)
        for module in adapters_of(model).values():  # dropout elsewhere stays off
            module.train()
        dropped = run_model(model)
        assert torch.equal(dropped, full) == (number == 0)
    assert seen == {0, 1, 2, 3}


# --- As PEFT methods ---


@pytest.mark.parametrize(
    ("config", "part"),
    [(BitFitConfig(task_type="SEQ_CLS"), "bitfit_"), (BottleneckConfig(task_type="SEQ_CLS"), "bottleneck_")],
)
def test_saved_and_loaded(config: Any, part: str, tmp_path: Path) -> None:
    model: Any = get_peft_model(make_bert(layers=3), config)
    fill(model, part)
    fill(model, "classifier")
    expected = run_model(model)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(make_bert(layers=3), tmp_path, adapter_name="encoder")  # a trap of a name
    torch.testing.assert_close(run_model(again), expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in again.parameters())
    assert set(adapters_named(again, part)) == {"encoder"}

    # a second adapter beside it, untrained and inactive
    again.add_adapter("other", type(config)(task_type="SEQ_CLS"))
    torch.testing.assert_close(run_model(again), expected, rtol=0, atol=0)
    again.set_adapter("other")
    assert (run_model(again) - expected).abs().max() > 1e-3

    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert all(part in key or "classifier" in key for key in tensors)
    missing = next(key for key in tensors if part in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != missing}, file)
    with pytest.raises(ValueError, match=r"does not fit the model: 1 .* missing, none extra"):
        PeftModel.from_pretrained(make_bert(layers=3), tmp_path)
    save_file(tensors | {missing.replace("bert.", "bert.nowhere."): tensors[missing].clone()}, file)
    with pytest.raises(ValueError, match="does not fit the model: none missing, 1 "):
        PeftModel.from_pretrained(make_bert(layers=3), tmp_path)


def adapters_named(model: nn.Module, part: str) -> set[str]:
    return {name.split(part)[1].split(".")[1] for name, _ in model.named_parameters() if part in name}


# --- PiSSA ---


def test_pissa_saved_as_the_change_is_a_lora_for_the_unchanged_base(tmp_path: Path) -> None:
    bert = make_bert(layers=2)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["value"], task_type="SEQ_CLS")
    before = run_model(bert)
    model: Any = get_peft_model(bert, config)
    initial = InitialFactors(model)

    def save() -> BertForSequenceClassification:
        with initial.saving():
            model.save_pretrained(tmp_path)
        return PeftModel.from_pretrained(make_bert(layers=2), tmp_path).eval()

    torch.testing.assert_close(run_model(save()), before, rtol=0, atol=0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    pairs = [key for key in tensors if key.endswith("lora_A.weight")]
    assert len(pairs) == 2
    for key in pairs:  # exactly nothing
        assert not (tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()).any()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += torch.randn(parameter.shape) * 0.3
    after = run_model(model)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(run_model(save()), after, rtol=1e-4, atol=1e-5)
    live = model.peft_config["default"]
    assert (live.r, live.lora_alpha, live.init_lora_weights) == (4, 8, "pissa")
