"""MSPLoRA as msplora_core saves it: shared factors once, under the first layer of their group.

Keys are ``<name>.msplora_<scale>.A`` (rank, in) and ``.B`` (out, rank) for the scales global, mid
and layer. A *pyramid* is what shares factors: the modules of one last name, one weight shape and
one numbered stack. The update of a module is the sum over scales of lora_alpha / r_s * B_s A_s
(arXiv 2503.21838, eq. 4-6; scaling as in the released code).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import make_product, pair_factors
from msplora_analysis.formats.helpers.settings import check_rank, number, table
from msplora_analysis.formats.names import module_of, stack_and_layer
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import SCALES, Config, Contents, Matrix, Product, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.msplora_(?P<scale>global|mid|layer)\.(?P<factor>[AB])"


class _Pyramid(NamedTuple):
    """The parts of one pyramid, by the layer that they are saved under.

    Several modules of one layer may share (experts, say), so layer parts go by module name.
    """

    module: str
    shared: dict[str, dict[int, tuple[str, Product]]]  # scale -> first layer -> (module name, product)
    layers: dict[str, tuple[int | None, Product]]  # module name -> (layer, product)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """Matrices of every scale, and "total": the whole update of one module.

    An adapter without a layer scale has no total: which modules it adapts is then not on disk.
    """
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    ranks = _ranks(config)
    alpha = number(config, "lora_alpha")
    pyramids: dict[tuple[str, str, int, int], _Pyramid] = {}
    for (name, scale), (a, b) in pairs.items():
        product = make_product(a, b, file.shapes, alpha, config)
        check_rank(a, product.rank, ranks.get(scale, 0), f" for {scale}")
        stack, layer = stack_and_layer(name)
        module = module_of(name)
        pyramid = pyramids.setdefault(
            (stack, module, product.rows, product.cols), _Pyramid(module, {"global": {}, "mid": {}}, {})
        )
        if scale == "layer":
            pyramid.layers[name] = layer, product
        elif pyramid.shared[scale].setdefault(layer or 0, (name, product)) != (name, product):
            raise AnalysisError(
                f"tensor {a}: another module of layer {layer} has the {scale} pair that they "
                "should share; save the adapter again"
            )

    matrices: list[Matrix] = []
    for pyramid in pyramids.values():
        _check_complete(pyramid, ranks, config)
        matrices += _matrices(pyramid, with_totals=len(ranks) > 1)
    return contents(matrices, unknown)


def _ranks(config: Config) -> dict[str, int | None]:
    """Rank of each scale present; None where only the tensors tell it (r is not divisible)."""
    explicit = table(config, "ranks")
    if not explicit:
        r = number(config, "r")
        halved = {"global": r, "mid": r / 2, "layer": r / 4}
        return {scale: int(n) if n == int(n) else None for scale, n in halved.items()}
    if unexpected := sorted(set(explicit) - set(SCALES[:3])):
        raise AnalysisError(f"adapter_config.json: ranks has {unexpected[0]!r}; expected global, mid or layer")
    return {scale: int(rank) for scale, rank in explicit.items() if rank}


def _check_complete(pyramid: _Pyramid, ranks: dict[str, int | None], config: Config) -> None:
    """Every scale of the config must be there for every numbered pyramid: none lost in saving."""
    layers = {layer for layer, _ in pyramid.layers.values()}
    if None in layers or "layer" not in ranks:
        return
    name = min(pyramid.layers, default=None, key=lambda n: pyramid.layers[n][0] or 0)
    if name is None:
        key = next(product.a.tensors[0] for units in pyramid.shared.values() for _, product in units.values())
        raise AnalysisError(f"tensor {key} has no layer part of its module in the file")
    groups = int(number(config, "mid_groups", 3))
    for scale, expected in (("global", 1), ("mid", min(groups, len(layers)))):
        present = pyramid.shared[scale]
        if scale in ranks and len(present) != expected:
            raise AnalysisError(
                f"the {len(layers)} layers that share with {name} need {expected} {scale} pairs, "
                f"the file has {len(present)}; save the adapter again"
            )
        if present and min(present) > min(layer or 0 for layer in layers):
            raise AnalysisError(
                f"the first layers that share with {name} have no {scale} pair in the file; save the adapter again"
            )


def _matrices(pyramid: _Pyramid, *, with_totals: bool) -> Iterator[Matrix]:
    for scale, units in pyramid.shared.items():
        for group, first in enumerate(sorted(units)):
            name, product = units[first]
            yield Matrix(scale, group, pyramid.module, name, Sum((product,)))
    for name, (layer, product) in pyramid.layers.items():
        yield Matrix("layer", layer, pyramid.module, name, Sum((product,)))
        if with_totals:
            # The group of a layer is the one that starts last among those not after it.
            starts = [[first for first in units if first <= (layer or 0)] for units in pyramid.shared.values()]
            shared = [units[max(of)][1] for units, of in zip(pyramid.shared.values(), starts, strict=True) if of]
            yield Matrix("total", layer, pyramid.module, name, Sum((*shared, product)))


FORMAT = Format(name="MSPLoRA", read=read, peft_types=("MSPLORA",))
