"""What an adapter is, as far as its readers mind: layout, ranks, scales as trained, what stands beside the factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Any

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.adapters.opening import opened
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.opening import open_checkpoint
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats import find_format, read_contents
from msplora_analysis.formats.helpers.parts import is_of_the_base, pair_factors
from msplora_analysis.formats.helpers.settings import by_pattern, count, needed_count, needed_number
from msplora_analysis.formats.lora import FACTOR, magnitude_vectors
from msplora_analysis.formats.updates import Shape, Sum
from msplora_analysis.options import Options

LAYOUTS = {
    "peft": "a folder of PEFT",
    "diffusers": "a file of diffusers",
    "kohya": "a file of kohya's scripts",
    "mlx": "a folder of MLX-LM",
    "gguf": "a GGUF file of llama.cpp",
    "other": "of another program",
}


@dataclass(frozen=True)
class Module:
    """An adapted module.

    Attributes:
        name: As the tables have it.
        a: The tensor of its A, or the first of several.
        b: The tensor of its B.
        rank: As saved.
        declared: As adapter_config.json says; the saved one elsewhere.
        scale: The factor of B A that it was trained with; None where its update is no plain B A.
    """

    name: str
    a: str
    b: str
    rank: int
    declared: int
    scale: float | None


@dataclass(frozen=True)
class Facts:
    """What an adapter is.

    Attributes:
        place: Its folder or file, as a shell takes it in a command.
        layout: A key of LAYOUTS.
        method: peft_type, or "LORA" of other layouts.
        config: adapter_config.json; empty where there is none.
        shapes: Of all tensors.
        metadata: Of the file.
        modules: What is adapted.
        rest: Tensors that are trained and no factors: heads, biases, magnitudes.
        unknown: Those of them that the configuration does not explain.
        inexact: Why no plain LoRA equals it; empty where one does.
        zero: Modules whose update is zero.
        wide: Whether factors are float64.
    """

    place: str
    layout: str
    method: str
    config: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]
    modules: list[Module]
    rest: list[str]
    unknown: list[str]
    inexact: str
    zero: list[str]
    wide: bool

    @property
    def split_off(self) -> str | None:
        """Of an adapter that started from B A split off the base model, how: PiSSA and others."""
        init = self.config.get("init_lora_weights")
        return init.lower() if isinstance(init, str) and init.lower().startswith(_SPLIT_OFF) else None

    @property
    def ranks(self) -> list[int]:
        """All ranks, each once."""
        return sorted({module.rank for module in self.modules})

    @property
    def experts(self) -> list[str]:
        """Modules of a mixture's experts."""
        return [module.name for module in self.modules if "experts" in module.name.split(".")]

    @property
    def embeddings(self) -> list[str]:
        """Embeddings that are adapted."""
        return [module.name for module in self.modules if ".lora_embedding_" in module.a]

    @property
    def has_alpha(self) -> bool:
        """Whether a file without adapter_config.json says its alpha."""
        return _METADATA in self.metadata or any(name.endswith(".alpha") for name in self.shapes)


_SPLIT_OFF = ("pissa", "corda", "olora", "lora_ga", "loftq")
_METADATA = "lora_adapter_metadata"  # of diffusers


def facts_of(adapter: Adapter, options: Options, place: str | None = None) -> Facts:
    """The facts of an adapter; ``place``: what commands call it, its path where it is None.

    Raises:
        AnalysisError: it cannot be read; the message names the file.
    """
    method = str(adapter.config.get("peft_type") or "LORA")
    if adapter.config.get("peft_type") == "LORA":
        with open_checkpoint(adapter.file) as file:
            try:
                modules, unknown = _of_peft(adapter.config, file)
                inexact = _why_inexact(adapter.config, file, options)
                return _facts(adapter, place, file, "peft", method, modules, unknown, inexact)
            except AnalysisError as error:
                raise AnalysisError(f"{adapter.file}: {error}") from None
    with opened(adapter, options, base_notes=False) as (file, contents):
        modules = []
        for matrix in contents.matrices:
            if isinstance(matrix.update, Sum):
                product = matrix.update.products[0]
                plain = len(matrix.update.products) == 1
                a, b = product.a.tensors[0], product.b.tensors[0]
                modules.append(
                    Module(matrix.name, a, b, product.rank, product.rank, product.scaling if plain else None)
                )
        inexact = _why_inexact(adapter.config, file, options)
        return _facts(adapter, place, file, _layout(adapter, file), method, modules, contents.unknown, inexact)


def _of_peft(config: Mapping[str, Any], file: TensorFile) -> tuple[list[Module], list[str]]:
    """The modules of PEFT's LoRA, whose declared ranks may be wrong: that is a finding, and no error; and the rest."""
    pairs, unknown = pair_factors(file.shapes, config, FACTOR)
    magnitudes = set(magnitude_vectors(unknown).values()) if config.get("use_dora") else set()
    r, alpha, modules = needed_count(config, "r"), needed_number(config, "lora_alpha"), []
    for (unit, _), (a, b) in pairs.items():
        name = unit.replace(".base_layer.", ".")
        declared = count(by_pattern(config, "rank_pattern", name, r), f"rank_pattern of {name}")
        scale = by_pattern(config, "alpha_pattern", name, alpha)
        scale /= math.sqrt(declared) if config.get("use_rslora") else declared
        if len(file.shapes[a]) < 2 or 0 in file.shapes[a]:
            raise AnalysisError(f"tensor {a} has shape {list(file.shapes[a])}; expected a matrix that is not empty")
        rank = file.shapes[a][0]
        if config.get("target_parameters") and rank % declared == 0:
            rank = declared  # the factors of all experts, one after another
        modules.append(Module(name, a, b, rank, declared, scale))
    return modules, [name for name in unknown if name not in magnitudes]


def _facts(
    adapter: Adapter,
    place: str | None,
    file: TensorFile,
    layout: str,
    method: str,
    modules: list[Module],
    unknown: list[str],
    inexact: str,
) -> Facts:
    factors = {tensor for module in modules for tensor in (module.a, module.b)}
    zero, wide = [], False
    for module in modules:
        values = file.read(module.b)
        wide |= values.dtype.itemsize == 8
        if module.scale == 0 or not values.any():
            zero.append(module.name)
    return Facts(
        place=quote(place or str(adapter.file.parent if layout in ("peft", "mlx") else adapter.file)),
        layout=layout,
        method=method,
        config=adapter.config,
        shapes=file.shapes,
        metadata=file.metadata,
        modules=modules,
        rest=[name for name in file.shapes if name not in factors and not _is_no_weight(name)],
        unknown=unknown,
        inexact=inexact,
        zero=zero,
        wide=wide,
    )


def _why_inexact(config: Mapping[str, Any], file: TensorFile, options: Options) -> str:
    """Why `export` refuses an adapter, whatever it is to write."""
    try:
        matrices = read_contents(config, file, options).matrices
        whole = [matrix for matrix in matrices if matrix.scale in ("layer", "total")]
        if reason := find_format(config, file).not_as_lora(config, file.shapes, whole):
            return reason
    except AnalysisError as error:
        return str(error)
    return "" if all(isinstance(matrix.update, Sum) for matrix in whole) else "its updates are no sums of products"


def _layout(adapter: Adapter, file: TensorFile) -> str:
    if adapter.config.get("peft_type"):
        return "peft"
    known = find_format(adapter.config, file).name
    if known in ("MLX-LM", "GGUF"):
        return {"MLX-LM": "mlx", "GGUF": "gguf"}[known]
    if any(name.startswith(("lora_unet_", "lora_te", "lycoris_")) for name in file.shapes):
        return "kohya"
    return "diffusers" if "diffusers" in known else "other"


def _is_no_weight(name: str) -> bool:
    return is_of_the_base(name) or name.endswith((".alpha", ".scalar"))


def without(names: list[str], *parts: str) -> Iterator[str]:
    """Names that have none of the parts in them."""
    return (name for name in names if not any(part in name for part in parts))
