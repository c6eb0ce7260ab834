"""LoRA of MLX-LM: ``<module>.lora_a`` (in, r) and ``.lora_b`` (r, out), so that ΔW = scale · (lora_a lora_b)ᵀ.

``scale`` of ``lora_parameters`` in adapter_config.json is the whole factor: no rank divides it. Mixtures of experts
have lora_a (experts, r, in) and lora_b (experts, out, r), each expert a matrix. Embeddings have (vocabulary, r) and
(r, dim). ``.m`` are the magnitudes of DoRA. Source: mlx_lm/tuner/lora.py and dora.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import dora_note, expect_shape, layer_matrix, pair_factors
from msplora_analysis.formats.helpers.settings import number
from msplora_analysis.formats.helpers.structures import expert_matrices, transposed
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Matrix, Product, Shapes, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.lora_(?P<factor>[ab])"
_DORA = dora_note("scale")


def _has_factors(names: Collection[str]) -> bool:
    return any(re.fullmatch(_FACTOR, name) and ".weight." not in name for name in names)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module or expert, all of scale "layer"."""
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or "scale" not in parameters:
        raise AnalysisError(
            "adapter_config.json: lora_parameters has no scale, or is not there; without it the update of an "
            "adapter of MLX-LM cannot be computed: use the file that was saved with the weights"
        )
    scale = number(parameters, "scale")
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    modules = {name for name, _ in pairs}
    magnitudes = {key for key in unknown if key.endswith(".m") and key.removesuffix(".m") in modules}
    matrices = [matrix for (name, _), (a, b) in pairs.items() for matrix in _matrices(name, a, b, scale, file.shapes)]
    return contents(matrices, (key for key in unknown if key not in magnitudes), [_DORA] if magnitudes else [])


def _matrices(name: str, a: str, b: str, scale: float, shapes: Shapes) -> Iterator[Matrix]:
    if len(shapes[a]) == 3:
        yield from expert_matrices(name, a, b, scale, shapes)
        return
    cols, rank = expect_shape(shapes, a, None, None)
    _, rows = expect_shape(shapes, b, rank, None)
    inner, outer = Factor((a,), rank, cols, transposed), Factor((b,), rows, rank, transposed)
    yield layer_matrix(name, Sum((Product(inner, outer, scale),)))


def _why_no_lora(config: Config, shapes: Shapes, matrices: Sequence[Matrix]) -> str | None:
    if magnitude := next((key for key in shapes if key.endswith(".m")), None):
        return f"tensor {magnitude}: DoRA rescales the whole weight after adding B A, which no plain LoRA can do"
    for key, shape in shapes.items():
        if len(shape) != 2 or "embed" in key:
            return (
                f"tensor {key}: PEFT has other factors of embeddings and experts than MLX-LM; only linear ones can be"
            )
    return None


FORMAT = Format(
    name="MLX-LM",
    read=read,
    lone=_has_factors,
    recognises=lambda config, file: not config.get("peft_type") and _has_factors(file.shapes),
    why_no_lora=_why_no_lora,
)
