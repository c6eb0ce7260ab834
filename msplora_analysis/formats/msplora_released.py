"""Checkpoints of the MSPLoRA code released with the paper (a fork of PEFT 0.5.0), ``"peft_type": "MSPLORA"``.

The config has lists ``r`` and ``lora_alpha``; keys are ``<name>.lora_A_<i>.weight`` (r_i, in), ``lora_B_<i>.weight``
(out, r_i), also spelt ``lora_A.default_<i>.weight``. Of n scales the first (0) is global and the last is the layer's;
all between share by the same three groups of layers, so that their sum is one update, called mid here. That code
- sorts the ranks in descending order and not the alphas: scale i is scaled by alpha_i / (i-th largest rank), in
  training as in use; this is what B was learned under, and what is given here;
- saves a shared pair under every layer that refers to it. What is shared is recognised by equal values; the first
  layer with a pair is its owner;
- starts mid group g at layer ceil(g n/3) for n layers, but lets its other layers refer to the pair of layer
  floor(g n/3), so where 3 does not divide n only the owner has its group's pair, the others have group 0's;
- applies a shared pair only in the layer that owns it (and merges nothing).

Semantics "paper": a mid pair belongs to all layers from its owner to the next, the paper's groups, and the total of a
module is its group's pairs and its own. "as-executed": the total is its own pair and those shared ones that it owns,
what that code's forward adds. The matrices of the single scales are the same in both.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import natural_key
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import layer_matrix, make_product, pair_factors
from msplora_analysis.formats.helpers.settings import check_rank
from msplora_analysis.formats.names import module_of, stack_and_layer
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Matrix, Product, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?_(?P<scale>0|[1-9][0-9]{0,2})\.weight"

_NOTES = {
    "paper": "written by the released MSPLoRA code, where a shared part acts only in the first layer of its group; "
    "totals are the paper's sharing (semantics as-executed: what that code computed)",
    "as-executed": "totals are what the released MSPLoRA code computed: shared parts act in their owner alone",
}


def _recognises(config: Config, file: TensorFile) -> bool:
    return config.get("peft_type") == "MSPLORA" and (
        isinstance(config.get("r"), list) or any(re.fullmatch(_FACTOR, name) for name in file.shapes)
    )


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """Matrices of every scale, and "total" where there is more than one."""
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    scales = _scales(config)
    between = {"global": range(1), "mid": range(1, len(scales) - 1)}  # the numbers of the shared scales
    modules: dict[str, dict[int, Product]] = {}
    for (name, scale), (a, b) in pairs.items():
        modules.setdefault(name, {})[int(scale)] = _product(a, b, int(scale), file, scales)

    pyramids: dict[str, list[str]] = {}
    for name in sorted(modules, key=natural_key):
        pyramids.setdefault(_pyramid_of(name), []).append(name)
    matrices: list[Matrix] = []
    paper, misplaced, last = options.semantics == "paper", 0, len(scales) - 1
    for names in pyramids.values():
        acting: dict[str, list[Product]] = {name: [] for name in names}
        for scale, numbers in between.items():
            products, stored = _shared({name: modules[name] for name in names}, scale, numbers, file)
            for group, (name, owned) in enumerate(products.items()):
                matrices.append(Matrix(scale, group, module_of(name), name, Sum(tuple(owned))))
            owner = None  # by the paper, the last one that is not after a module
            for name in names:
                owner = name if name in products else owner
                if owner is not None and (paper or owner == name):
                    acting[name] += products[owner]
                    misplaced += paper and owner != stored.get(name, owner)
        for name in names if last else ():
            if last in modules[name]:
                acting[name].append(modules[name][last])
                matrices.append(layer_matrix(name, Sum((modules[name][last],))))
            if acting[name]:
                whole = Sum(tuple(acting[name]))
                matrices.append(Matrix("total", stack_and_layer(name)[1], module_of(name), name, whole))
    return contents(matrices, unknown, _notes(scales, misplaced, options))


def _scales(config: Config) -> list[tuple[int, float]]:
    """(rank, alpha) of every scale, as that code pairs them: ranks sorted, alphas not."""
    for key in ("r", "lora_alpha"):
        values = config.get(key)
        if not isinstance(values, list) or not values or not all(type(v) in (int, float) for v in values):
            raise AnalysisError(f"adapter_config.json: {key} must be a list of numbers, one a scale, got {values!r}")
    ranks, alphas = sorted(config["r"], reverse=True), config["lora_alpha"]
    if len(alphas) < len(ranks):
        raise AnalysisError(f"adapter_config.json: lora_alpha has {len(alphas)} entries, r has {len(ranks)}")
    return list(zip(ranks, alphas, strict=False))  # that code's scripts may write more alphas than ranks


def _product(a: str, b: str, scale: int, file: TensorFile, scales: list[tuple[int, float]]) -> Product:
    if scale >= len(scales):
        raise AnalysisError(
            f"tensor {a} is of scale {scale}, r of adapter_config.json has {len(scales)} entries; "
            "is it the config of another adapter?"
        )
    rank, alpha = scales[scale]
    product = make_product(a, b, file.shapes, alpha, {})
    check_rank(a, product.rank, rank, f" for scale {scale}")
    return product


def _pyramid_of(name: str) -> str:
    """What shares factors in that code: modules whose names differ in the layer's number alone."""
    stack, layer = stack_and_layer(name)
    return name if layer is None else f"{stack}.*.{name.removeprefix(f'{stack}.{layer}.')}"


def _shared(
    pyramid: dict[str, dict[int, Product]], scale: str, numbers: range, file: TensorFile
) -> tuple[dict[str, list[Product]], dict[str, str]]:
    """Owner -> its pairs (several where there are several mid scales); module -> owner of the pair saved under it."""
    products: dict[str, list[Product]] = {}
    stored: dict[str, str] = {}
    for number in numbers:
        owners: dict[bytes, str] = {}
        having = [name for name in pyramid if number in pyramid[name]]
        for name in having:
            owner = owners.setdefault(_digest(pyramid[name][number], file), name)
            stored[name] = owner
            if owner == name:
                products.setdefault(owner, []).append(pyramid[owner][number])
        # All layers have it, or the owners alone, if copies were left out in saving; else some were lost.
        if len(having) not in (len(owners), len(pyramid)):
            lost = next(name for name in pyramid if name not in having)
            raise AnalysisError(f"no pair of scale {number} for {lost} in the file; save the adapter again")
        if having and having[0] != next(iter(pyramid)):
            raise AnalysisError(f"no pair of scale {number} for {next(iter(pyramid))} in the file; save it again")
        if scale == "global" and len(owners) > 1:
            raise AnalysisError(
                f"the layers of {_pyramid_of(having[0])} have {len(owners)} different global pairs where they should "
                "share one; are the tensors of several adapters mixed?"
            )
    return products, stored


def _digest(product: Product, file: TensorFile) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for factor in (product.a, product.b):
        digest.update(np.ascontiguousarray(file.read(factor.tensors[0])).data)
    return digest.digest()


def _notes(scales: list[tuple[int, float]], misplaced: int, options: Options) -> list[str]:
    notes = [_NOTES[options.semantics]]
    if misplaced:
        notes.append(
            f"{misplaced} modules are saved with the mid pair of another group than the paper's, as 3 does not divide "
            "the number of layers; the paper's groups are used"
        )
    if len(scales) > 3:
        notes.append(f"{len(scales) - 2} scales share by the same groups of layers; mid is their sum")
    return notes


FORMAT = Format(
    name="released MSPLoRA",
    read=read,
    peft_types=("MSPLORA",),
    recognises=_recognises,
    tells=lambda name: ".lora_" in name,  # a shared pair is repeated under every layer
    reads_values=True,
    priority=1,  # before the MSPLoRA of msplora_core, of the same peft_type
)
