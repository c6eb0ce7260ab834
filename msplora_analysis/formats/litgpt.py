"""LoRA of litgpt: ``lit_model.pth.lora`` beside ``model_config.yaml`` and ``hyperparameters.yaml``.

Keys are loralib's. Queries, keys and values are one weight, ``attn.qkv``, with A (r g, in) of the g that have LoRA, and
B with their outputs one after another: head_size · n_head of the queries, head_size · n_query_groups of the keys and
values. Which have it is in ``lora_query``, ``lora_key`` and ``lora_value``. The scale is lora_alpha / lora_r.
Source: litgpt/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.parts import expect_shape, layer_matrix, pair_factors
from msplora_analysis.formats.helpers.structures import rows_of
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Factor, Matrix, Product, Shapes, Sum, contents
from msplora_analysis.options import Options

_FACTOR = r"(?P<name>.+)\.lora_(?P<factor>[AB])"
_MODEL, _TRAINING = "model_config.yaml", "hyperparameters.yaml"
_PARTS = ("query", "key", "value")


def read(config: Config, file: TensorFile, options: Options) -> Contents:
    """One matrix per adapted module, of ``attn.qkv`` one for each part that has LoRA."""
    rank = _count(config, _TRAINING, "lora_r")
    alpha = _count(config, _TRAINING, "lora_alpha")
    pairs, unknown = pair_factors(file.shapes, config, _FACTOR)
    matrices: list[Matrix] = []
    for (name, _), (a, b) in pairs.items():
        parts = dict(_parts(config)) if re.search(r"\.attn\.(qkv|attn)$", name) else {}
        matrices += _matrices(name, a, b, rank, alpha / rank, parts, file.shapes)
    return contents(matrices, unknown)


def _parts(config: Config) -> Iterator[tuple[str, int]]:
    """The parts of queries, keys and values that have LoRA, and their outputs."""
    size = _count(config, _MODEL, "head_size")
    for part in _PARTS:
        heads = _count(config, _MODEL, "n_head" if part == "query" else "n_query_groups")
        if config[_TRAINING].get(f"lora_{part}") is True:
            yield part, size * heads


def _matrices(
    name: str, a: str, b: str, rank: int, scaling: float, parts: dict[str, int], shapes: Shapes
) -> Iterator[Matrix]:
    inputs, cols = expect_shape(shapes, a, rank * max(len(parts), 1), None)
    outputs, _ = expect_shape(shapes, b, sum(parts.values()) or None, rank)
    if not parts:
        yield layer_matrix(name, Sum((Product(Factor((a,), inputs, cols), Factor((b,), outputs, rank), scaling),)))
    begin = 0
    for i, (part, rows) in enumerate(parts.items()):
        inner = Factor((a,), rank, cols, partial(rows_of, start=i * rank, count=rank))
        outer = Factor((b,), rows, rank, partial(rows_of, start=begin, count=rows))
        yield layer_matrix(f"{name}.{part}", Sum((Product(inner, outer, scaling),)))
        begin += rows


def _count(config: Config, file: str, key: str) -> int:
    value = config.get(file, {}).get(key)
    if type(value) is not int or value < 1:
        raise AnalysisError(
            f"{file}: {key} must be a positive whole number, got {value!r}; an adapter of litgpt needs {_MODEL} and "
            f"{_TRAINING} beside it, as litgpt writes them"
        )
    return value


FORMAT = Format(
    name="litgpt",
    read=read,
    recognises=lambda config, file: _TRAINING in config or _MODEL in config,
    config_files={"lit_model.pth.lora": (_MODEL, _TRAINING)},
    why_no_lora="its queries, keys and values are one weight; convert it with litgpt's convert_from_litgpt",
    priority=1,  # before loralib, whose names are the same
)
