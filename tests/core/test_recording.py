"""Moments and scores against dense matrices: inputs and gradients of every adapted layer, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from msplora_core import MSPLoraConfig, record_moments
from msplora_core.measure.updates import updates_of
from msplora_core.moments import directions

from .conftest import make_bert, make_gpt2, make_llama, make_t5

LENGTHS = (7, 4, 9, 1, 6)
TARGET_LENGTHS = (3, 9, 4, 2, 6)


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
    return model


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
    model.eval()
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
    model = adapted(case.make(), configure(case))
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
