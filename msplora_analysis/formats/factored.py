"""Models whose weights are products themselves, low-rank, or low-rank and sparse: W = B A, W = scale * B A + S.

WeLore: ``<module>.U.weight`` (out, r) and ``.V.weight`` (r, in) (VITA-Group/WeLore, lib/LowRankLayer.py). PELA: two
linear layers in sequence, ``<module>.0.weight`` (r, in) without a bias and ``.1.weight`` (out, r) (guoyang9/PELA,
DeiT/low_rank.py). SLTrain: ``<module>.lora_A`` (r, in), ``lora_B`` (out, r), and at the places ``sparse_index`` of the
flattened weight the values ``sparse_value`` more; the scale is tanh of ``scaling``, or lora_alpha / r of the
splora_config.json that it saves (andyjm3/SLTrain, splora/splora_linear.py and splora_model.py).

Without a base the spectra are of these weights. With it, they are of what training changed, W - W0, and so are those of
the model's other weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.opening import BASE
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.full import differences
from msplora_analysis.formats.helpers.base import base_factor, needed_base
from msplora_analysis.formats.helpers.parts import expect_shape, layer_matrix
from msplora_analysis.formats.helpers.settings import needed_count, needed_number
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Product, Shapes, Sum, Update, Whole, contents
from msplora_analysis.options import Options

Floats = NDArray[np.float64]

_CONFIG = "splora_config.json"
_SPARSE = ("lora_A", "lora_B", "sparse_index", "sparse_value")
_ALSO = ("scaling", "bias")
_NO_PELA = ("0.bias", "2.weight", "2.bias")  # layers that are no two factors
_ENDS = (".sparse_index", ".U.weight", ".1.weight")
_OF_WEIGHTS = (
    "the model's weights are products themselves: the spectra are of these weights, and no update's; with base= they "
    "are of what training changed"
)


class _Weight(NamedTuple):
    """A factored weight.

    tensors: All of its own. inner, outer: A and B. sparse: The places and the values of its sparse part.
    """

    tensors: tuple[str, ...]
    inner: str
    outer: str
    sparse: tuple[str, str] | None = None


def _weights(shapes: Shapes) -> Iterator[tuple[str, _Weight]]:
    """The factored weights among tensors, by the name of the module."""
    for key in shapes:
        if key.endswith(".sparse_index"):
            name = key.removesuffix(".sparse_index")
            a, b, index, values = (f"{name}.{part}" for part in _SPARSE)
            own = tuple(f"{name}.{part}" for part in (*_SPARSE, *_ALSO) if f"{name}.{part}" in shapes)
            yield name, _Weight(own, a, b, (index, values))
            continue
        name, inner, outer = _pair(key)
        if inner and _multiply(shapes, inner, outer) and not any(f"{name}.{more}" in shapes for more in _NO_PELA):
            yield name, _Weight((inner, outer), inner, outer)


def _pair(key: str) -> tuple[str, str, str]:
    """The module, and the tensors of A and B, where a key may be that of B; else empty names."""
    for own, other in ((".U.weight", ".V.weight"), (".1.weight", ".0.weight")):
        if key.endswith(own):
            name = key.removesuffix(own)
            return name, name + other, key
    return "", "", ""


def _multiply(shapes: Shapes, inner: str, outer: str) -> bool:
    """Whether two tensors are the factors of a matrix that has more elements than both."""
    a, b = shapes.get(inner, ()), shapes[outer]
    return len(a) == len(b) == 2 and b[1] == a[0] and 0 < a[0] * (a[1] + b[0]) < a[1] * b[0]


def _recognises(config: Config, file: TensorFile) -> bool:
    if config.get("peft_type") or not any(key.endswith(_ENDS) for key in file.shapes):
        return False
    return next(_weights(file.shapes), None) is not None


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per factored weight, and with a base one for each other weight of both."""
    before = {key.removeprefix(BASE) for key in file.base or ()}  # what has factors there too is no weight in factors
    weights = {name: weight for name, weight in _weights(file.shapes) if weight.inner not in before}
    scaled = {name: _product(weight, config, file) for name, weight in weights.items()}
    done = {tensor for weight in weights.values() for tensor in weight.tensors}
    rest = {name: shape for name, shape in file.shapes.items() if name not in done}
    if file.base is None:
        updates = {name: _update(weight, *scaled[name], file) for name, weight in weights.items()}
        left = sum(len(shape) > 1 for shape in rest.values())
        notes = [_OF_WEIGHTS, *([f"{left} of the model's weights are no products, and left out"] if left else [])]
        return contents((layer_matrix(name, update) for name, update in updates.items()), (), notes)

    of_base = needed_base(file, weights, "the change of a factored weight") if weights else {}
    updates = {name: _update(weight, *scaled[name], file, of_base[name]) for name, weight in weights.items()}
    matrices = [layer_matrix(name, update) for name, update in updates.items()]
    others = {name.removeprefix(BASE): shape for name, shape in file.base.items() if name not in of_base.values()}
    if not any(len(shape) > 1 for shape in rest.values()):
        return contents(matrices, ())
    found = differences(rest, others)
    return contents([*matrices, *found.matrices], found.unknown, found.notes)


def _product(weight: _Weight, config: Config, file: TensorFile) -> tuple[Product, Factor | None]:
    """B A of a weight, and tanh of its scale where that is trained."""
    for tensor in (weight.inner, weight.outer, *(weight.sparse or ())):
        if tensor not in file.shapes:
            raise AnalysisError(f"tensor {weight.tensors[0]} has no {tensor} beside it; save the model again")
    rank, cols = expect_shape(file.shapes, weight.inner, None, None)
    rows, _ = expect_shape(file.shapes, weight.outer, None, rank)
    scaling, trained = 1.0, None
    if weight.sparse:
        index, values = weight.sparse
        expect_shape(file.shapes, values, *expect_shape(file.shapes, index, None))
        scale = weight.outer.replace("lora_B", "scaling")
        about = config.get(_CONFIG, config)
        if scale in file.shapes:
            expect_shape(file.shapes, scale, 1)
            trained = Factor((scale,), 1, 1)
        elif "lora_alpha" in about:
            scaling = needed_number(about, "lora_alpha") / needed_count(about, "r")
        else:
            raise AnalysisError(
                f"tensor {weight.outer}: the scale of SLTrain is not in the file; put its {_CONFIG} beside it, or "
                '{"lora_alpha": ..., "r": ...} as adapter_config.json'
            )
    return Product(Factor((weight.inner,), rank, cols), Factor((weight.outer,), rows, rank), scaling), trained


def _update(
    weight: _Weight, product: Product, scale: Factor | None, file: TensorFile, base: str | None = None
) -> Update:
    """A factored weight, less that of the base where there is one."""
    if not weight.sparse and base is None:
        return Sum((product,))
    rows, cols = product.rows, product.cols
    index, values = weight.sparse or (None, None)
    names = {"a": weight.inner, "b": weight.outer, "values": values, "scale": scale and scale.tensors[0], "base": base}
    if base:
        base_factor(file, base, rows, cols)  # its shape
    given = {part: name for part, name in names.items() if name}
    make = partial(_dense, parts=tuple(given), scaling=product.scaling, where=f"{file.path}: tensor {index}")
    return Whole(Factor(tuple(given.values()), rows, cols, make, (index,) if index else ()))


def _dense(*tensors: NDArray[Any], parts: tuple[str, ...], scaling: float, where: str) -> Floats:
    """scaling * B A with the values added at their places, less the base's weight."""
    by_name: Mapping[str, Floats] = dict(zip(parts, (one.astype(np.float64) for one in tensors), strict=False))
    if "scale" in by_name:
        scaling = float(np.tanh(by_name["scale"].reshape(())))
    matrix: Floats = by_name["b"] @ by_name["a"]
    matrix *= scaling
    if "values" in by_name:
        index = tensors[-1]
        if index.size and not 0 <= index.min() <= index.max() < matrix.size:
            raise AnalysisError(
                f"{where} names a place outside of the weight {list(matrix.shape)}; save the model again"
            )
        np.add.at(matrix.reshape(-1), index, by_name["values"])
    if "base" in by_name:
        matrix -= by_name["base"].reshape(matrix.shape)
    return matrix


FORMAT = Format(
    name="factored weights",
    read=read,
    recognises=_recognises,
    config_files=dict.fromkeys(("pytorch_model.bin", "model.safetensors"), (_CONFIG,)),
    takes_base=lambda config: True,
    why_no_lora="its products are the weights themselves, and no update of a model",
    priority=1,  # before loralib, whose names are the same
)
