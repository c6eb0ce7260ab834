"""What ``extract`` makes of each tensor of a fully trained model: approximate it, save it whole, or leave it out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import natural_key, read_json
from msplora_analysis.files.opening import BASE
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.full import is_table
from msplora_analysis.formats.helpers.base import align
from msplora_analysis.formats.helpers.parts import is_head, trained_in_full
from msplora_analysis.formats.updates import Contents, Matrix, Whole
from msplora_analysis.options import Options

# Layers that transformers stores (in, out): Conv1D, of these models.
_CONV1D = re.compile(r"(.+\.)?(c_attn|c_proj|c_fc|q_attn)")
_WITH_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip


class Plan(NamedTuple):
    """What becomes of the tensors of the model.

    low: updates to approximate. saved: tensors to copy, by the module of ``modules_to_save`` that each is in. left: the
    others, and what the base calls them (None: it has none). transposed: weights that are stored (in, out). notes: what
    a user must know of the rest.
    """

    low: list[Matrix]
    saved: dict[str, str]
    left: dict[str, str | None]
    transposed: set[str]
    notes: list[str]


def plan_of(file: TensorFile, contents: Contents, modules_to_save: Sequence[str], settings: dict[str, Any]) -> Plan:
    """What becomes of each tensor; ``contents`` are the updates between the model and its base.

    Raises:
        AnalysisError: ``modules_to_save`` names nothing, or a module inside another.
    """
    tuned = [name for name in file.shapes if not name.startswith(BASE)]
    base = [name.removeprefix(BASE) for name in file.shapes if name.startswith(BASE)]
    of_base = align(tuned, base)
    saved: dict[str, str] = {}
    for module in modules_to_save:
        inside = [name for name in tuned if f"{module}." in name]  # PEFT takes all whose path ends so
        if not inside:
            raise AnalysisError(f"modules_to_save={module}: no tensor of the model is in it", "modules_to_save")
        saved |= dict.fromkeys(inside, module)
    _check_nesting(saved, modules_to_save)
    for name in tuned:  # PEFT expects a task's head to be trained in full
        new = name not in of_base and trained_in_full(name, {}) and name not in contents.unknown
        if (new or is_head(name)) and name not in saved:
            saved[name] = _head(name)
    low = []
    for matrix in contents.matrices:
        assert isinstance(matrix.update, Whole)
        tensor, other = matrix.update.factor.tensors
        shape = file.shapes[tensor]
        grouped = len(shape) > 2 and shape[1] == 1  # a convolution in groups, each of one channel
        is_layer = tensor.endswith(".weight") and not is_table(tensor) and not grouped
        if is_layer and tensor not in saved and shape == file.shapes[other]:
            low.append(matrix)
    tensors = {tensor_of(matrix) for matrix in low}
    left = {name: of_base.get(name) for name in tuned if name not in saved and name not in tensors}
    transposed = {name for name in tensors if _is_transposed(name, file, settings)}
    notes = [
        f"{name} has shape {list(file.shapes[name])}, in the base {list(file.shapes[BASE + other])}: tokens were added "
        "or taken away; resize the base's embeddings before the adapter is loaded, "
        "and save them whole (modules_to_save)"
        for name, other in of_base.items()
        if file.shapes[name] != file.shapes[BASE + other] and name not in saved
    ]
    if lost := sorted(set(base).difference(of_base.values()), key=natural_key):
        listed = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        notes.append(f"tensors of the base that the model does not have ({len(lost)}): {listed}")
    order = {name: i for i, name in enumerate(file.shapes)}  # of the files: one shard after another
    return Plan(sorted(low, key=lambda matrix: order[tensor_of(matrix)]), saved, left, transposed, notes)


def _check_nesting(saved: Iterable[str], modules_to_save: Sequence[str]) -> None:
    """Raises AnalysisError where PEFT would wrap a module inside another that it wraps, which it cannot load."""
    ends = tuple(modules_to_save)
    modules = {name[: at.start()] for name in saved for at in re.finditer(r"\.", name)}
    wrapped = sorted(module for module in modules if ends and module.endswith(ends))
    for outer in wrapped:
        if inner := next((module for module in wrapped if module.startswith(f"{outer}.")), None):
            raise AnalysisError(
                f"modules_to_save={','.join(modules_to_save)}: names both {outer} and {inner} inside it, which PEFT "
                "cannot load; name the inner modules alone",
                "modules_to_save",
            )


def tensor_of(matrix: Matrix) -> str:
    """The tensor of the model that an update is of."""
    assert isinstance(matrix.update, Whole)
    return matrix.update.factor.tensors[0]


def _head(name: str) -> str:
    """The module that PEFT would train in full: "classifier" for "classifier.dense.weight"."""
    path = name.split(".")[:-1]
    return next((part for part in path if is_head(f"{part}.weight")), path[-1])


def _is_transposed(name: str, file: TensorFile, settings: dict[str, Any]) -> bool:
    if not _CONV1D.fullmatch(name.removesuffix(".weight")):
        return False
    if kind := settings.get("model_type"):
        return kind in _WITH_CONV1D
    # Without a configuration: queries, keys and values side by side are the longer side's, which is that of outputs.
    wide = [shape for other, shape in file.shapes.items() if re.search(r"\.c_(attn|fc)\.weight$", other)]
    return bool(wide) and all(rows < cols for rows, cols in wide)


def settings_of(model: Adapter) -> dict[str, Any]:
    """The model's config.json; empty without one."""
    place = model.file.parent / "config.json"
    return read_json(place) if place.is_file() else {}


def config_of(settings: dict[str, Any], plan: Plan, options: Options) -> dict[str, Any]:
    """What adapter_config.json says of the model."""
    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    return {
        "base_model_name_or_path": os.fspath(options.base or "").removeprefix("hf://"),
        "task_type": task,
        "bias": "none",
        "fan_in_fan_out": bool(plan.transposed),
        "modules_to_save": sorted(set(plan.saved.values()), key=natural_key) or None,
    }
