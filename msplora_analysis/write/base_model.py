"""What export must know of the model that an adapter is for: its configuration, and the paths of its modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, StrPath, open_binary, parse, read_json
from msplora_analysis.files.opening import FULL_NAMES, INDEX_SUFFIX, open_checkpoint

PIPELINE = re.compile(r"(unet|transformer(?:_2)?|text_encoder(?:_[23])?|prior)\.")  # models, as diffusers names them

_CONFIG, _PIPELINE_INDEX = "config.json", "model_index.json"
# Where a pipeline has a model of this class.
_CLASSES = {r"UNet\w*": "unet", r"\w*Transformer\w*Model": "transformer", r"CLIPTextModel": "text_encoder"}
# Paths that only one model of a pipeline has.
_FAMILIES = {
    r"(down_blocks|mid_block|up_blocks)\.": "unet",
    r"(single_)?transformer_blocks\.": "transformer",
    r"text_model\.encoder\.layers\.": "text_encoder",
}


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter is for.

    Attributes:
        place: Where it was read, for messages.
        config: Its config.json; empty for a pipeline, or where there is none.
        names: Paths of its modules with a weight, by the model of the pipeline ("unet"); "" for a model alone. Empty
            where only the configuration is there.
    """

    place: str
    config: Mapping[str, Any]
    names: Mapping[str, frozenset[str]]


def read_base(base: StrPath) -> BaseModel:
    """The model at ``base``: its folder, that of a pipeline, its weights, their index, config.json, or a list of names.

    Of weights the headers are read alone. A list is a text file with a path of a module or tensor a line.

    Raises:
        AnalysisError: there is no such thing.
    """
    place = parse(base)
    if place.is_dir() and (place / _PIPELINE_INDEX).is_file():
        parts = [key for key in read_json(place / _PIPELINE_INDEX) if PIPELINE.fullmatch(f"{key}.")]
        return BaseModel(str(base), {}, {part: _names(place / part) for part in parts if (place / part).is_dir()})
    if place.is_dir():
        config = read_json(place / _CONFIG) if (place / _CONFIG).is_file() else {}
        has_weights = any((place / name).is_file() for name in FULL_NAMES)
        names = _names(place) if has_weights or not config else frozenset()
    elif place.suffix == ".txt":
        with open_binary(place) as file:
            text = file.read().decode(errors="replace")
        config, names = {}, _modules(line.strip() for line in text.splitlines() if line.strip())
    elif place.suffix == ".json" and not place.name.endswith(INDEX_SUFFIX) and place.is_file():
        config, names = read_json(place), frozenset()
    else:
        beside = place.parent / _CONFIG
        config, names = read_json(beside) if beside.is_file() else {}, _names(place)
    return BaseModel(str(base), config, {_part(config): names} if names else {})


def placed(names: Iterable[str], base: BaseModel | None) -> dict[str, str]:
    """Each path with that of its model in the pipeline before it: "unet.down_blocks.0...".

    Raises:
        AnalysisError: neither the paths nor the base tell which model it is.
    """
    names = list(names)
    if all(map(PIPELINE.match, names)):
        return {name: name for name in names}
    known = base.names if base else {}
    parts = {part for part, of in known.items() if of.issuperset(names)}
    if known and not parts:
        nowhere = next((name for name in names if not any(name in of for of in known.values())), names[0])
        raise AnalysisError(
            f"{nowhere}: no model of base={base and base.place} has this module and all others; give its own", "base"
        )
    if base and base.config:
        parts.add(_part(base.config))
    parts.update(part for pattern, part in _FAMILIES.items() if any(re.match(pattern, name) for name in names))
    parts.discard("")
    if len(parts) != 1:
        where = "the folder of the pipeline or the model"
        if base and not parts:
            kind = ", ".join(classes_of(base.config)) or "a model of no class that is known"
            where = f"the folder of the pipeline in the place of base={base.place} ({kind})"
        raise AnalysisError(
            f"which model of a pipeline has the module {names[0]} is not known; give {where}"
            f"{'' if base else ' as base='}; for a language model alone there are to=peft, to=mlx and to=gguf",
            "base",
            "to",
        )
    (part,) = parts
    return {name: f"{part}.{name}" for name in names}


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """The classes that a config.json names, of transformers or diffusers."""
    named = config.get("architectures")
    return [str(one) for one in (config.get("_class_name"), *(named if isinstance(named, list) else ())) if one]


def _part(config: Mapping[str, Any]) -> str:
    kinds = classes_of(config)
    return next((part for kind in kinds for cls, part in _CLASSES.items() if re.fullmatch(cls, kind)), "")


def _names(place: Place) -> frozenset[str]:
    with open_checkpoint(place) as file:
        return _modules(file.shapes)


def _modules(tensors: Iterable[str]) -> frozenset[str]:
    return frozenset(name.removesuffix(".weight") for name in tensors if not name.endswith(".bias"))
