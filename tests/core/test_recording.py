"""Moments and scores against dense matrices: inputs and gradients of every adapted layer, by plain autograd."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from msplora_analysis.adapters.discovery import discover
from msplora_analysis.adapters.opening import opened
from msplora_analysis.compute.linalg.spectra import value
from msplora_analysis.options import Options
from msplora_core import MSPLoraConfig, record_moments
from msplora_core.errors import TrainingError
from msplora_core.measure.updates import updates_of
from msplora_core.moments import directions
from msplora_core.tuners.sora import SoraConfig

from .conftest import make_bert, make_gpt2, make_llama, make_t5

LENGTHS = (7, 4, 9, 1, 6)
TARGET_LENGTHS = (3, 9, 4, 2, 9)


class Case(NamedTuple):
    make: Callable[..., Any]
    modules: list[str]
    task_type: str
    targets: bool = False


CASES = {
    "bert": Case(make_bert, ["query", "value", "dense"], "SEQ_CLS"),  # the pooler's dense sees one vector an example
    "llama": Case(make_llama, ["q_proj", "k_proj", "up_proj", "down_proj"], "CAUSAL_LM"),
    "gpt2": Case(make_gpt2, ["c_attn", "c_proj"], "CAUSAL_LM"),
    "t5": Case(make_t5, ["q", "k", "v", "wo"], "SEQ_2_SEQ_LM", targets=True),
}
LAYERS_WITHOUT_NUMBER = ".*(pooler|classifier).*"


def lora(case: Case, **others: Any) -> peft.LoraConfig:
    conv = {"fan_in_fan_out": True} if case.make is make_gpt2 else {}
    return peft.LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.3, target_modules=case.modules, task_type=case.task_type, **conv, **others
    )


def msplora(case: Case) -> MSPLoraConfig:
    ranks = {"global": 3, "mid": 2, "layer": 1}
    return MSPLoraConfig(
        ranks=ranks, lora_dropout=0.3, target_modules=case.modules, exclude_modules=LAYERS_WITHOUT_NUMBER,
        task_type=case.task_type,
    )  # fmt: skip


def adapted(base: nn.Module, config: Any, seed: int = 0) -> Any:
    """A model in float64 whose adapter is not zero."""
    model = peft.get_peft_model(base, config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "msplora_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def examples_of(case: Case) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, 60, (length,), generator=generator)

    examples = []
    for length, target_length in zip(LENGTHS, TARGET_LENGTHS, strict=True):
        ids = tokens(length)
        labels = torch.randint(2, (), generator=generator)
        if case.targets:
            labels = tokens(target_length)
        elif case.task_type == "CAUSAL_LM":
            labels = ids.clone()
            labels[: length // 2] = -100  # the prompt
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def padded(examples: list[dict[str, torch.Tensor]], size: int, left: bool = False) -> list[dict[str, torch.Tensor]]:
    """Batches of at most ``size`` examples."""

    def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        if rows[0].ndim == 0:
            return torch.stack(rows)
        longest = max(map(len, rows))
        filled = [row.new_full((longest - len(row),), value) for row in rows]
        return torch.stack([torch.cat([f, r] if left else [r, f]) for r, f in zip(rows, filled, strict=True)])

    batches = []
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        ids = [example["input_ids"] for example in some]
        batches.append(
            {
                "input_ids": pad(ids, 0),
                "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
                "labels": pad([example["labels"] for example in some], -100),
            }
        )
    return batches


class Dense(NamedTuple):
    """Of one module: x and g of every token, and of each example."""

    x: list[torch.Tensor]
    g: list[torch.Tensor]


def keep(seen: dict[str, Any], name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.retain_grad()
    seen[name] = inputs[0].detach(), output


def densely(model: Any, examples: list[dict[str, torch.Tensor]], kind: str) -> dict[str, Dense]:
    """Inputs and output gradients of every adapted module, example by example, without padding."""
    updates = updates_of(model)
    found = {name: Dense([], []) for name in updates}
    for example in examples:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        hooks = []
        for name, update in updates.items():
            hooks.append(update.layer.register_forward_hook(partial(keep, seen, name)))
        batch = {key: value[None] for key, value in example.items()}
        labels = batch.pop("labels")
        if kind == "SEQ_2_SEQ_LM":
            batch["decoder_input_ids"] = model.get_base_model().prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model(**batch).logits
        if kind == "CAUSAL_LM":
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
        if labels.numel() and (labels != -100).any():
            loss.backward()
        for hook in hooks:
            hook.remove()
        for name, (x, y) in seen.items():
            grad = torch.zeros_like(y) if y.grad is None else y.grad
            found[name].x.append(x.reshape(-1, x.shape[-1]))
            found[name].g.append(grad.reshape(-1, y.shape[-1]))
    model.zero_grad()
    return found


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def delta(update: Any) -> torch.Tensor:
    dense = update.layer.get_delta_weight(update.adapter)
    return (dense.T if isinstance(update.layer.get_base_layer(), Conv1D) else dense).detach()


@pytest.mark.parametrize("configure", [lora, msplora])
@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_dense_inputs_and_gradients(name: str, configure: Callable[[Case], Any]) -> None:
    case = CASES[name]
    model = adapted(case.make(layers=3), configure(case))
    examples = examples_of(case)
    found = record_moments(model, padded(examples, 3), labels="given", keep_cores=True)
    assert found.about["examples"] == len(examples)
    assert found.about["tokens"] == sum(LENGTHS) + case.targets * sum(TARGET_LENGTHS)

    dense = densely(model, examples, case.task_type)
    assert found.modules.keys() == dense.keys()
    for path, update in updates_of(model).items():
        of, (x, g), a, b = found.modules[path], dense[path], update.a().detach(), update.b().detach()
        inputs, gradients = torch.cat(x), torch.cat(g)
        c, fisher = inputs.T @ inputs / len(inputs), gradients.T @ gradients / len(gradients)
        np.testing.assert_allclose(of.s_a, a @ c @ a.T, rtol=1e-8, atol=1e-16)
        np.testing.assert_allclose(of.s_b, b.T @ fisher @ b, rtol=1e-8, atol=1e-16)
        dense_update = delta(update)
        np.testing.assert_allclose(b @ a, dense_update, atol=1e-12)
        weighted = torch.linalg.svdvals(root(fisher) @ dense_update @ root(c))[: update.rank]
        sigma = directions(of.s_a, of.s_b).sigma
        kept = weighted > 1e-3 * weighted[0]
        np.testing.assert_allclose(sigma[kept], weighted[kept], rtol=1e-4)
        cores = torch.stack([b.T @ one_g.T @ one_x @ a.T for one_x, one_g in zip(x, g, strict=True)])
        np.testing.assert_allclose(of.cores, cores, rtol=1e-5, atol=1e-6 * float(cores.abs().max()) + 1e-15)
        whole = [(g_ @ dense_update * x_).sum() for x_, g_ in zip(x, g, strict=True)]
        for basis, scores in of.scores.items():  # the gates of all directions are that of the whole update
            np.testing.assert_allclose(scores.sum(1), whole, rtol=1e-4, atol=1e-6, err_msg=basis)


@pytest.mark.parametrize("configure", [lora, msplora])
@pytest.mark.parametrize("name", CASES)
def test_batches_and_padding_change_nothing(name: str, configure: Callable[[Case], Any]) -> None:
    case = CASES[name]
    model = adapted(case.make(layers=3), configure(case))
    examples = examples_of(case)
    one = record_moments(model, padded(examples, 1), draws=2, seed=3)
    left = name == "llama"  # whose positions are relative, up to the rounding of rotations in float32
    for batches in (padded(examples, 2), padded(examples, 5, left=left)):
        other = record_moments(model, batches, draws=2, seed=3)
        assert {**other.about} == {**one.about}
        for path, of in one.modules.items():
            np.testing.assert_allclose(other.modules[path].s_a, of.s_a, rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(other.modules[path].s_b, of.s_b, rtol=1e-4, atol=1e-14)
            whole = of.scores["plain"].sum(1)
            np.testing.assert_allclose(other.modules[path].scores["plain"].sum(1), whole, rtol=1e-3, atol=1e-7)


def test_how_many_modules_are_summed_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["llama"]
    model = adapted(case.make(layers=3), msplora(case))
    batches = padded(examples_of(case), 2)
    together = record_moments(model, batches, draws=2).modules
    for most in (1, 100):  # each by itself, or a few
        monkeypatch.setattr("msplora_core.measure.recorder._TOGETHER", most)
        for path, of in record_moments(model, batches, draws=2).modules.items():
            np.testing.assert_allclose(of.s_a, together[path].s_a, rtol=1e-12)
            np.testing.assert_allclose(of.s_b, together[path].s_b, rtol=1e-9, atol=1e-20)


def gated(b: torch.Tensor, a: torch.Tensor, gates: torch.Tensor, module: nn.Module, inputs: Any, output: Any) -> Any:
    return output + (inputs[0] @ a.T * (gates - 1)) @ b.T


def gates_of(model: Any, batch: dict[str, torch.Tensor], found: Any, basis: str) -> dict[str, torch.Tensor]:
    """The gradient of the examples' summed loss at a gate of 1 on each term of each update, by autograd."""
    hooks, gates = [], {}
    for path, update in updates_of(model).items():
        of, a, b = found.modules[path], update.a().detach(), update.b().detach()
        parts = [slice(0, update.rank)] if "scale" not in basis else [of.part(scale) for scale in of.scales]
        terms = []
        for part in parts:
            s_a, s_b = (of.s_a, of.s_b) if "task" in basis else (a @ a.T, b.T @ b)
            one = directions(np.asarray(s_a)[part, part], np.asarray(s_b)[part, part])
            terms.append((b[:, part] @ torch.from_numpy(one.left), torch.from_numpy(one.right) @ a[part]))
        b_k, a_k = torch.cat([left for left, _ in terms], dim=1), torch.cat([right for _, right in terms])
        gates[path] = torch.ones(update.rank, dtype=torch.float64, requires_grad=True)

        def gated(
            module: nn.Module, inputs: Any, output: Any, b_k: Any = b_k, a_k: Any = a_k, g: Any = gates[path]
        ) -> Any:
            return output + (inputs[0] @ a_k.T * (g - 1)) @ b_k.T

        hooks.append(update.layer.register_forward_hook(gated))
    labels = batch["labels"]
    loss = cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(gates.values()))
    for hook in hooks:
        hook.remove()
    return dict(zip(gates, gradients, strict=True))


@pytest.mark.parametrize("basis", ["plain", "task", "scale_plain", "scale_task"])
def test_scores_are_the_gradients_at_gates_on_each_term(basis: str) -> None:
    case = CASES["bert"]
    model = adapted(make_bert(layers=3), msplora(case))
    examples = examples_of(case)
    found = record_moments(model, padded(examples, 4), labels="given")
    for row, example in enumerate(padded(examples, 1)):
        for path, gradient in gates_of(model, example, found, basis).items():
            np.testing.assert_allclose(found.modules[path].scores[basis][row], gradient, rtol=1e-3, atol=1e-8)


def classifier(classes: int, **config: Any) -> Any:
    base = make_bert(layers=3)
    base.num_labels = base.config.num_labels = classes
    base.classifier = nn.Linear(base.config.hidden_size, classes)
    for name, setting in config.items():
        setattr(base.config, name, setting)
    return adapted(base, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))


def expected_over_labels(model: Any, examples: list[dict[str, torch.Tensor]], classes: int) -> dict[str, torch.Tensor]:
    """S_b for labels of the model's own distribution: every label, weighted by its probability."""
    sums: dict[str, torch.Tensor] = {}
    for example in examples:
        batch = padded([example], 1)[0]
        del batch["labels"]
        p = model(**batch).logits.softmax(-1)[0].detach()
        for label in range(classes):
            of = record_moments(model, [batch | {"labels": torch.tensor([label])}], labels="given")
            for path, module in of.modules.items():
                sums[path] = sums.get(path, 0) + p[label] * len(example["input_ids"]) * torch.tensor(module.s_b)
    return {path: total / sum(len(example["input_ids"]) for example in examples) for path, total in sums.items()}


def test_few_classes_are_not_sampled_but_weighed() -> None:
    model = classifier(3)
    examples = examples_of(CASES["bert"])
    found = record_moments(model, padded(examples, 3))
    assert (found.about["draws"], found.about["exact"]) == (2, True)
    for path, s_b in expected_over_labels(model, examples, 3).items():
        np.testing.assert_allclose(found.modules[path].s_b, s_b, rtol=1e-8)
        assert len(found.modules[path].scores["task"]) == 2 * len(examples)


def test_sampled_labels_agree_with_the_models_distribution() -> None:
    model = classifier(3)
    examples = examples_of(CASES["bert"])
    found = record_moments(model, padded(100 * examples, 500), draws=2)
    assert (found.about["draws"], found.about["exact"]) == (2, False)
    for path, s_b in expected_over_labels(model, examples, 3).items():
        assert np.trace(found.modules[path].s_b) == pytest.approx(float(torch.trace(s_b)), rel=0.15)


def test_sampled_tokens_of_a_language_model_agree_with_its_distribution() -> None:
    model = adapted(make_llama(layers=2), lora(CASES["llama"]))
    ids = torch.tensor([[5, 9, 40, 7]])
    labels = torch.tensor([[-100, -100, 40, 7]])  # two tokens are learnt
    sampled = record_moments(model, [{"input_ids": ids.expand(600, 4), "labels": labels.expand(600, 4)}], draws=1)
    p = model(ids).logits[0].softmax(-1).detach()
    each = torch.full((2 * p.shape[1], 4), -100)  # every token at both places
    each[: p.shape[1], 2] = each[p.shape[1] :, 3] = torch.arange(p.shape[1])
    given = record_moments(model, [{"input_ids": ids.expand(len(each), 4), "labels": each}], labels="given")
    for path, of in sampled.modules.items():
        expected = torch.cat([p[1], p[2]]).numpy() @ given.modules[path].scores["plain"].astype(float) ** 2
        found = np.mean(of.scores["plain"].astype(float) ** 2, axis=0)
        np.testing.assert_allclose(found[0], expected[0], rtol=0.2)


def test_regression() -> None:
    model = classifier(1, problem_type="regression")
    examples = [example | {"labels": torch.tensor(3.0)} for example in examples_of(CASES["bert"])]
    given = record_moments(model, padded(examples, 2), labels="given")
    sampled = record_moments(model, padded(examples, 5), labels="sampled")
    drawn = record_moments(model, padded(examples, 5), labels="sampled", draws=3)
    assert given.about["loss"] == sampled.about["loss"] == "regression"
    assert (sampled.about["draws"], drawn.about["draws"]) == (1, 3)
    predictions = [
        float(model(**{k: v for k, v in b.items() if k != "labels"}).logits.detach()) for b in padded(examples, 1)
    ]
    for path, of in sampled.modules.items():
        errors = 2 * (np.array(predictions) - 3.0)
        np.testing.assert_allclose(
            given.modules[path].scores["plain"], errors[:, None] * of.scores["plain"], rtol=1e-4, atol=1e-9
        )
        np.testing.assert_allclose(drawn.modules[path].s_b, of.s_b, rtol=1e-6)  # the sign is drawn


def test_closing_all_gates_a_little_costs_what_is_predicted() -> None:
    model = classifier(3)
    examples = examples_of(CASES["bert"])
    found = record_moments(model, padded(examples, 5))
    closed = 0.01
    predicted = found.predicted_kl(closed * sum(of.scores["task"].sum(1) for of in found.modules.values()))
    batch = padded(examples, 5)[0]
    del batch["labels"]
    whole = model(**batch).logits.log_softmax(-1).detach()
    with torch.no_grad():
        for update in updates_of(model).values():
            update.layer.lora_B["default"].weight.mul_(1 - closed)
    cut = model(**batch).logits.log_softmax(-1).detach()
    assert predicted == pytest.approx(float((whole.exp() * (whole - cut)).sum(-1).mean()), rel=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    case = CASES[name]
    examples = examples_of(case)
    plain = adapted(case.make(layers=3), lora(case))
    expected = record_moments(plain, padded(examples, 2), draws=2)
    plain.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain.train()
    computed = []
    layer = next(m for m in plain.modules() if getattr(m, "gradient_checkpointing", False) and hasattr(m, "forward"))
    hook = next(iter(updates_of(plain).values())).layer.register_forward_hook(lambda *_: computed.append(1))
    found = record_moments(plain, padded(examples, 2), draws=2)
    hook.remove()
    assert len(computed) > len(padded(examples, 2)), f"{type(layer).__name__}: activations were not computed again"
    for path, of in expected.modules.items():
        np.testing.assert_allclose(found.modules[path].s_a, of.s_a, rtol=1e-9)
        np.testing.assert_allclose(found.modules[path].s_b, of.s_b, rtol=1e-9)
        np.testing.assert_allclose(found.modules[path].scores["task"], of.scores["task"], rtol=1e-4, atol=1e-7)


def state_of(model: Any) -> Any:
    def hooks(module: nn.Module) -> int:
        return sum(len(value) for name, value in vars(module).items() if "_hooks" in name)

    return (
        {
            name: (m.training, hooks(m), vars(m).get("_gradient_checkpointing_func"))
            for name, m in model.named_modules()
        },
        {name: (p.requires_grad, p.detach().clone(), p.grad) for name, p in model.named_parameters()},
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_the_same_afterwards(fails: bool) -> None:
    model = adapted(make_llama(layers=2), lora(CASES["llama"])).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    batches = padded(examples_of(CASES["llama"]), 2)
    model(**batches[0]).loss.backward()  # gradients of a training that goes on
    before = state_of(model)
    if fails:
        batches[1]["input_ids"] = batches[1]["input_ids"] + 1000
        with pytest.raises(IndexError):
            record_moments(model, batches)
    else:
        record_moments(model, batches)
    after = state_of(model)
    assert before[0] == after[0]
    for name, (trained, weights, gradient) in before[1].items():
        assert after[1][name][0] == trained
        assert after[1][name][2] is gradient, name
        torch.testing.assert_close(after[1][name][1], weights, rtol=0, atol=0)
    assert torch.equal(before[2], after[2])
    if not fails:
        model.eval()
        with torch.inference_mode():  # whatever the caller switched off
            record_moments(model, batches)


# --- Kinds of adapters, against the factors that the analysis reads ---


def small_network() -> nn.Module:
    """Embedding, convolution, linear layer and head: tokens of an image are its places."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(model_type="none", to_dict=dict, name_or_path="small")
            self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.linear = nn.Linear(6, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, pixel_values: torch.Tensor) -> Any:
            places = self.conv(pixel_values).flatten(2).transpose(1, 2)  # (examples, places, 6)
            return types.SimpleNamespace(logits=self.head(self.linear(places).relu().mean(1)))

    torch.manual_seed(0)
    return Network()


def test_convolutions() -> None:
    model = adapted(small_network(), peft.LoraConfig(r=2, target_modules=["conv", "linear"]))
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1])
    found = record_moments(model, [{"pixel_values": images, "labels": labels}], labels="given").modules["conv"]

    update = updates_of(model)["conv"]
    outputs = []
    hook = update.layer.register_forward_hook(lambda *of: (of[2].retain_grad(), outputs.append(of[2]))[1])
    cross_entropy(model(pixel_values=images).logits, labels, reduction="sum").backward()
    hook.remove()
    x = nn.functional.unfold(images, 3, padding=1, stride=2).transpose(1, 2)  # (examples, places, 3 * 3 * 3)
    g = outputs[0].grad.flatten(2).transpose(1, 2)
    a, b = update.a().detach(), update.b().detach()
    np.testing.assert_allclose(b @ a, update.layer.get_delta_weight("default").detach().flatten(1), atol=1e-12)
    np.testing.assert_allclose(found.s_a, torch.einsum("npi,npj->ij", x @ a.T, x @ a.T) / (4 * 9), rtol=1e-9)
    np.testing.assert_allclose(found.s_b, torch.einsum("npi,npj->ij", g @ b, g @ b) / (4 * 9), rtol=1e-9)
    whole = torch.einsum("npo,oi,npi->n", g, b @ a, x)
    np.testing.assert_allclose(found.scores["plain"].sum(1), whole, rtol=1e-4, atol=1e-8)


def test_embeddings() -> None:
    model = adapted(make_bert(layers=2), peft.LoraConfig(r=2, target_modules=["word_embeddings"], task_type="SEQ_CLS"))
    examples = examples_of(CASES["bert"])
    (found,) = record_moments(model, padded(examples, 3), labels="given").modules.values()
    dense = densely_embedded(model, examples)
    (update,) = updates_of(model).values()
    a, b = update.a().detach(), update.b().detach()
    ids, g = (torch.cat(of) for of in zip(*dense, strict=True))
    np.testing.assert_allclose(found.s_a, a[:, ids] @ a[:, ids].T / len(ids), rtol=1e-9)
    np.testing.assert_allclose(found.s_b, (g @ b).T @ (g @ b) / len(ids), rtol=1e-9)
    whole = [((g @ b) * a[:, ids].T).sum() for ids, g in dense]
    np.testing.assert_allclose(found.scores["task"].sum(1), whole, rtol=1e-4, atol=1e-8)


def densely_embedded(model: Any, examples: list[dict[str, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    (update,) = updates_of(model).values()
    of = []
    for batch in padded(examples, 1):
        labels, seen = batch.pop("labels"), {}
        hook = update.layer.register_forward_hook(partial(keep, seen, "it"))
        cross_entropy(model(**batch).logits, labels, reduction="sum").backward()
        hook.remove()
        of.append((batch["input_ids"][0], seen["it"][1].grad[0]))
    return of


KINDS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=7),
    "rslora": peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True),
    "pissa": peft.LoraConfig(r=3, init_lora_weights="pissa"),
    "dora": peft.LoraConfig(r=3, use_dora=True),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=7, total_step=10),
    "sora": SoraConfig(r=3, lora_alpha=7, init_weights=False),
    "msplora": MSPLoraConfig(ranks={"global": 3, "mid": 2, "layer": 1}, lora_alpha=7),
    "two scales": MSPLoraConfig(ranks={"global": 3, "layer": 2}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_what_the_analysis_reads(kind: str, tmp_path: Path) -> None:
    config = copy.deepcopy(KINDS[kind])
    config.target_modules = {"query", "value"}
    config.task_type = "SEQ_CLS"
    model = adapted(make_bert(layers=4), config)
    examples = examples_of(CASES["bert"])
    found = record_moments(model, padded(examples, 3), labels="given")
    dense = densely(model, examples, "SEQ_CLS")
    for path, update in updates_of(model).items():
        of, (x, g) = found.modules[path], dense[path]
        delta_w = update.b().detach() @ update.a().detach()
        if kind == "dora":  # the magnitudes rescale what B A adds: y = m / |W + B A| (W x + B A x)
            layer = update.layer
            norm = torch.linalg.norm(layer.get_base_layer().weight + delta_w, dim=1)
            scale = (layer.lora_magnitude_vector["default"].weight / norm).detach()
            g = [one * scale for one in g]
        whole = [(g_ @ delta_w * x_).sum() for x_, g_ in zip(x, g, strict=True)]
        np.testing.assert_allclose(of.scores["task"].sum(1), whole, rtol=1e-4, atol=1e-9)
        c, fisher = (torch.cat(of_tokens) for of_tokens in (x, g))
        weighted = root(fisher.T @ fisher / len(fisher)) @ delta_w @ root(c.T @ c / len(c))
        sigma = directions(of.s_a, of.s_b).sigma
        np.testing.assert_allclose(
            sigma, torch.linalg.svdvals(weighted)[: update.rank], rtol=1e-4, atol=1e-3 * sigma[0]
        )
    assert bool(found.about["notes"]) == (kind == "dora")

    model.float().save_pretrained(tmp_path)
    (adapter,) = discover(tmp_path)
    with opened(adapter, Options()) as (file, contents):
        wholes = {m.name: m for m in contents.matrices if m.scale in ("layer", "total")}  # the total comes last
        assert wholes.keys() == found.modules.keys()
        for name, matrix in wholes.items():
            products = [(value(file, one.a), one.scaling * value(file, one.b)) for one in matrix.update.products]
            norms = [[np.sum(factors[side] ** 2) for factors in products] for side in (0, 1)]
            np.testing.assert_allclose(found.modules[name].norms, norms, rtol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "autocast"])
def test_half_precision_is_near(precision: str) -> None:
    case = CASES["llama"]
    model = adapted(make_llama(layers=2), lora(case)).float()
    examples = examples_of(case)
    expected = record_moments(model, padded(examples, 5), labels="given")
    if precision != "autocast":
        model.to(getattr(torch, precision))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found = record_moments(model, padded(examples, 5), labels="given")
    for path, of in expected.modules.items():
        np.testing.assert_allclose(np.trace(found.modules[path].s_a), np.trace(of.s_a), rtol=0.05)
        np.testing.assert_allclose(np.trace(found.modules[path].s_b), np.trace(of.s_b), rtol=0.4)
        assert found.modules[path].fits(of.norms)


# --- What is refused ---


def test_what_cannot_be_measured_is_told() -> None:
    batches = padded(examples_of(CASES["bert"]), 2)
    model = adapted(make_bert(layers=2), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(TrainingError, match="labels='maximal'"):
        record_moments(model, batches, labels="maximal")
    with pytest.raises(TrainingError, match="'labels'"):
        record_moments(model, [{k: v for k, v in b.items() if k != "labels"} for b in batches], labels="given")
    with pytest.raises(TrainingError, match="no example"):
        record_moments(model, [])
    with pytest.raises(TrainingError, match="low-rank"):
        record_moments(make_bert(layers=2), batches)
    wide = adapted(make_bert(layers=2), peft.LoraConfig(r=17, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(TrainingError, match=r"keep_cores.*query"):
        record_moments(wide, batches, keep_cores=True)
    other = adapted(make_bert(layers=2), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(TrainingError, match=r"query.*LoRA"):
        record_moments(other, batches)
    positions = adapted(
        make_bert(layers=2), peft.LoraConfig(target_modules=["position_embeddings"], task_type="SEQ_CLS")
    )
    with pytest.raises(TrainingError, match="position_embeddings"):  # one row of positions for all examples
        record_moments(positions, batches)
