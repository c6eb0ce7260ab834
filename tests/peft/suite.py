"""A pytest plugin that runs PEFT's tests on our tuners: beside every LoRA of their lists ours, on numbered models.

``run.py`` fetches the tests and starts pytest with this plugin. Every LoRA that ours have a like of stays as the
control: a test of ours may fail where LoRA's fails too, or where ``EXPECTED`` gives a reason.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from inspect import isfunction
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from msplora_core import MSPLoraConfig
from msplora_core.tuners.bitfit import BitFitConfig
from msplora_core.tuners.bottleneck import BottleneckConfig

TUNERS = ("lora", "msplora", "shared", "bitfit", "bottleneck")
"""The control and ours; "shared" is MSPLoRA without the scale of a single layer."""
CLASSES: dict[str, Any] = dict(
    zip(TUNERS, (LoraConfig, MSPLoraConfig, MSPLoraConfig, BitFitConfig, BottleneckConfig), strict=True)
)
MARK = re.compile(rf"\b({'|'.join(TUNERS)})~")

OTHERS = re.compile(
    "embedding|_emb|conv|mha|unsupported_layer|divisible_by_groups|hotswap_works|self_targeting|like_peft_prefix"
)
"""Tests of layers that LoRA adapts and ours do not, and of what is LoRA's alone."""

EXPECTED = {
    "not linear and cannot be merged": "bottlenecks are not linear and cannot be merged",
    r"target_modules_not_set.*bitfit~[^$]*DID NOT RAISE": "BitFit has targets of its own in every model",
    r"only_params_are_updated.bottleneck~[^$]*allclose": "W_up begins at 0: the bias before it has moved by 3e-5 only",
    "without the scale 'layer', a state dict": "tensors that are shared do not name the modules that share them",
    "BitFit trains biases, and this model has none": "BitFit, and a model without biases",
    "Linear without a bias": "BitFit, and a module without a bias",
    r"bitfit~.*(Bert|Roberta)Model[^$]*assert param.grad is not None": "BitFit, and a pooler that no loss sees",
    r"(bitfit|bottleneck)~[^$]*'layers_to_transform'": "BitFit and bottlenecks have no layers_to_transform",
}
"""What a failure of ours looks like (the test, a line end, the error) where LoRA passes, and why that is right."""

UNSUPPORTED = {"EmbConv1D", "Conv1d", "Conv2d", "Conv2dGroups", "Conv2dGroups2", "Conv3d", "MHA", "MlpUsingParameters"}
"""PEFT's models without a linear layer to adapt, or with others beside it."""

SAME = {"task_type", "exclude_modules", "modules_to_save", "inference_mode"}
OF_MSPLORA = {"lora_alpha", "lora_dropout", "use_rslora", "layers_to_transform", "layers_pattern", "bias"}


def like(options: dict[str, Any], tuner: str) -> dict[str, Any] | None:
    """The options of a tuner that say what LoRA's say; None if it has no such."""
    ours: dict[str, Any] = {}
    for name, value in options.items():
        if name == "target_modules":  # one name alone is a whole name to PEFT, and has a number before it here
            ours[name] = rf".*\.{value}" if value in ("lin0", "lin1") else value
        elif name in SAME or (tuner in ("msplora", "shared") and name in OF_MSPLORA):
            ours[name] = value.replace("lora_only", "msplora_only") if name == "bias" else value
        elif name == "init_lora_weights" and isinstance(value, bool):
            ours["init_weights"] = value
        elif name not in ("r", "lora_alpha", "lora_dropout", "use_rslora") and (name, value) != ("bias", "none"):
            return None
    rank = min(options.get("r", 8), 8)  # the toy model is 10 wide
    if tuner == "lora":
        return options | {name: value for name, value in ours.items() if name == "target_modules"}
    if tuner == "shared":
        ours["ranks"] = {"global": rank, "mid": rank}
    elif tuner == "msplora":
        ours["ranks"] = {"global": rank, "mid": max(rank // 2, 1), "layer": max(rank // 4, 1)}
    return ours


def alike(value: Any, tuner: str) -> Any:
    """What stands in a list, with LoRA replaced by a tuner; None where that is not possible."""
    if value is LoraConfig:
        return CLASSES[tuner]
    if isinstance(value, dict):
        return like(value, tuner)
    if value == "lora":
        return tuner
    if type(value) is not LoraConfig:
        return value
    default = LoraConfig().to_dict()
    options = {key: item for key, item in value.to_dict().items() if item != default[key]}
    ours = like(options, tuner)
    return None if ours is None else CLASSES[tuner](**ours)


def with_ours(rows: Iterable[Any]) -> list[Any]:
    """The LoRAs of a list of parameters, and ours beside them; nothing else."""
    kept = []
    for number, row in enumerate(rows):
        if isinstance(row, type(pytest.param())):
            row = row.values if len(row.values) > 1 else row.values[0]
        values = row if isinstance(row, tuple) else (row,)
        if not any(value is LoraConfig or type(value) is LoraConfig for value in values) or UNSUPPORTED & {
            value for value in values if isinstance(value, str)
        }:
            continue
        if None in [alike(value, "msplora") for value in values if value is not None]:
            continue
        for tuner in TUNERS:
            ours = [alike(value, tuner) for value in values]
            if None not in [now for before, now in zip(values, ours, strict=True) if before is not None]:
                kept.append(pytest.param(*ours, id=f"{tuner}~{number}"))
    return kept


def functions(module: Any) -> Iterator[Any]:
    """The test functions of a module and of its classes."""
    for value in vars(module).values():
        inside = vars(value).values() if isinstance(value, type) and value.__module__ == module.__name__ else [value]
        yield from (item for item in inside if isfunction(item) and item.__name__.startswith("test"))


class MLP(nn.Module):
    """PEFT's toy model with its two linear layers in numbered blocks, which can share."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"lin0": nn.Linear(10, 20, bias=bias), "lin1": nn.Linear(20, 10, bias=bias)})
            for _ in range(3)
        )
        self.head = nn.Linear(10, 2)
        self.drop = nn.Dropout(0.5)
        self.dtype = torch.float32

    lin0 = property(lambda self: self.blocks[0]["lin0"])
    lin1 = property(lambda self: self.blocks[0]["lin1"])

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        X = X.to(self.dtype)
        for block in self.blocks:
            X = block["lin1"](self.drop(block["lin0"](X).tanh()))
        return self.head(X).log_softmax(dim=-1)


class Everything(Counter):
    """PEFT's record of the models that it has fetched: all, so that nothing asks the Hub."""

    def __contains__(self, key: object) -> bool:
        return True


def pytest_collectstart(collector: pytest.Collector) -> None:
    if not isinstance(collector, pytest.Module):
        return
    try:
        module = collector.obj
    except (pytest.Collector.CollectError, pytest.skip.Exception):
        return  # pytest comes to it, and tells
    if hasattr(module, "hub_online_once"):
        module.hub_online_once.__wrapped__.__globals__["_HUB_MODEL_ACCESSES"] = Everything()
    if hasattr(module, "MLP"):
        module.MLP = MLP
    for function in functions(module):
        marks = getattr(function, "pytestmark", [])
        for position, mark in enumerate(marks):
            if mark.name == "parametrize" and (rows := with_ours(mark.args[1])):
                marks[position] = pytest.mark.parametrize(mark.args[0], rows).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if MARK.search(item.nodeid) and not OTHERS.search(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


class Verdict:
    """Counts what passed and failed for each tuner, and decides on the exit status."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.errors: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
            self.errors[report.nodeid] = f"{report.nodeid}\n{report.longreprtext}"

    def failures(self) -> dict[str, str]:
        """The tests that failed, with the reason why that is no fault, or an empty one."""
        failed = {}
        for test, outcome in self.outcomes.items():
            if outcome == "failed":
                reasons = [why for pattern, why in EXPECTED.items() if re.search(pattern, self.errors[test])]
                if self.outcomes.get(MARK.sub("lora~", test)) == "failed":
                    reasons.append("LoRA fails too")
                failed[test] = reasons[0] if reasons else ""
        return failed

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.outcomes and session.exitstatus in (0, 1):
            session.exitstatus = int(not all(self.failures().values()))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("PEFT's tests on our tuners")
        failed = self.failures()
        for tuner in TUNERS:
            counts = Counter(outcome for test, outcome in self.outcomes.items() if MARK.search(test)[1] == tuner)
            reasons = Counter(why or "FAULTS" for test, why in failed.items() if MARK.search(test)[1] == tuner)
            told = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
            terminalreporter.line(f"{tuner:11} {told}" + "".join(f"; {n}: {why}" for why, n in reasons.items()))
        for test, why in failed.items():
            if not why:
                terminalreporter.line(f"FAULT {test}")


if not os.environ.get("PYTEST_XDIST_WORKER"):

    def pytest_sessionstart(session: pytest.Session) -> None:
        session.config.pluginmanager.register(Verdict())
