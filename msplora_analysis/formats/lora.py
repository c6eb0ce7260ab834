"""LoRA as PEFT saves it: ``<name>.lora_A.weight`` (r, in) and ``<name>.lora_B.weight`` (out, r).

The update is alpha / r * B A (Hu et al. 2021, arXiv 2106.09685), with rsLoRA alpha / sqrt(r)
(Kalajdzievski 2023, arXiv 2312.03732). Keys may carry the adapter's name
(``lora_A.default.weight``). Embeddings and convolutions, variants of the update, and variants of
its initial value are read too; ``_NOTES`` and ``_REFUSED`` name those that need a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.base import base_factor, needed_base
from msplora_analysis.formats.helpers.parts import dora_note, layer_matrix, make_product, pair_factors
from msplora_analysis.formats.helpers.settings import by_pattern, check_rank, count, needed_count, needed_number, table
from msplora_analysis.formats.helpers.structures import block_diagonal, expert_matrices, joined, rows_scaled
from msplora_analysis.formats.names import PREFIX, module_of, stack_and_layer
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import (
    Config,
    Contents,
    Factor,
    Matrix,
    Product,
    Shape,
    Shapes,
    Sum,
    Whole,
    contents,
)
from msplora_analysis.options import Options

Floats = NDArray[np.float64]

# Factors of an embedding are parameters, all others are modules with a weight.
FACTOR = r"(?P<name>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.[^.]+)?(?(embedding)|\.weight)"
# Tensors that act in training only: the sampler of MonteCLoRA, the projection of VeLoRA.
_TRAINING_ONLY = {
    "monteclora_config": r"(?P<name>.+)\.lora_monteclora_sampler\..+",
    "velora_config": r"(?P<name>.+)\.lora_velora_embed(?:\..+)?",
}
_MAGNITUDE = r"(?P<name>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?"
# All experts of a layer in one tensor, as Tinker and SGLang have it: A (experts, r, in), or one that all share.
_EXPERTS = re.compile(r"\.experts\.w[123]$")
_FUSED = "gate_up_proj"
_FUSED_NOTE = (
    f"target_parameters: {_FUSED} holds the gate and the up projection of an expert in one tensor: a spectrum is of "
    "both together. PEFT makes such an adapter, of twice the rank, of one whose experts had them apart, when "
    "transformers 5 loads it: its ranks and spectra then are not those of the adapter before"
)
_DIAGONAL = r"(?P<name>.+)\.lora_diag(?:\.[^.]+)?"

_REFUSED = {
    "use_qalora": "QA-LoRA: which modules pool their input before A, those of GPTQ, is not in the file",
    "use_mora": "MoRA's update is one square matrix between groups of inputs and outputs, not B A",
    "arrow_config": "Arrow mixes other adapters token by token, and has no update of its own: analyse those adapters",
}
_NOTES = {
    "use_dora": dora_note("scaling"),
    "kasa_config": "KaSA (arXiv 2412.06071): the spectra are of the update to a base weight whose r smallest singular "
    "values were set to zero before training",
    "alora_invocation_tokens": "activated LoRA (arXiv 2504.12397): the update acts only from the invocation tokens on",
}
_TRUE_CHANGE = (
    "DoRA (arXiv 2402.09353): with the base, the spectra are of the whole change of a weight, "
    "m (W + scaling * B A) / |W + scaling * B A| - W with the norms of rows"
)
# What no plain LoRA can do.
_NOT_PLAIN = {
    "use_dora": "DoRA rescales the whole weight after adding B A, which no plain LoRA can do; PEFT loads it as it is",
    "kasa_config": "KaSA's update is to a base weight without its smallest singular values",
    "alora_invocation_tokens": "an activated LoRA acts only from its invocation tokens on",
    "lora_bias": "its update has a bias, which is no product",
    "target_parameters": "it adapts single parameters, whose place a plain LoRA cannot name",
}
# Values of init_lora_weights that begin with these start from B A split off the base weight.
_SPLIT_OFF = ("pissa", "corda", "olora", "lora_ga", "loftq")


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module or expert, all of scale "layer"."""
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise AnalysisError(f"adapter_config.json: {key}: {reason}")
    settings = _settings(config)
    found, unknown = pair_factors(file.shapes, config, FACTOR)
    pairs = {name: pair for (name, _), pair in found.items()}
    magnitudes = magnitude_vectors(unknown)
    known = {key for name, key in magnitudes.items() if name in pairs}
    for option, pattern in _TRAINING_ONLY.items():
        if config.get(option):
            known |= {key for key in unknown if (name := _module(pattern, key)) in pairs}
    diagonals: dict[str | None, str] = {}
    if config.get("kasa_config"):
        diagonals = {name: key for key in unknown if (name := _module(_DIAGONAL, key)) in pairs}
        known |= set(diagonals.values())

    bases: dict[str, str] = {}
    if file.base is not None and config.get("use_dora"):
        bases = needed_base(file, [name for name in magnitudes if name in pairs], "DoRA")

    matrices: list[Matrix] = []
    for name, (a, b) in pairs.items():
        if config.get("kasa_config") and name not in diagonals:
            raise AnalysisError(f"tensor {a} has no lora_diag of KaSA beside it; save the adapter again")
        found_here = _matrices(name, a, b, diagonals.get(name), settings, file.shapes)
        if base := bases.get(name):
            turned = bool(config.get("fan_in_fan_out")) or "lora_embedding_" in a
            found_here = (_true_change(one, file, base, magnitudes[name], turned) for one in found_here)
        matrices += found_here
    notes = list(_notes(config, any(key in known for key in magnitudes.values()), bool(bases)))
    if any(parameter.rpartition(".")[2] == _FUSED for parameter in settings.parameters):
        notes.append(_FUSED_NOTE)
    if nested := next((unit for unit in pairs if unit.endswith(".base_layer")), None):
        notes.append(
            f"several parameters of {_bare(nested)} are adapted, and PEFT does not save which is which: "
            "the one it adapted first has most .base_layer in its name"
        )
    return contents(matrices, (key for key in unknown if key not in known), notes)


def magnitude_vectors(names: Iterable[str]) -> dict[str, str]:
    """The magnitude vector of DoRA of each module, where there is one, among tensor names."""
    return {module: key for key in names if (module := _module(_MAGNITUDE, key)) is not None}


def _module(pattern: str, key: str) -> str | None:
    match = re.fullmatch(pattern, key.removeprefix(PREFIX))
    return match["name"] if match else None


class _Settings(NamedTuple):
    """What adapter_config.json says of ranks, scales and shapes, checked."""

    config: Config
    rank: int
    alpha: float
    parameters: tuple[str, ...]  # of target_parameters

    def rank_and_alpha(self, a: str, names: Iterable[str]) -> tuple[int, float]:
        """Those of the pair with factor ``a``, which adapts one of ``names``: it must not matter which."""
        (first, *others) = {
            (
                int(by_pattern(self.config, "rank_pattern", name, self.rank)),
                by_pattern(self.config, "alpha_pattern", name, self.alpha),
            )
            for name in names
        }
        if others:
            raise AnalysisError(
                f"tensor {a} adapts {' or '.join(names)}, for which rank_pattern or alpha_pattern differ; "
                "the file does not say which it is"
            )
        return first


def _settings(config: Config) -> _Settings:
    if not isinstance(config.get("use_rslora", False), bool):
        raise AnalysisError(f"adapter_config.json: use_rslora must be true or false, got {config['use_rslora']!r}")
    ranks = table(config, "rank_pattern")
    for name, rank in ranks.items():
        count(rank, f"rank_pattern {name}")
    parameters = config.get("target_parameters") or ()
    if not isinstance(parameters, (list, tuple)) or not all(isinstance(one, str) for one in parameters):
        raise AnalysisError(f"adapter_config.json: target_parameters must be a list of names, got {parameters!r}")
    return _Settings(
        config,
        needed_count(config, "r"),
        needed_number(config, "lora_alpha"),
        tuple(sorted(set(parameters))),
    )


def _notes(config: Config, has_magnitudes: bool, has_base: bool) -> Iterator[str]:
    for key, note in _NOTES.items():
        if config.get(key) or (key == "use_dora" and has_magnitudes):
            yield _TRUE_CHANGE if key == "use_dora" and has_base else note
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_SPLIT_OFF):
        quantised = init.lower() == "loftq"
        yield (
            f"init_lora_weights is {init!r}: training started from a B A that is not zero and a base weight "
            + ("quantised to go with it" if quantised else "that lacks it")
            + "; the spectra are of the whole B A, not of what training changed"
            + ("" if quantised else " (PEFT's path_initial_model_for_weight_conversion saves that)")
        )


def _matrices(unit: str, a: str, b: str, diagonal: str | None, settings: _Settings, shapes: Shapes) -> Iterator[Matrix]:
    """The matrices of one pair of factors: one, or one per expert.

    ``unit`` is the path before ".lora_A". PEFT puts a base_layer into it for the output projection
    of nn.MultiheadAttention, and for every but the last of the adapted parameters of one module.
    """
    if _EXPERTS.search(unit) and len(shapes[a]) == len(shapes[b]) == 3:
        rank, alpha = settings.rank_and_alpha(a, [unit])
        check_rank(a, shapes[a][1], rank)
        scaling = alpha / (math.sqrt(rank) if settings.config.get("use_rslora") else rank)
        yield from expert_matrices(unit, a, b, scaling, shapes)
        return
    parameters = _parameters(unit, shapes[a], settings)
    rank, alpha = settings.rank_and_alpha(a, parameters or [_bare(unit)])
    name = unit.replace(".base_layer.", ".")
    if parameters:
        name = unit if len(parameters) > 1 else parameters[0].removesuffix(".weight")
    experts = shapes[a][0] // rank if parameters and len(shapes[a]) == 2 and shapes[a][0] % rank == 0 else 1
    if experts == 1 or shapes[a][:1] != shapes[b][1:]:
        yield layer_matrix(name, Sum((_product(a, b, diagonal, _bare(unit), rank, alpha, settings.config, shapes),)))
        return
    # A (experts * r, in) has the experts one after another, B (out, r * experts) has them interleaved.
    alike = {a: (rank, shapes[a][1]), b: (shapes[b][0], rank)}
    one = make_product(a, b, alike, alpha, settings.config)
    for expert in range(experts):
        rows = slice(expert * rank, (expert + 1) * rank)
        cols = (slice(None), slice(expert, None, experts))
        product = replace(
            one,
            a=replace(one.a, make=partial(_part, index=rows)),
            b=replace(one.b, make=partial(_part, index=cols)),
        )
        yield Matrix("layer", stack_and_layer(unit)[1], module_of(name), f"{name}.{expert}", Sum((product,)))


def _true_change(matrix: Matrix, file: TensorFile, base: str, magnitude: str, turned: bool) -> Matrix:
    """The change of the base's weight by DoRA, in place of its low-rank part."""
    assert isinstance(matrix.update, Sum)
    (product,) = matrix.update.products
    rows, cols = product.rows, product.cols
    if math.prod(file.shapes[magnitude]) != rows:
        raise AnalysisError(f"tensor {magnitude} has shape {list(file.shapes[magnitude])}; expected {rows} magnitudes")
    weight = base_factor(file, base, rows, cols, transposed=turned)
    factors = (product.a, product.b, weight, Factor((magnitude,), rows, 1))
    return replace(matrix, update=Whole(joined(factors, rows, cols, partial(_rescaled, scaling=product.scaling))))


def _rescaled(a: Floats, b: Floats, weight: Floats, magnitude: Floats, scaling: float) -> Floats:
    """m V / |V| - W for V = W + scaling * B A: PEFT's merged weight less the base's. A row of zeros stays."""
    changed: Floats = b @ a
    changed *= scaling
    changed += weight
    norms = np.linalg.norm(changed, axis=1, keepdims=True)
    changed *= magnitude / np.where(norms > 0, norms, 1)
    changed -= weight
    return changed


def _part(values: NDArray[Any], index: Any) -> NDArray[np.float64]:
    return np.array(values[index], dtype=np.float64)


def _bare(unit: str) -> str:
    """The module that PEFT looks up in rank_pattern and alpha_pattern."""
    return unit.split(".base_layer")[0]


def _parameters(unit: str, shape: Shape, settings: _Settings) -> list[str]:
    """Full names of the target_parameters that ``unit``, with A of ``shape``, can be."""
    module = _bare(unit)
    paths = [target.rpartition(".") for target in settings.parameters]
    found = [f"{module}.{name}" for path, _, name in paths if path and f".{module}".endswith(f".{path}")]
    plain, _ = settings.rank_and_alpha(unit, [module])
    if found or (shape[:1] == (plain,) and not unit.endswith(".base_layer")):
        return found
    return [f"{module}.{name}" for path, _, name in paths if not path]  # named without a module


def _product(
    a: str, b: str, diagonal: str | None, module: str, rank: int, alpha: float, config: Config, shapes: Shapes
) -> Product:
    """scaling * B A, or scaling * B diag(d) A with the ``diagonal`` d of KaSA."""
    shape_a, shape_b = shapes[a], shapes[b]
    full = {a: shape_a, b: shape_b}  # as they multiply
    blocks_a, blocks_b = _blocks(module, config)
    if len(shape_b) > 2 and 0 < shape_b[1] < rank == shape_a[0]:  # convolution in groups
        blocks_b = rank // shape_b[1]
    if len(shape_a) >= 2:
        full[a] = (shape_a[0], math.prod(shape_a[1:]) * blocks_a)
    if len(shape_b) >= 2:
        full[b] = (shape_b[0], shape_b[1] * blocks_b, *shape_b[2:])
    if (full[a][:1] and full[a][0] % blocks_a) or (full[b][:1] and full[b][0] % blocks_b):
        raise AnalysisError(
            f"tensors {a} and {b} of shapes {list(shape_a)} and {list(shape_b)} cannot be cut into "
            f"{max(blocks_a, blocks_b)} blocks; is it the config of another adapter?"
        )
    product = make_product(a, b, full, alpha, config)
    check_rank(a, product.rank, rank)
    if blocks_a > 1:
        product = replace(product, a=replace(product.a, make=partial(block_diagonal, blocks=blocks_a)))
    if blocks_b > 1:
        product = replace(product, b=replace(product.b, make=partial(block_diagonal, blocks=blocks_b)))
    if diagonal is not None:
        if math.prod(shapes[diagonal]) != rank:
            raise AnalysisError(f"tensor {diagonal} has shape {list(shapes[diagonal])}; expected [{rank}]")
        product = replace(product, a=Factor((a, diagonal), rank, product.cols, rows_scaled))
    return product


def _blocks(module: str, config: Config) -> tuple[int, int]:
    """BD-LoRA: of how many diagonal blocks A and B of a module are."""
    options = config.get("use_bdlora")
    if not options:
        return 1, 1
    if not isinstance(options, dict):
        raise AnalysisError(f"adapter_config.json: use_bdlora must be an object, got {options!r}")
    blocks = needed_count(options, "nblocks")
    a, b = (any(part in module for part in options.get(f"target_modules_bd_{factor}") or ()) for factor in ("a", "b"))
    return (blocks if a else 1), (blocks if b else 1)


def _why_no_lora(config: Config, shapes: Shapes, matrices: Iterable[Matrix]) -> str | None:
    for key, reason in _NOT_PLAIN.items():
        if config.get(key):
            return f"adapter_config.json: {key}: {reason}; for other readers merge it with merge_and_unload"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_SPLIT_OFF):
        return (
            f"adapter_config.json: init_lora_weights is {init!r}: B A is relative to a changed base weight; load it in "
            "PEFT and save it with path_initial_model_for_weight_conversion, then use that"
        )
    for matrix in matrices:
        assert isinstance(matrix.update, Sum)
        (product,) = matrix.update.products
        a, b = product.a.tensors[0], product.b.tensors[0]
        if not a.removeprefix(PREFIX).startswith(f"{matrix.name}.lora_"):
            return f"tensor {a}: its module is inside another, where a plain LoRA cannot reach it"
        if max(len(shapes[a]), len(shapes[b])) > 2 and (product.a.make or product.b.make):
            return f"tensor {a}: the update of a convolution in groups is not written; leave it as it is"
    return None


FORMAT = Format(
    name="LoRA",
    read=read,
    peft_types=("LORA",),
    why_no_lora=_why_no_lora,
    takes_base=lambda config: bool(config.get("use_dora")),
)
