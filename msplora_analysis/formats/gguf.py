"""LoRA adapters of llama.cpp, as its convert_lora_to_gguf.py writes them: ``blk.0.attn_q.weight.lora_a``, ``.lora_b``.

A is (r, in) and B (out, r); of the token embeddings A is (vocabulary, r), and of experts each has one more axis before.
The update is alpha / r * B A, or B A where alpha is 0 or not there, as llama.cpp takes it (``llama-adapter.h``).
Modules keep llama.cpp's names. It has the rows of some models' queries and keys in another order than transformers,
which changes no singular value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, layer_matrix, pair_factors
from msplora_analysis.formats.helpers.structures import expert_matrices, transposed
from msplora_analysis.formats.names import any_named
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Matrix, Product, Shapes, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.weight\.lora_(?P<factor>[ab])"
_TOKENS = "token_embd"
_INVOKED = "adapter.alora.invocation_tokens"
_has_factors = any_named(_FACTOR)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module or expert, all of scale "layer"."""
    kind = file.metadata.get("general.type")
    if kind not in (None, "adapter"):
        raise AnalysisError(f"general.type is {kind!r}: it is no adapter; expected a file of convert_lora_to_gguf.py")
    if (kind := file.metadata.get("adapter.type")) not in (None, "lora"):
        raise AnalysisError(f"adapter.type is {kind!r}: it has no low-rank factors; expected 'lora'")
    text = file.metadata.get("adapter.lora.alpha", "0")
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise AnalysisError(f"adapter.lora.alpha is {text!r}; expected a number: convert the adapter again")
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    matrices = [matrix for (name, _), (a, b) in pairs.items() for matrix in _matrices(name, a, b, alpha, file.shapes)]
    notes = []
    if _INVOKED in file.metadata:
        notes.append("activated LoRA (arXiv 2504.12397): the update acts only from the invocation tokens on")
    return contents(matrices, unknown, notes)


def _matrices(name: str, a: str, b: str, alpha: float, shapes: Shapes) -> Iterator[Matrix]:
    if len(shapes[a]) == 3:
        rank = shapes[a][1]
        yield from expert_matrices(name, a, b, alpha / rank if alpha and rank else 1.0, shapes)
        return
    if name == _TOKENS:
        cols, rank = expect_shape(shapes, a, None, None)
        inner = Factor((a,), rank, cols, transposed)
    else:
        rank, cols = expect_shape(shapes, a, None, None)
        inner = Factor((a,), rank, cols)
    rows, _ = expect_shape(shapes, b, None, rank)
    yield layer_matrix(name, Sum((Product(inner, Factor((b,), rows, rank), alpha / rank if alpha else 1.0),)))


def _why_no_lora(config: Config, shapes: Shapes, matrices: Sequence[Matrix]) -> str | None:
    if fused := next((key for key, shape in shapes.items() if len(shape) != 2), None):
        return f"tensor {fused}: experts are one tensor in llama.cpp, whose names in the model are not known"
    return None


FORMAT = Format(
    name="GGUF",
    read=read,
    lone=_has_factors,
    recognises=lambda config, file: "general.architecture" in file.metadata or _has_factors(file.shapes),
    why_no_lora=_why_no_lora,
    names_of_llama_cpp=True,
    reads_values=True,
    priority=1,
)
