"""One adapter, as far as a plain LoRA can hold it: low-rank updates of modules, and what is saved beside them.

Refused is what a sum of products cannot express, or what the file does not tell; nothing is left
out silently.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from msplora_analysis.adapters.discovery import Adapter, discover
from msplora_analysis.adapters.opening import opened, unknown_text
from msplora_analysis.compute.linalg.spectra import Array, load_factors, not_finite
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, StrPath, parse
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats import find_format, trained_whole
from msplora_analysis.formats.helpers.parts import is_head, trained_in_full
from msplora_analysis.formats.names import PREFIX
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Contents, Matrix, Shapes, Sum
from msplora_analysis.options import Options
from msplora_analysis.write.base_model import PIPELINE, BaseModel
from msplora_analysis.write.names import Module, as_in_the_model

# What adapter_config.json says of the model and of what is trained in full; the rest is about the method.
_KEPT = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "modules_to_save"),
    *("fan_in_fan_out", "trainable_token_indices", "layer_replication", "lora_dropout"),
)
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT looks for a head of these in the file


@dataclass(frozen=True)
class Source:
    """An open adapter.

    Attributes:
        adapter: What discovery found.
        file: Its open file.
        matrices: All matrices of the tables.
        modules: What is adapted, in table order.
        copied: Tensors that are written as they are, by the name they are written under.
        config: What adapter_config.json says of the base model and of these.
        stored: The type of each tensor of a local safetensors file ("BF16"); empty for any other file, of which a
            bfloat16 tensor is known as float32 only, which holds it exactly.
        parameters: How many numbers the adapter has in the file, shared ones once.
        notes: What a user must know.
    """

    adapter: Adapter
    file: TensorFile
    matrices: list[Matrix]
    modules: list[Module]
    copied: dict[str, str]
    config: dict[str, Any]
    stored: dict[str, str]
    parameters: int
    notes: list[str]


def find_adapter(path: StrPath) -> Adapter:
    """The one adapter at a path; of a run folder the last checkpoint, which a warning names.

    Raises:
        AnalysisError: There is none, or there are those of several runs; the message names the newest.
    """
    place = parse(path)
    found = discover(path)
    here = [adapter for adapter in found if place in (adapter.file, adapter.file.parent)]
    if len(here or found) == 1:
        return (here or found)[0]
    from msplora_analysis.tables.checkpoints import newest  # pandas is slow to import

    last = newest(found)
    file = last[-1].file
    folder = file.parent if file.name.startswith("adapter_model.") else file
    if len(last) == 1:
        warnings.warn(f"{path}: {len(found)} checkpoints, of which the last is taken: {folder}", stacklevel=2)
        return last[0]
    raise AnalysisError(f"{path}: {len(found)} adapters of {len(last)} runs; give one of them, such as {folder}")


@contextmanager
def open_source(
    adapter: Adapter, options: Options, base: BaseModel | None = None, *, pipeline: bool = False
) -> Iterator[Source]:
    """An open adapter.

    Args:
        adapter: What discovery found.
        options: How it is to be read.
        base: The model that it is for, where the names of the modules are not in the file.
        pipeline: Keep updates of several models, whose names stand before those of their modules.

    Raises:
        AnalysisError: It has no exact form as a plain LoRA; the message names the file.
    """
    with opened(adapter, options) as (file, contents):
        try:
            source = _source(adapter, file, contents, base, pipeline)
        except AnalysisError as error:
            raise AnalysisError(f"{adapter.file}: {error}", *error.arguments) from None
        yield source


def factors(source: Source, module: Module) -> tuple[Array, Array]:
    """A and B of a module's update, the scaling in B.

    Returns:
        (rank, cols) and (rows, rank), float64, in memory that the next call uses again.

    Raises:
        AnalysisError: A tensor holds NaN or Inf.
    """
    a, b, scaling = load_factors(source.file, [module.update])
    b *= scaling[0]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise not_finite(source.file, module.update, module.name)
    return a[0], b[0] if module.rows is None else b[0][module.rows]


def warn_of(source: Source) -> None:
    """A warning for each of the notes."""
    for note in source.notes:
        warnings.warn(f"{source.adapter.file}: {note}", stacklevel=4)


def _source(adapter: Adapter, file: TensorFile, contents: Contents, base: BaseModel | None, pipeline: bool) -> Source:
    config, known = adapter.config, find_format(adapter.config, file)
    matrices = _whole_updates(contents)
    if reason := known.not_as_lora(config, file.shapes, matrices):
        raise AnalysisError(reason)
    modules = [_module(matrix, file.shapes) for matrix in matrices]
    copied_note = trained_whole(config, file, contents)  # they are left out of tables, and not here
    notes = [note for note in contents.notes if note != copied_note]
    modules = list(as_in_the_model(modules, known, base, notes))
    if not config and not pipeline:
        modules = _of_one_model(modules, notes)
    factors = {tensor for matrix in contents.matrices for tensor in _tensors(matrix)}
    copied = _copied(file.shapes, config, known, factors.union(contents.unknown))
    if contents.unknown:
        notes.append(f"{unknown_text(contents.unknown)} are left out")
    if config.get("task_type") in _WITH_HEAD and not any(map(is_head, copied)):
        notes.append(
            f"task_type is {config['task_type']}, but no head is saved with the adapter: PEFT will miss it; "
            "set task_type to null in adapter_config.json to use the base model's own"
        )
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    bias = str(config.get("bias") or "none")
    kept["bias"] = "lora_only" if bias.endswith("_only") else bias
    parameters = sum(math.prod(file.shapes[tensor]) for tensor in factors)
    stored = _stored_dtypes(adapter.file)
    return Source(adapter, file, contents.matrices, modules, copied, kept, stored, parameters, notes)


# Modules


def _whole_updates(contents: Contents) -> list[Matrix]:
    """The whole update of every module: its "total" where it has several scales, else its one matrix."""
    whole = {m.name: m for scale in ("layer", "total") for m in contents.matrices if m.scale == scale}
    if not whole:
        raise AnalysisError("it has no layer scale, and which modules the shared scales adapt is not in the file")
    return list(whole.values())


def _module(matrix: Matrix, shapes: Shapes) -> Module:
    update, name = matrix.update, matrix.name
    if not isinstance(update, Sum):
        raise AnalysisError(f"{name}: its update is no sum of low-rank products, so that no plain LoRA equals it")
    a = update.products[0].a
    alone = len(update.products) == 1 and a.make is None  # then A is a tensor, and has the axes of the module's weight
    inputs = shapes[a.tensors[0]][1:] if alone else (update.cols,)
    return Module(name, matrix, update, inputs, ".lora_embedding_A" in a.tensors[0])


def _of_one_model(modules: list[Module], notes: list[str]) -> list[Module]:
    """Names without that of the model, which diffusers puts before them; PEFT's adapters are of one model."""
    matches = [PIPELINE.match(module.name) for module in modules]
    models = sorted({match[1] if match else "" for match in matches})
    if models == [""]:
        return modules
    if len(models) > 1:
        raise AnalysisError(
            f"it has updates of several models ({', '.join(model or 'one without a name' for model in models)}); "
            "a PEFT adapter is of one: split the file first"
        )
    notes.append(f"the adapter is for the pipeline's {models[0]}; load it into that model")
    return [replace(module, name=module.name.removeprefix(f"{models[0]}.")) for module in modules]


def _stored_dtypes(path: Place) -> dict[str, str]:
    if not isinstance(path, Path) or path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def _tensors(matrix: Matrix) -> Iterator[str]:
    assert isinstance(matrix.update, Sum)
    for product in matrix.update.products:
        yield from (*product.a.tensors, *product.b.tensors)


# What is beside the factors


def _copied(shapes: Shapes, config: dict[str, Any], known: Format, done: set[str]) -> dict[str, str]:
    """Tensors beside the factors, by the name that PEFT gives them now. Raises AnalysisError for what would be lost."""
    copied = {}
    for key, shape in shapes.items():
        name = key.removeprefix(PREFIX)
        if key in done or 0 in shape:  # AdaLoRA's pruned modules are empty
            continue
        if trained_in_full(name, config):
            # PEFT once kept the untouched original beside the copy that is trained.
            if ".original_module." not in name:
                copied[PREFIX + re.sub(r"\.modules_to_save(\.default)?\.", ".", name)] = key
        elif not known.tells(name):
            raise AnalysisError(f"tensor {key} is no factor of a sum of products, and would be lost in a plain LoRA")
    return copied
