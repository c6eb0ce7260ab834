"""State dicts of loralib (github.com/microsoft/LoRA): ``lora_state_dict(model)``, saved by torch.save.

Keys are ``<name>.lora_A`` and ``<name>.lora_B``, parameters and not modules. Shapes tell the layers apart:
- Linear: (r, in) and (out, r); Embedding: (r, vocabulary) and (dim, r);
- MergedLinear, one weight of several parts such as GPT-2's c_attn: (r g, in) and (out_g, r) for the g parts that have
  LoRA. Each part is a matrix of its own, named ``<name>.0``, ``<name>.1``, ...: in order, but of the parts that have
  LoRA; which these are (q and v, say) is not in the file;
- Conv2d: (r k, in k) and (out k, r k) for kernels k x k. loralib views B A, of shape (out k, in k), as the weight
  (out, in, k, k). Here it is B A as it stands, the matrix that has low rank: the Frobenius norm is the weight's, the
  single values are not those of the weight flattened to (out, in k k).

lora_alpha is not in the file: without an adapter_config.json beside it, the matrices are B A unscaled. With
``lora_alpha`` in it they are scaled by lora_alpha / r; a Conv2d needs ``r`` there too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import pair_factors
from msplora_analysis.formats.helpers.settings import number
from msplora_analysis.formats.helpers.structures import not_plain_pairs, rows_of
from msplora_analysis.formats.names import any_named, module_of, stack_and_layer
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Matrix, Product, Shapes, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.lora_(?P<factor>[AB])"
_NO_ALPHA = (
    "a loralib file does not hold lora_alpha: the spectra are of B A, without the factor lora_alpha / r; to have it, "
    'put {"lora_alpha": ..., "r": ...} into an adapter_config.json beside the file'
)
_has_factors = any_named(_FACTOR)


def _recognises(config: Config, file: TensorFile) -> bool:
    return not config.get("peft_type") and _has_factors(file.shapes)


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, or part of a MergedLinear, all of scale "layer"."""
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    # lora_state_dict(model, bias=...) keeps the biases that were trained.
    unknown = [key for key in unknown if key.rpartition(".")[2] != "bias"]
    matrices: list[Matrix] = []
    for (name, _), (a, b) in pairs.items():
        matrices += part_matrices(name, a, b, file.shapes, config)
    return contents(matrices, unknown, [] if "lora_alpha" in config else [_NO_ALPHA])


def part_matrices(name: str, a: str, b: str, shapes: Shapes, config: Config) -> Iterator[Matrix]:
    """The matrix of each part of a module, by ``lora_alpha`` and ``r`` of the config."""
    products = list(_products(a, b, shapes, config))
    for part, product in enumerate(products):
        suffix = f".{part}" if len(products) > 1 else ""
        yield Matrix("layer", stack_and_layer(name)[1], module_of(name) + suffix, name + suffix, Sum((product,)))


def _products(a: str, b: str, shapes: Shapes, config: Config) -> Iterator[Product]:
    """The product of each part; one, but for a MergedLinear."""
    shape_a, shape_b = shapes[a], shapes[b]
    fits = len(shape_a) == len(shape_b) == 2 and 0 not in (*shape_a, *shape_b) and shape_a[0] % shape_b[1] == 0
    parts = shape_a[0] // shape_b[1] if fits else 0
    if not fits or shape_b[0] % parts:
        raise AnalysisError(
            f"tensors {a} and {b} have shapes {list(shape_a)} and {list(shape_b)}; "
            "expected (r g, in) and (out, r) of g parts, where g divides out; save the adapter again"
        )
    (_, cols), (rows, rank) = shape_a, shape_b
    rows //= parts
    # PaddleNLP has (in, r) and (r, out), which multiply too where a weight is square.
    if rank > min(rows, cols) and config.get("r") != rank:
        raise AnalysisError(
            f"tensors {a} and {b} have shapes {list(shape_a)} and {list(shape_b)}: as B A their rank {rank} is larger "
            "than the matrix; if they are stored transposed, as PaddleNLP does, give them with their lora_config.json"
        )
    if parts > 1 and a.endswith((".attn.qkv.lora_A", ".attn.attn.lora_A")):
        raise AnalysisError(
            f"tensor {a} is of queries, keys and values, whose sizes are not in the file; keep litgpt's file beside "
            "its model_config.yaml, under the name lit_model.pth.lora"
        )
    scaling = _scaling(a, rank, rows, cols, config)
    if parts == 1:
        yield Product(Factor((a,), rank, cols), Factor((b,), rows, rank), scaling)
        return
    for part in range(parts):
        yield Product(
            Factor((a,), rank, cols, partial(rows_of, start=part * rank, count=rank)),
            Factor((b,), rows, rank, partial(rows_of, start=part * rows, count=rows)),
            scaling,
        )


def _scaling(a: str, rank: int, rows: int, cols: int, config: Config) -> float:
    """lora_alpha / r, from the config. The rank of a convolution's factors is r times its kernel size."""
    r = number(config, "r", rank)
    kernel = rank / r if r > 0 else 0.0
    if kernel < 1 or any(length % kernel for length in (rank, rows, cols)):
        raise AnalysisError(
            f"tensor {a} has rank {rank}, adapter_config.json says {r:g}; is it the config of another adapter?"
        )
    return number(config, "lora_alpha") / r if "lora_alpha" in config else 1.0


def _why_no_lora(config: Config, shapes: Shapes, matrices: Iterable[Matrix]) -> str | None:
    if "lora_alpha" not in config:
        return (
            "a loralib file does not hold lora_alpha, on which the update depends; put "
            '{"lora_alpha": ..., "r": ...} into an adapter_config.json beside it'
        )
    return not_plain_pairs(matrices)


FORMAT = Format(name="loralib", read=read, lone=_has_factors, recognises=_recognises, why_no_lora=_why_no_lora)
