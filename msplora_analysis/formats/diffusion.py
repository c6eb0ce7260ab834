"""Adapters in one file without adapter_config.json, as the tools around diffusion models write them.

sd-scripts (kohya), LyCORIS, OneTrainer and ComfyUI: ``lora_unet_<flattened>.lora_down.weight``, ``.lora_up.weight``,
``.lora_mid.weight`` (a Tucker core), ``.hada_*``, ``.lokr_*``, ``.diff``, each with ``.alpha``. diffusers, at several
ages: ``<name>.lora.down.weight``, ``<name>_lora.down.weight``, ``<name>.lora_linear_layer.down.weight``,
``<name>.lora_A.weight``. The last is PEFT's spelling too, as ai-toolkit and others write it without a config.
Control-LoRAs of ControlNets have ``<name>.down`` and ``.up`` (ComfyUI, comfy/controlnet.py), and whole tensors beside.

The scaling is alpha / r, alpha from ``.alpha`` or from the metadata that diffusers writes, else r: then it is 1, as
all their readers take it. LyCORIS saves alpha so that alpha / r is right with rsLoRA too, and saves its ``scalar``
multiplied into a factor.

The layer of a module is the first number of its path, as everywhere: in a U-Net the block (``down_blocks.1``), of
which several modules have one last name and one number, and are told apart by their names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats import loha, lokr
from msplora_analysis.formats.helpers.flattened import dotted
from msplora_analysis.formats.helpers.parts import Parts, add_part, layer_matrix, leading, required, trained_in_full
from msplora_analysis.formats.helpers.settings import by_pattern, number
from msplora_analysis.formats.helpers.structures import low_rank, not_plain_pairs, tucker, whole
from msplora_analysis.formats.names import PREFIX
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Shapes, Sum, Update, contents
from msplora_analysis.options import Options
from msplora_core.records import RecordError, check, parse

_METADATA = "lora_adapter_metadata"  # diffusers: the PEFT configs of a pipeline's models, as one JSON object
# In the order tried. A part is "down", "up" or "mid" of a LoRA, or what the key itself says.
_SPELLINGS = tuple(
    re.compile(rf"(?P<name>.+){spelling}")
    for spelling in (
        r"\.lora_(?P<part>down|up|mid)\.weight",
        r"\.lora_linear_layer\.(?P<part>down|up)\.weight",
        r"\.lora\.(?P<part>down|up)\.weight",
        r"_lora(?P<number>[0-9]*)\.(?P<part>down|up)\.weight",
        r"\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight",
        r"\.lora_embedding_(?P<part>[AB])(?:\.[^.]+)?",
        r"\.(?P<part>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff)",
    )
)
_WITH_ALPHA = re.compile(r"(?P<name>.+)\.lora_(?P<part>[AB])")  # loralib's spelling too, which has no alpha
_CONTROL = re.compile(r"(?P<name>.+)\.(?P<part>down|up)")
_IS_CONTROL = "lora_controlnet"
_BESIDE = re.compile(
    r"(?P<name>.+)\.(?P<part>alpha|scalar|dora_scale|lora_magnitude_vector|reshape_weight)(?:\.[^.]+)?(?:\.weight)?"
)
_EMBEDDINGS = "bundle_emb."  # textual inversions that stand beside a LoRA in one file
_VECTOR = re.compile(r".+\.(?:diff_b|w_norm|b_norm|lora_(?:B|up)\.bias|(?:query|key)_norm\.scale)")
# Updates that are the weights of the model times or through something, so that they need the model itself.
_UNSUPPORTED = {
    re.compile(r".+\.(?:oft_blocks|oft_diag)"): "OFT and BOFT rotate the weights of the model",
    re.compile(r".+\.on_input"): "(IA)³ multiplies the weights of the model",
    re.compile(r".+\.a1\.weight"): "GLoRA multiplies the weights of the model",
    re.compile(r".+\.lambda_layer"): "T-LoRA is relative to factors that it does not save",
}
_NAMES = {"A": "down", "B": "up"}


def _has_factors(names: Collection[str]) -> bool:
    spellings = _spellings(names)
    return any(_factor(name, spellings) or _unsupported(name, names) for name in names)


def _spellings(names: Collection[str]) -> tuple[re.Pattern[str], ...]:
    if _IS_CONTROL in names:
        return (_CONTROL,)
    with_alpha = any(name.endswith(".alpha") for name in names)
    return (*_SPELLINGS, _WITH_ALPHA) if with_alpha else _SPELLINGS


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, all of scale "layer"."""
    modules: dict[str, Parts] = {}
    beside: dict[str, Parts] = {}
    unknown, vectors, embeddings, whole_ones = [], [], [], []
    spellings = _spellings(file.shapes)
    for key, shape in file.shapes.items():
        if reason := _unsupported(key, file.shapes):
            raise AnalysisError(f"tensor {key}: {reason}, so the file does not hold the update; it is not supported")
        if key.startswith(_EMBEDDINGS):
            embeddings.append(key)
        elif _VECTOR.fullmatch(key) or (key.endswith(".diff") and len(shape) < 2):
            vectors.append(key)
        elif factor := _factor(key, spellings):
            add_part(modules, *factor, key)
        elif match := _BESIDE.fullmatch(key):
            add_part(beside, _path(match["name"]), match["part"], key)
        elif _IS_CONTROL in file.shapes:
            whole_ones += [key] if key != _IS_CONTROL else []
        elif not trained_in_full(key.removeprefix(PREFIX), config):
            unknown.append(key)

    configs = _metadata(file)
    matrices, unscaled, decomposed, widened = [], [], [], []
    for name, parts in modules.items():
        extra = beside.pop(name, {})
        r = _rank(parts, file.shapes)
        scaling = _read_number(file, extra["scalar"]) if "scalar" in extra else 1.0
        if r and "alpha" in extra:
            scaling *= _alpha(file, extra["alpha"]) / r
        elif configs and "diff" not in parts:
            scaling *= _from_metadata(configs, name, r, parts)
        elif r and _IS_CONTROL not in file.shapes:
            unscaled.append(name)
        if "dora_scale" in extra or "lora_magnitude_vector" in extra:
            decomposed.append(name)
        if "reshape_weight" in extra:
            widened.append(name)
        if _is_mora(parts, file):
            raise AnalysisError(
                f"tensors {parts['down']} and {parts['up']} are one square matrix, as MoRA's are: its update is no "
                "product of them; analyse the model that it is merged into, with base="
            )
        matrices.append(layer_matrix(name, _update(parts, file.shapes, scaling)))
    if unscaled and any(".base_layer." in key for key in file.shapes):
        raise AnalysisError(
            "a whole checkpoint of a model with PEFT's adapters in it, whose scale is not in the file; copy the "
            "adapter's adapter_config.json beside it"
        )
    unknown += [key for parts in beside.values() for key in parts.values()]
    notes = _notes(file, len(modules), unscaled, decomposed, vectors)
    if embeddings:
        notes.append(f"{len(embeddings)} tensors of bundled embeddings ({embeddings[0]}, ...) are left out")
    if whole_ones:
        notes.append(f"a Control-LoRA: {len(whole_ones)} tensors trained whole ({whole_ones[0]}, ...) are left out")
    if widened:
        notes.append(
            f"{widened[0]} is of another shape than the base's weight, to which readers add rows or columns of zeros"
        )
    return contents(matrices, unknown, notes)


# Names


def _factor(key: str, spellings: Iterable[re.Pattern[str]]) -> tuple[str, str] | None:
    """Which module a tensor adapts, and as what; None for any other tensor."""
    for spelling in spellings:
        if match := spelling.fullmatch(key):
            groups = match.groupdict(default="")
            part = groups["part"]
            return _path(groups["name"] + groups.get("number", "")), _NAMES.get(part, part)
    return None


def _path(name: str) -> str:
    # diffusers once kept factors in the attention's processor.
    return dotted(name.removeprefix(PREFIX)).replace(".processor.", ".")


def _unsupported(key: str, keys: Collection[str]) -> str | None:
    for pattern, reason in _UNSUPPORTED.items():
        if pattern.fullmatch(key) and (not key.endswith(".a1.weight") or key.replace(".a1.", ".b1.") in keys):
            return reason
    return None


# Updates


def _kind(parts: Parts) -> str:
    """What the parts of a module make: "lora", "hada", "lokr" or "diff"."""
    kinds = {"diff": "diff", "hada": "hada", "lokr": "lokr"}
    found = {kinds.get(part[:4], "lora"): key for part, key in parts.items()}
    if len(found) > 1:
        raise AnalysisError(f"tensors {' and '.join(found.values())} are of one module; save one adapter per file")
    return next(iter(found))


def _rank(parts: Parts, shapes: Shapes) -> int | None:
    """The r of alpha / r; None for what is not scaled by it."""
    kind = _kind(parts)
    if kind == "lora":
        return leading(shapes[required(parts, "down")[0]])
    return {"hada": loha.rank, "lokr": lokr.rank}[kind](parts, shapes) if kind != "diff" else None


def _update(parts: Parts, shapes: Shapes, scaling: float) -> Update:
    kind = _kind(parts)
    if kind == "hada":
        return loha.update(parts, shapes, scaling)
    if kind == "lokr":
        return lokr.update(parts, shapes, scaling)
    if kind == "diff":
        return whole(parts["diff"], shapes, scaling)
    down, up = required(parts, "down", "up")
    if "mid" in parts:
        product = tucker(parts["mid"], down, up, shapes, up_transposed=False)
    else:
        product = low_rank(down, up, shapes)
    return Sum((replace(product, scaling=scaling),))


def _is_mora(parts: Parts, file: TensorFile) -> bool:
    """Whether both factors are one square matrix, which MoRA uses between groups of inputs and outputs."""
    if "down" not in parts or "up" not in parts:
        return False
    shape = file.shapes[parts["down"]]
    square = len(shape) == 2 and shape[0] == shape[1] > 1 and shape == file.shapes[parts["up"]]
    return square and np.array_equal(file.read(parts["down"]), file.read(parts["up"]))


# Scaling


def _read_number(file: TensorFile, key: str) -> float:
    if math.prod(file.shapes[key]) != 1:
        raise AnalysisError(f"tensor {key} has shape {list(file.shapes[key])}; expected one number")
    value = float(np.asarray(file.read(key)).reshape(()))
    if not math.isfinite(value):
        raise AnalysisError(f"tensor {key} is {value}; expected a finite number")
    return value


def _alpha(file: TensorFile, key: str) -> float:
    value = _read_number(file, key)
    if value == 0:  # sd-scripts takes it as r, diffusers and ComfyUI as it stands
        raise AnalysisError(
            f"tensor {key} is 0, which kohya's scripts read as the rank, a scale of 1, and diffusers and ComfyUI as no "
            "update; write the alpha that is meant"
        )
    return value


def _metadata(file: TensorFile) -> dict[str, dict[str, Any]]:
    """The PEFT configs that diffusers writes, by the prefix of the model's names ("unet"); "" for a model alone."""
    text = file.metadata.get(_METADATA)
    if text is None:
        return {}
    try:
        entries = parse(text.encode(errors="surrogatepass"))
        check(entries, {})
    except RecordError as error:
        raise AnalysisError(f"metadata {_METADATA}: {error}; save the adapter again") from None
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        model, _, option = key.rpartition(".")
        configs.setdefault(model, {})[option] = value
    return configs


def _from_metadata(configs: Mapping[str, dict[str, Any]], name: str, rank: int | None, parts: Parts) -> float:
    """The scaling of a module by the config of its model."""
    model = name.split(".")[0]
    if model in configs:
        name = name.removeprefix(f"{model}.")
    config = configs.get(model, configs.get(""))
    if config is None:
        raise AnalysisError(f"metadata {_METADATA}: no config for {name}, it has {', '.join(configs)}")
    r = by_pattern(config, "rank_pattern", name, number(config, "r", rank))
    if r <= 0 or rank not in (None, r):
        raise AnalysisError(f"tensor {next(iter(parts.values()))} has rank {rank}, the file's metadata says {r:g}")
    alpha = number(config, "lora_alpha" if _kind(parts) == "lora" else "alpha", r)
    alpha = by_pattern(config, "alpha_pattern", name, alpha)
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _notes(
    file: TensorFile, modules: int, unscaled: Collection[str], decomposed: Collection[str], vectors: Iterable[str]
) -> list[str]:
    notes = []
    if unscaled:
        which = "the file holds no alpha" if len(unscaled) == modules else f"{len(unscaled)} modules have no alpha"
        unused = file.metadata.get("ss_network_alpha")
        also = f" (ss_network_alpha {unused!r} of its metadata is not applied)" if unused is not None else ""
        notes.append(f"{which}, so their scaling is taken as 1, as diffusers, kohya's scripts and ComfyUI do{also}")
    if _blocks_of_dylora(file.metadata) > 1:
        notes.append(
            "LyCORIS trained it as DyLoRA with block_size > 1 and, meanwhile, block_size times the scale: the spectra "
            "have the scale of those who read the file, alpha / r"
        )
    if decomposed:
        notes.append(
            f"{len(decomposed)} modules are DoRA's: the spectra are of the low-rank part, "
            "before the weights that it is added to are normalised"
        )
    if left_out := list(vectors):
        notes.append(f"{len(left_out)} tensors of biases and norms ({left_out[0]}, ...) are no matrices and left out")
    return notes


def _blocks_of_dylora(metadata: Mapping[str, str]) -> int:
    """The block_size of LyCORIS' DyLoRA; 1 for anything else."""
    with suppress(ValueError, TypeError, AttributeError):
        arguments = parse(metadata.get("ss_network_args", "{}").encode(errors="surrogatepass"))
        if arguments.get("algo") == "dylora":
            return int(arguments.get("block_size", 4))
    return 1


FORMAT = Format(
    name="files of kohya's scripts, LyCORIS and diffusers",
    read=read,
    lone=_has_factors,
    why_no_lora=lambda config, shapes, matrices: not_plain_pairs(matrices),
    tells=lambda name: name.endswith((".alpha", ".scalar")),
    reads_values=True,
)
